"""Bit for bit against transformers' MllamaImageProcessor; needs the extra `parity`. Run by path."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocess_cases import GRID_SIZES, MODES, MODES_OF_OUR_OWN, make_image, pattern

from mllama_gguf.vision.loading import load_image
from mllama_gguf.vision.preprocess import preprocess_image

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def check(ours: Any, image: Image.Image, tile_size: int, max_tiles: int) -> int:
    """What we make of `ours` is what the reference makes of `image`; returns the aspect_ratio_id."""
    processor = MllamaImageProcessor(
        size={"height": tile_size, "width": tile_size},
        max_image_tiles=max_tiles,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    wanted = processor(image)
    tiled = preprocess_image(ours, tile_size=tile_size, max_tiles=max_tiles)
    pixels = wanted["pixel_values"][0, 0]
    where = f"{image.mode} {image.size} tile {tile_size} max {max_tiles}"
    assert tiled.aspect_ratio_id == wanted["aspect_ratio_ids"][0, 0], where
    assert tiled.n_tiles == wanted["num_tiles"][0][0] == wanted["aspect_ratio_mask"][0, 0].sum(), where
    assert pixels.dtype == tiled.pixels.dtype == np.float32
    assert pixels.tobytes() == tiled.pixels.tobytes(), where
    return tiled.aspect_ratio_id


def random_size(rng: random.Random) -> tuple[int, int]:
    """Log-uniform sides, so that every shape from a dot to a ribbon occurs, at most 2 megapixels."""
    while True:
        width, height = (round(2 ** rng.uniform(0, 12.55)) for _ in range(2))
        if width * height <= 2_000_000:
            return width, height


def test_version() -> None:
    assert transformers.__version__ == "4.52.4"


@pytest.mark.parametrize("tile_size", [560, 448, 84, 30, 7])
def test_random_sizes(tile_size: int) -> None:
    rng = random.Random(tile_size)
    sizes = [random_size(rng) for _ in range(30 if tile_size > 400 else 150)]
    seen = set()
    for seed, (width, height) in enumerate(sizes):
        image = pattern(width, height, 3, seed)
        seen.add(check(image, Image.fromarray(image), tile_size, 4))
    if tile_size < 400:
        assert seen == set(range(1, 9))


@pytest.mark.parametrize("tile_size", [560, 84])
def test_extreme_sizes(tile_size: int) -> None:
    for size in ((1, 1), (6000, 40), (40, 6000), (6000, 1), (1, 6000), (2, 1), (1, 2), (5999, 39)):
        image = pattern(*size, 3)
        check(image, Image.fromarray(image), tile_size, 4)


@pytest.mark.parametrize("tile_size", [560, 84])
def test_sizes_next_to_a_tile_edge(tile_size: int) -> None:
    for columns, rows in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 3)):
        for dw, dh in ((-1, 0), (0, 0), (0, 1), (1, -1)) if tile_size == 560 else np.ndindex(3, 3):
            size = (columns * tile_size + dw, rows * tile_size + dh)
            image = pattern(*size, 3)
            check(image, Image.fromarray(image), tile_size, 4)


def test_all_eight_grids_of_the_real_size() -> None:
    seen = []
    for width, height in GRID_SIZES.values():
        image = pattern(round(width * 560), round(height * 560), 3)
        seen.append(check(image, Image.fromarray(image), 560, 4))
    assert seen == list(range(1, 9))


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 5, 6, 7, 8, 9, 12, 16])
def test_other_tile_counts(max_tiles: int) -> None:
    rng = random.Random(max_tiles)
    for seed in range(30):
        width, height = random_size(rng)
        image = pattern(min(width, 1500), min(height, 1500), 3, seed)
        check(image, Image.fromarray(image), 28, max_tiles)


@pytest.mark.parametrize("mode", [m for m in MODES if m not in MODES_OF_OUR_OWN])
def test_modes(mode: str) -> None:
    for seed, size in enumerate([(75, 53), (256, 256), (3, 200), (1, 1)]):
        image = make_image(mode, *size, seed)
        check(image, image.copy(), 56, 4)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "RGBa", "PA", "P+alphas", "CMYK", "YCbCr", "HSV"])
def test_every_alpha_and_noise(mode: str) -> None:
    """Unscaled noise (one tile of the image's size), so that the conversion itself is compared."""
    noise = make_image(mode, 256, 256)
    if not mode.startswith("P"):
        bands = len(noise.getbands())
        noise = Image.frombytes(mode, (256, 256), np.random.default_rng(5).bytes(256 * 256 * bands))
    check(noise, noise.copy(), 256, 1)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "P+transparency", "P+alphas", "RGB", "RGB+transparency", "RGBA"]
)
def test_files(format: str, mode: str, tmp_path: Path) -> None:
    """The reference is given what Pillow opens."""
    path = tmp_path / "picture"
    try:
        image = make_image(mode, 90, 40)
        image.save(path, format, **({"lossless": True} if format == "WEBP" else {}))
    except OSError:  # a format without this mode
        assert format in ("BMP", "JPEG", "WEBP"), (format, mode)
        return
    check(path, Image.open(path), 56, 4)


def test_exif_as_the_library_of_the_reference_applies_it() -> None:
    from transformers.image_utils import load_image as reference_load_image

    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = orientation
        file = io.BytesIO()
        make_image("RGB", 90, 40).save(file, "JPEG", exif=tags)
        wanted = reference_load_image(Image.open(file))
        assert load_image(file.getvalue()).tobytes() == wanted.tobytes()
        check(file, wanted, 56, 4)


@pytest.mark.parametrize("max_tiles", [1, 2, 3])
def test_fewer_tiles_than_the_model_knows(max_tiles: int) -> None:
    """The pixels of a processor for fewer tiles, with the number that the model of four gives to the grid."""
    sizes = {"size": {"height": 28, "width": 28}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    four = MllamaImageProcessor(max_image_tiles=4, **sizes)
    processor = MllamaImageProcessor(max_image_tiles=max_tiles, **sizes)
    rng = random.Random(max_tiles)
    seen = set()
    for seed in range(60):
        width, height = random_size(rng)
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        wanted = processor(Image.fromarray(image))
        tiled = preprocess_image(image, tile_size=28, max_tiles=max_tiles, model_tiles=4)
        assert wanted["pixel_values"][0, 0].tobytes() == tiled.pixels.tobytes()
        # An image of just that shape, for the model of four.
        exact = Image.new("RGB", (tiled.columns * 28, tiled.rows * 28))
        assert tiled.aspect_ratio_id == four(exact)["aspect_ratio_ids"][0, 0]
        seen.add(tiled.aspect_ratio_id)
    assert len(seen) == {1: 1, 2: 3, 3: 5}[max_tiles]
