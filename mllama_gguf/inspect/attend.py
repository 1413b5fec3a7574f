"""Where the cross-attention of each written word looked.

The weights are computed from the tapped queries and keys: softmax(q k / sqrt(head_dim)), for each token that
is written, each cross-attention layer and each head, then the mean. The query is that of the position that
chose the token, which is the one before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend.types import Floats, HParams
from ..errors import RequestError
from ..model import Mllama
from ..settings import DEFAULT_PROMPT
from ..vision.preprocess import TiledImage
from ..words import brief

_TENSOR = re.compile(r"blk\.(\d+)\.cross_([qk])")


@dataclass(frozen=True, eq=False)
class Look:
    """Where a word looked.

    text:    the word, with the characters that stand next to it, but without blanks
    weights: float32 [n_tiles, n_positions], the mean over the word's tokens; their sum is 1. Position 0 of a
             tile is its class token, the others are its patches, row by row
    """

    text: str
    weights: Floats


@dataclass(frozen=True, eq=False)
class Attention:
    """Where the words of a reply looked.

    image:  the image as the encoder got it
    text:   the reply
    words:  in their order
    layers: numbers of the cross-attention layers that the weights are the mean of
    """

    image: TiledImage
    text: str
    words: tuple[Look, ...]
    layers: tuple[int, ...]

    def patches(self, weights: Floats) -> Floats:
        """The weights of patches on the canvas, float32 [rows * side, columns * side]; side is the number of
        patches along a tile. Class tokens are left out."""
        image, n_tiles = self.image, weights.shape[0]
        side = round((weights.shape[1] - 1) ** 0.5)
        tiles = weights[:, 1:].reshape(image.rows, image.columns, side, side)
        assert n_tiles == image.n_tiles
        return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(
            image.rows * side, image.columns * side
        )

    def inside(self, weights: Floats) -> Floats:
        """As `patches`, and each patch counts as far as it shows the image: those of the padding are 0."""
        patches = self.patches(weights)
        size = self.image.tile_size / (round((weights.shape[1] - 1) ** 0.5))
        width, height = self.image.resized_size
        for axis, length in ((0, height), (1, width)):
            edges = np.arange(patches.shape[axis]) * size
            share = np.clip((length - edges) / size, 0, 1).astype(np.float32)
            patches = patches * (share[:, None] if axis == 0 else share)
        return patches

    def map(self, weights: Floats, size: tuple[int, int] | None = None) -> Floats:
        """The weights of patches on the image, float32 [height, width]: padding removed, the resize undone.
        Values are linear between the middles of patches.

        size: (width, height) of the map; None: the image's own, upright
        """
        from PIL import Image

        patches = self.patches(weights)
        scale = patches.shape[0] / self.image.canvas_size[1]  # patches a pixel
        width, height = (length * scale for length in self.image.resized_size)
        # Without the patches of the padding alone: the values at the image's edge would be mixed with theirs.
        inside = Image.fromarray(np.ascontiguousarray(patches[: ceil(height - 1e-6), : ceil(width - 1e-6)]))
        box = (0, 0, min(width, inside.width), min(height, inside.height))
        shape = size or self.image.image_size
        drawn = inside.resize(shape, Image.Resampling.BILINEAR, box=box)
        return np.array(drawn, np.float32)

    def peak(self, weights: Floats) -> tuple[float, float]:
        """(x, y) of the middle of the patch with the largest weight, in pixels of the image."""
        patches = self.inside(weights)
        row, column = divmod(int(patches.argmax()), patches.shape[1])
        side = self.image.canvas_size[1] / patches.shape[0]
        (width, height), (new_width, new_height) = self.image.image_size, self.image.resized_size
        x, y = (column + 0.5) * side * width / new_width, (row + 0.5) * side * height / new_height
        return min(x, width - 0.5), min(y, height - 0.5)

    def find(self, word: str) -> tuple[Look, ...]:
        """The words that are written like one, in any case, punctuation aside. Raises RequestError."""
        wanted = _plain(word)
        found = tuple(look for look in self.words if _plain(look.text) == wanted)
        if not found:
            raise RequestError(f"the reply has no word {brief(word)}; it is {brief(self.text, 200)}")
        return found


def attend(
    model: Mllama,
    image: TiledImage,
    prompt: str = DEFAULT_PROMPT,
    *,
    layer: int | None = None,
    **options: Any,
) -> Attention:
    """Ask about an image, and find where each word of the reply looked.

    layer:   number of a cross-attention layer, as `mllama trace` shows it; None: the mean of all
    options: as of `Mllama.reply`

    The conversation of the model is cleared. Raises RequestError for a layer without cross-attention, else
    what `Mllama.reply` raises.
    """
    layers = layers_of(model.hparams, layer)
    embedding = model.encode_image(image)
    model.reset()
    reply = model.reply(image=embedding, prompt=prompt, logprobs=True, **options)
    keys: dict[int, list[Floats]] = {il: [] for il in layers}
    rows: list[Floats] = []  # for each written token, and for the one after the last
    parts: list[Floats] = []  # of the layers of the run that computes

    def on_tensor(name: str, values: Floats | None) -> bool:
        match = _TENSOR.fullmatch(name)
        if match is None or (il := int(match[1])) not in keys:
            return False
        if values is None:
            return True
        if match[2] == "k":
            keys[il].append(values.copy())
            return False
        if il == layers[0]:
            parts.clear()
        n_q = model.hparams.n_head * model.hparams.head_dim
        parts.append(
            weights_of(values.reshape(-1, n_q)[-1:], keys[il][-embedding.n_tiles :], model.hparams)[0].mean(0)
        )
        if il == layers[-1]:
            if not reply.stats.seconds["prompt"]:
                rows.clear()  # of an earlier part of the prompt
            rows.append(np.mean(parts, axis=0))
        return False

    with model.tap(on_tensor):
        text = reply.read()
    tokens = [one.data for one in reply.logprobs]
    weights = [row.reshape(embedding.n_tiles, -1) for row in rows[: len(tokens)]]
    return Attention(image, text, tuple(_words(tokens, weights)), layers)


def weights_of(q: Floats, keys: Sequence[Floats], hparams: HParams) -> Floats:
    """Weights of cross-attention: float32 [n, n_head, rows].

    q:    [n, n_head * head_dim]
    keys: of each tile, [rows of the tile, n_head_kv * head_dim]
    """
    h = hparams
    k = np.concatenate(keys).reshape(-1, h.n_head_kv, h.head_dim)
    queries = q.reshape(-1, h.n_head, h.head_dim)
    each = h.n_head // h.n_head_kv
    out = np.empty((len(queries), h.n_head, len(k)), np.float32)
    for head in range(h.n_head):
        scores = queries[:, head] @ k[:, head // each].T / np.float32(h.head_dim**0.5)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = scores / scores.sum(-1, keepdims=True)
    return out


def layers_of(hparams: HParams, layer: int | None) -> tuple[int, ...]:
    """The cross-attention layers of a model, or the one of a number. Raises RequestError."""
    if not hparams.has_vision:
        raise RequestError("this model has no vision encoder; give its mmproj file")
    if layer is None:
        return tuple(hparams.cross_layers)
    if layer not in hparams.cross_layers:
        known = ", ".join(map(str, hparams.cross_layers))
        raise RequestError(f"layer {brief(layer)} has no cross-attention; these have: {known}")
    return (layer,)


def _words(tokens: Sequence[bytes], weights: Sequence[Floats]) -> Iterator[Look]:
    """Tokens as words, which blanks separate."""
    groups: list[tuple[bytes, list[Floats]]] = []
    is_apart = True
    for data, one in zip(tokens, weights, strict=True):
        if not data.strip():
            is_apart = True
            continue
        if is_apart or data[:1].isspace():
            groups.append((b"", []))
        text, members = groups.pop()
        groups.append((text + data, [*members, one]))
        is_apart = data[-1:].isspace()
    for data, members in groups:
        word = " ".join(data.decode("utf-8", "replace").split())
        yield Look(word, np.mean(members, axis=0, dtype=np.float32))


def _plain(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word.casefold()) or word.casefold()


def as_dict(attention: Attention, words: Sequence[Look]) -> dict[str, Any]:
    """What JSON has of it and of some of its words."""
    return {
        "text": attention.text,
        "layers": list(attention.layers),
        "grid": [attention.image.rows, attention.image.columns],
        "image_size": list(attention.image.image_size),
        "words": [_word(attention, look) for look in words],
    }


def _word(attention: Attention, look: Look) -> Mapping[str, Any]:
    weights: npt.NDArray[np.float64] = look.weights.astype(np.float64)
    inside = float(attention.inside(look.weights).sum(dtype=np.float64))
    x, y = attention.peak(look.weights)
    return {
        "word": look.text,
        "tiles": [round(float(one), 6) for one in weights[:, 1:].sum(-1)],
        "class_tokens": [round(float(one), 6) for one in weights[:, 0]],
        "padding": round(float(weights[:, 1:].sum()) - inside, 6),
        "peak": [round(x, 1), round(y, 1)],
    }
