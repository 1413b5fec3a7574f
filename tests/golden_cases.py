"""The inputs shared by the golden numbers, the tests against them and the parity tests.

Everything follows from the name of the architecture, so inputs are never stored: pixels of every tile grid,
and prompts of token ids with one image for every image token.

Goldens keep, of the logits at every position, some columns and some random projections of all columns: a
random projection of an error has about its length, whatever column it is in. `condense` makes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tiny import Arch, Stream, make_pixels

from mllama_gguf.convert.tensors import FloatType
from mllama_gguf.vision.preprocess import TiledImage

F32 = npt.NDArray[np.float32]

GOLDEN_DIR = Path(__file__).parent / "golden"
N_GREEDY = 32
N_COLUMNS = 24
N_PROJECTIONS = 24

# Upper bounds of the relative L2 error, with F32 weights and caches. Two right implementations differ by
# 2e-6, and by more past some hundred tokens, where the RoPE angles are rounded differently.
STATES_TOLERANCE = 1e-5
LOGITS_TOLERANCE = 2e-5
LOGITS_TOLERANCE_LONG = 1e-4  # from this position on:
LONG = 300

# With weights in half precision ggml rounds what it multiplies with them too, so that products carry errors
# of 2^-9 (BF16) or 2^-12 (F16). Against the oracle with equally rounded weights, the numpy model with its
# inputs rounded at every product differs by at most 3.4e-3 and 6.9e-3 (states, logits) with BF16 and 4.3e-4
# and 9.9e-4 with F16, over all architectures and prompts; without that rounding by 2e-6. Bounds: twice that.
# A model with other weights (unrounded, say) is not told from the right one here: tests/test_convert.py does
# that, to the bit.
HALF_TOLERANCES: dict[FloatType, tuple[float, float]] = {"bf16": (7e-3, 1.4e-2), "f16": (9e-4, 2e-3)}
HALF_IMAGE = 2  # aspect_ratio_id
HALF_CASES = ("text_before_image", "several_turns")
# With F16 caches: relative error of the logits at each position. Rounding K and V alone gives 1e-3 at the
# worst position of all architectures and prompts.
F16_CACHE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class GoldenImage:
    """Random pixels; the same key gives the same image."""

    aspect_ratio_id: int
    key: int = 0

    def pixels(self, arch: Arch) -> F32:
        """[max_tiles, 3, S, S]"""
        return make_pixels(arch, self.aspect_ratio_id, self.key)

    def n_tiles(self, arch: Arch) -> int:
        rows, columns = arch.grids[self.aspect_ratio_id - 1]
        return rows * columns


@dataclass(frozen=True)
class Case:
    """A prompt, and the images of its image tokens in order."""

    name: str
    tokens: tuple[int, ...]
    images: tuple[GoldenImage, ...]


def grid_images(arch: Arch) -> list[GoldenImage]:
    """One image for every tile grid."""
    return [GoldenImage(i + 1) for i in range(len(arch.grids))]


# What each prompt is made of: a number is so many random tokens, "image" an image token, anything else a
# special token.
_TURN = ("<|start_header_id|>", 1, "<|end_header_id|>", 1)
PROMPTS: dict[str, tuple[int | str, ...]] = {
    "text_only": ("<|begin_of_text|>", 24),
    "image_first": ("image", 12),
    "text_before_image": ("<|begin_of_text|>", 9, "image", 11),
    "two_images": ("<|begin_of_text|>", 3, "image", 8, "image", 9),
    "three_images": ("<|begin_of_text|>", "image", 6, "image", 1, "image", 7),
    "adjacent_images": ("<|begin_of_text|>", 4, "image", "image", 10),
    "adjacent_then_one": ("<|begin_of_text|>", "image", "image", "image", 6, "image", 6),
    "image_last": ("<|begin_of_text|>", 5, "image"),
    "several_turns": (
        *("<|begin_of_text|>", *_TURN, "image", 14, "<|eot_id|>"),
        *(*_TURN, 21, "<|eot_id|>"),
        *(*_TURN, 17, "<|eot_id|>"),
        *(*_TURN, 25, "<|eot_id|>"),
        *(*_TURN, "image", "image", 13, "<|eot_id|>"),
        *_TURN,
    ),
    "over_400_tokens": ("<|begin_of_text|>", 140, "image", 170, "image", 120),
}


@lru_cache
def cases(arch: Arch) -> tuple[Case, ...]:
    made = []
    for number, (name, parts) in enumerate(PROMPTS.items()):
        stream = Stream("prompt", arch.name, name)
        tokens: list[int] = []
        images: list[GoldenImage] = []
        for part in parts:
            if isinstance(part, int):
                tokens += stream.integers(arch.vocab_size, part)
            elif part == "image":
                # A run through all grids; an image of a grid differs from prompt to prompt.
                grid = (5 * number + 3 * len(images)) % len(arch.grids) + 1
                tokens.append(arch.image_token)
                images.append(GoldenImage(grid, key=number * 10 + len(images)))
            else:
                tokens.append(arch.special(part))
        made.append(Case(name, tuple(tokens), tuple(images)))
    return tuple(made)


def case(arch: Arch, name: str) -> Case:
    return next(c for c in cases(arch) if c.name == name)


@lru_cache
def _projections(vocab_size: int) -> F32:
    return Stream("projections", vocab_size).noise(vocab_size, N_PROJECTIONS, scale=N_PROJECTIONS**-0.5)


def condense(logits: F32) -> F32:
    """Of logits [tokens, vocab_size] some columns and projections, [tokens, N_COLUMNS + N_PROJECTIONS]."""
    vocab_size = logits.shape[1]
    columns = np.linspace(0, vocab_size - 1, N_COLUMNS).astype(np.int64)
    projected = logits.astype(np.float64) @ _projections(vocab_size)
    return np.concatenate([logits[:, columns], projected.astype(np.float32)], axis=1)


def relative_error(actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> float:
    """L2 norm of the difference over that of the expected values."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))


def position_errors(actual: F32, expected: F32) -> npt.NDArray[np.float64]:
    """The relative error at each position, of logits or of their condensed form: [tokens]."""
    difference = actual.astype(np.float64) - expected
    norms = np.linalg.norm(expected.astype(np.float64), axis=-1)
    return np.asarray(np.linalg.norm(difference, axis=-1) / norms)


def tolerances(n_tokens: int) -> npt.NDArray[np.float64]:
    """What `position_errors` may be at each position."""
    return np.where(np.arange(n_tokens) < LONG, LOGITS_TOLERANCE, LOGITS_TOLERANCE_LONG)


def tiled(arch: Arch, image: GoldenImage) -> TiledImage:
    """The image as the preprocessor would hand it over."""
    rows, columns = arch.grids[image.aspect_ratio_id - 1]
    size = (columns * arch.image_size, rows * arch.image_size)
    return TiledImage(
        pixels=image.pixels(arch),
        rows=rows,
        columns=columns,
        aspect_ratio_id=image.aspect_ratio_id,
        image_size=size,
        resized_size=size,
        tile_size=arch.image_size,
        max_tiles=arch.max_tiles,
    )
