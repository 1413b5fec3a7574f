"""Cut an image into the tiles that the vision encoder reads: choose a grid, resize, normalise.

The pixels are bit-identical to `MllamaImageProcessor` of transformers 4.52.4 (the Pillow one), given the same
image and the same Pillow. Pillow's resize is integer arithmetic and the same on every machine. But Pillow
12.1, 12.2 and 13 run its two passes in different orders: an image that shrinks much more in height than in
width can differ by one level in a few pixels between them. How files and modes
become RGB: `loading`, `decoding`, `colour`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..checks import Whole, checked
from ..handles import FoundOnce
from .loading import ImageSource, load_image
from .notebook import card
from .thumbnail import data_url, to_jpeg

# Counts up whenever the pixels of any image change.
PREPROCESS_VERSION = 2

TILE_SIZE = 560
MAX_TILES = 4

_SHOWN = 120  # pixels of a tile in a notebook

# CLIP's statistics, which all mllama models were trained with.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class TiledImage:
    """An image as the vision encoder reads it.

    pixels:          float32 [max_tiles, 3, tile_size, tile_size], normalised RGB, read-only; tile i is the
                     square in row i // columns, column i % columns; tiles from n_tiles on are all zero
    rows, columns:   the tile grid
    aspect_ratio_id: 1 + index of (rows, columns) in the supported_grids of the model; 0 is kept for
                     "no image"
    image_size:      (width, height) of the image, oriented, before anything else
    resized_size:    (width, height) after the resize; the rest of the canvas is black, right and below
    tile_size:       side of a tile in pixels
    max_tiles:       most tiles that the image may have
    """

    pixels: npt.NDArray[np.float32]
    rows: int
    columns: int
    aspect_ratio_id: int
    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    tile_size: int
    max_tiles: int

    @property
    def n_tiles(self) -> int:
        """Number of tiles in use, rows * columns."""
        return self.rows * self.columns

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(width, height) of the canvas that the tiles are cut from."""
        return self.columns * self.tile_size, self.rows * self.tile_size

    @FoundOnce
    def sha256(self) -> str:
        """Hex digest of `pixels` (all max_tiles of them) as little-endian float32 in C order."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels, dtype="<f4").data).hexdigest()

    def tile_picture(self, index: int) -> Image.Image:
        """Tile `index` (0 <= index < n_tiles) as the 8-bit RGB image it was before normalisation, exactly.

        Raises IndexError.
        """
        if not 0 <= index < self.n_tiles:
            raise IndexError(f"tile {index} of {self.n_tiles}")
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
        values = np.rint((self.pixels[index] * std + mean) * 255).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))

    def for_model(self, max_tiles: int) -> TiledImage:
        """The same image for a model that takes max_tiles tiles, which must be enough."""
        grid = supported_grids(max_tiles).index((self.rows, self.columns)) + 1
        if (self.max_tiles, self.aspect_ratio_id) == (max_tiles, grid):
            return self
        pixels = np.zeros((max_tiles, *self.pixels.shape[1:]), np.float32)
        pixels[: self.n_tiles] = self.pixels[: self.n_tiles]
        pixels.flags.writeable = False
        return replace(self, pixels=pixels, aspect_ratio_id=grid, max_tiles=max_tiles)

    def _repr_html_(self) -> str:
        """For notebooks: the tiles on their grid."""
        tiles = [data_url(to_jpeg(self.tile_picture(index), 2 * _SHOWN)) for index in range(self.n_tiles)]
        size = "{} x {}".format
        facts = {
            "image": size(*self.image_size),
            "resized to": size(*self.resized_size),
            "tiles": f"{self.rows} x {self.columns} of {size(self.tile_size, self.tile_size)}",
            "aspect_ratio_id": self.aspect_ratio_id,
        }
        return card("TiledImage", facts, images=tiles, columns=self.columns, side=_SHOWN)

    def __repr__(self) -> str:
        (w, h), (rw, rh) = self.image_size, self.resized_size
        return f"TiledImage({w}x{h} -> {rw}x{rh} in {self.rows}x{self.columns} tiles of {self.tile_size})"


def preprocess_image(
    image: ImageSource,
    *,
    tile_size: int = TILE_SIZE,
    max_tiles: int = MAX_TILES,
    model_tiles: int | None = None,
    max_pixels: int | None = None,
    allow_truncated: bool = False,
) -> TiledImage:
    """Cut an image into normalised tiles.

    image:       anything that `load_image` takes
    tile_size:   side of a tile in pixels (the model's vision.image_size)
    max_tiles:   most tiles this image may have
    model_tiles: most tiles that the model knows (its vision.max_num_tiles): its numbers of tile grids depend
                 on it; None: max_tiles
    max_pixels, allow_truncated: as in `load_image`

    Raises ImageError for an image that cannot be used, RequestError for a tile_size, max_tiles or
    model_tiles below 1.
    """
    tile_size = checked("tile_size", Whole(1), tile_size)
    max_tiles = checked("max_tiles", Whole(1), max_tiles)
    model_tiles = checked("model_tiles", Whole(1), model_tiles, or_none=True) or max_tiles
    max_tiles = min(max_tiles, model_tiles)
    rgb = load_image(image, max_pixels=max_pixels, allow_truncated=allow_truncated)

    width, height = rgb.size
    rows, columns = choose_grid(width, height, tile_size, max_tiles)
    resized_size = fit_size(width, height, columns * tile_size, rows * tile_size, tile_size)
    resized = rgb.resize(resized_size, Image.Resampling.BILINEAR)

    pixels = np.empty((max_tiles, 3, tile_size, tile_size), np.float32)
    pixels[rows * columns :] = 0
    for channel, band in enumerate(resized.split()):
        plane = np.asarray(band)  # uint8 [resized height, resized width]
        for index in range(rows * columns):
            top, left = index // columns * tile_size, index % columns * tile_size
            part = plane[top : top + tile_size, left : left + tile_size]
            h, w = part.shape
            out = pixels[index, channel]
            # The reference multiplies by 1/255 in float64, then rounds to float32: the same for 0..255.
            np.divide(part, np.float32(255), out=out[:h, :w], dtype=np.float32)
            out[h:] = 0
            out[:h, w:] = 0
            out -= np.float32(IMAGE_MEAN[channel])
            out /= np.float32(IMAGE_STD[channel])
    pixels.flags.writeable = False  # sha256 is remembered

    return TiledImage(
        pixels=pixels,
        rows=rows,
        columns=columns,
        aspect_ratio_id=supported_grids(model_tiles).index((rows, columns)) + 1,
        image_size=(width, height),
        resized_size=resized_size,
        tile_size=tile_size,
        max_tiles=max_tiles,
    )


@lru_cache(maxsize=16)
def supported_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns) of at most max_tiles tiles, in the order that aspect_ratio_id counts (from 1)."""
    return tuple(
        (rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)
    )


def choose_grid(width: int, height: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The (rows, columns) that an image of width x height pixels gets.

    The least enlargement if any grid holds the whole image, else the least reduction; of equals the fewest
    tiles, then the first in `supported_grids`.
    """
    scales = {
        (rows, columns): min(rows * tile_size / height, columns * tile_size / width)
        for rows, columns in supported_grids(max_tiles)
    }
    best = min((s for s in scales.values() if s >= 1), default=max(scales.values()))
    return min((grid for grid, s in scales.items() if s == best), key=lambda grid: grid[0] * grid[1])


def fit_size(
    width: int, height: int, canvas_width: int, canvas_height: int, tile_size: int
) -> tuple[int, int]:
    """(width, height) to resize an image to: inside the canvas, no longer than needed, aspect ratio kept.

    An image is enlarged until a side fills one tile, and reduced until both sides fit the canvas. All in
    pixels.
    """
    target_width = min(max(width, tile_size), canvas_width)
    target_height = min(max(height, tile_size), canvas_height)
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        return target_width, min(max(math.floor(height * scale_w), 1), target_height)
    return min(max(math.floor(width * scale_h), 1), target_width), target_height
