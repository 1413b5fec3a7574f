"""The encoder's output for an image, and a small store of such outputs."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..cache.disk import ImageCache
from ..errors import ImageError
from .loading import ImageSource
from .notebook import card
from .preprocess import TiledImage
from .thumbnail import data_url, to_jpeg


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """The cross-attention states of one image, for the model that made them. Accepted wherever an image
    is.

    states:          float32 [n_tiles, n_positions, n_embd], read-only; the tiles in use only
    aspect_ratio_id: the tile grid, as in TiledImage
    key:             names the content: two embeddings with one key are taken to be the same. From
                     `encode_image` it is the sha256 of what the states were computed from, and by what; left
                     out, the sha256 of the states.

    Raises ImageError for states of another type or number of dimensions.
    """

    states: npt.NDArray[np.float32]
    aspect_ratio_id: int
    key: str = field(default="")

    def __post_init__(self) -> None:
        if self.states.dtype != np.float32 or self.states.ndim != 3 or 0 in self.states.shape:
            raise ImageError(
                f"ImageEmbedding: states are {self.states.dtype} {list(self.states.shape)}; "
                "expected float32 [n_tiles, n_positions, n_embd]"
            )
        states = np.ascontiguousarray(self.states)
        if states is self.states and states.flags.writeable:
            states = states.view()  # the caller's own array stays writeable
        states.flags.writeable = False
        object.__setattr__(self, "states", states)
        if not self.key:
            object.__setattr__(self, "key", hashlib.sha256(states.data).hexdigest())

    @property
    def n_tiles(self) -> int:
        """Tiles in use."""
        return int(self.states.shape[0])

    def _repr_html_(self) -> str:
        """For notebooks: each patch as light as its vector is long, a square for each tile."""
        side = math.isqrt(self.states.shape[1] - 1)
        images = []
        if side and side * side == self.states.shape[1] - 1:
            lengths = np.linalg.norm(self.states[:, 1:], axis=-1)
            low, high = np.percentile(lengths, (2, 98))
            shares = np.clip((lengths - low) / max(float(high - low), 1e-12), 0, 1)
            for tile in np.rint(shares * 255).astype(np.uint8).reshape(-1, side, side):
                square = Image.fromarray(tile).resize((120, 120), Image.Resampling.NEAREST)
                images.append(data_url(to_jpeg(square.convert("RGB"), 120)))
        shape = " x ".join(map(str, self.states.shape))
        facts = {
            "states": f"{shape} (tiles, positions, values)",
            "aspect_ratio_id": self.aspect_ratio_id,
            "key": self.key[:12],
        }
        return card("ImageEmbedding", facts, images=images, columns=len(images))

    def __repr__(self) -> str:
        shape = list(self.states.shape)
        return f"ImageEmbedding({shape}, aspect_ratio_id={self.aspect_ratio_id}, key={self.key[:12]})"


@dataclass(frozen=True)
class LimitedImage:
    """An image with a limit of its own.

    max_tiles: most tiles that it may have
    """

    image: ImageSource | TiledImage | ImageEmbedding
    max_tiles: int


# An image wherever one is taken.
ImageInput: TypeAlias = "ImageSource | TiledImage | ImageEmbedding | LimitedImage"


@dataclass(frozen=True, eq=False)
class Encoding:
    """An image of a prompt, on its way into the cache: its states are not computed before they are needed.

    key, n_tiles: as those of its ImageEmbedding
    states:       finds or computes them, float32 [n_tiles, n_positions, n_embd]
    image_kv_key: the key of the keys and values that the text model computes of the states, see `cache.keys`;
                  "": they are not kept
    """

    key: str
    n_tiles: int
    states: Callable[[], npt.NDArray[np.float32]]
    image_kv_key: str = ""


class EmbeddingStore:
    """The embeddings used last, by key: in memory as many as fit max_bytes (one at least), and those on disk.
    Safe from several threads."""

    def __init__(self, max_bytes: int, disk: ImageCache | None = None) -> None:
        self._max_bytes = max_bytes
        self._disk = disk
        self._items: OrderedDict[str, ImageEmbedding] = OrderedDict()
        self._lock = threading.Lock()  # of the items

    def get(self, key: str) -> ImageEmbedding | None:
        """The embedding of that key, which now counts as the last one used."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        found = None if self._disk is None else self._disk.read_states(key)
        if found is None:
            return None
        known = ImageEmbedding(*found, key)
        self._keep(known)
        return known

    def add(self, embedding: ImageEmbedding) -> None:
        """Keep an embedding, and drop the oldest ones that no longer fit."""
        self._keep(embedding)
        if self._disk is not None:
            self._disk.add_states(embedding.key, embedding.states, embedding.aspect_ratio_id)

    def _keep(self, embedding: ImageEmbedding) -> None:
        with self._lock:
            self._items[embedding.key] = embedding
            self._items.move_to_end(embedding.key)
            n_bytes = sum(e.states.nbytes for e in self._items.values())
            while len(self._items) > 1 and n_bytes > self._max_bytes:
                n_bytes -= self._items.popitem(last=False)[1].states.nbytes

    def clear(self) -> None:
        """Drop all, except those on disk."""
        with self._lock:
            self._items.clear()

    def __contains__(self, key: object) -> bool:
        """Whether the embedding of a key is in memory."""
        with self._lock:
            return key in self._items

    def __len__(self) -> int:
        return len(self._items)
