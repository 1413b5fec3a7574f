"""Preprocessing against stored hashes of the reference, and everything that can be wrong with an image."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import struct
import sys
import threading
import time
import urllib.parse
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess_cases import GOLDEN, GRID_SIZES, MODES, golden_cases, golden_hash, make_image, pattern

from mllama_gguf.cli.preprocess import preprocess_command
from mllama_gguf.errors import ImageError, MllamaError
from mllama_gguf.vision.decoding import MAX_PIXELS
from mllama_gguf.vision.loading import load_image
from mllama_gguf.vision.preprocess import (
    IMAGE_MEAN,
    IMAGE_STD,
    choose_grid,
    fit_size,
    preprocess_image,
    supported_grids,
)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    """Every warning in this file is a failure: the package must not let Pillow's through."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    assert image.mode == "RGB"
    return np.asarray(image)


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1 and message.isprintable(), message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


# --- the numbers ----------------------------------------------------------------------------------


def test_golden_file_holds_every_case() -> None:
    stored = [(c["mode"], *c["size"], c["tile_size"], c["max_tiles"]) for c in GOLDEN["cases"]]
    assert stored == golden_cases()
    assert GOLDEN["made"]["transformers"] == "4.52.4"
    assert {
        c["aspect_ratio_id"] for c in GOLDEN["cases"] if c["max_tiles"] == 4 and c["tile_size"] == 560
    } == set(range(1, 9))


@pytest.mark.parametrize(
    "case",
    GOLDEN["cases"],
    ids=lambda c: f"{c['mode']}-{c['size'][0]}x{c['size'][1]}-{c['tile_size']}x{c['max_tiles']}",
)
def test_golden(case: dict[str, Any]) -> None:
    image = make_image(case["mode"], *case["size"])
    tiled = preprocess_image(image, tile_size=case["tile_size"], max_tiles=case["max_tiles"])
    assert tiled.image_size == tuple(case["size"])
    assert (tiled.n_tiles, tiled.aspect_ratio_id) == (case["n_tiles"], case["aspect_ratio_id"])
    assert tiled.sha256 == golden_hash(case)


def test_tiled_image_fields() -> None:
    tiled = preprocess_image(make_image("RGB", 700, 1000))
    assert (tiled.rows, tiled.columns, tiled.n_tiles, tiled.aspect_ratio_id) == (2, 2, 4, 6)
    assert (tiled.image_size, tiled.resized_size, tiled.canvas_size) == (
        (700, 1000),
        (700, 1000),
        (1120, 1120),
    )
    assert (tiled.tile_size, tiled.max_tiles) == (560, 4)
    assert tiled.pixels.shape == (4, 3, 560, 560) and tiled.pixels.dtype == np.float32
    assert tiled.pixels.flags.c_contiguous and not tiled.pixels.flags.writeable
    assert tiled.sha256 == hashlib.sha256(tiled.pixels.astype("<f4").tobytes()).hexdigest()
    assert repr(tiled) == "TiledImage(700x1000 -> 700x1000 in 2x2 tiles of 560)"
    with pytest.raises(AttributeError):
        tiled.rows = 1  # type: ignore[misc]


def test_tiles_are_cut_row_by_row_and_the_rest_is_black_or_zero() -> None:
    image = pattern(150, 90, 3)
    tiled = preprocess_image(image, tile_size=80, max_tiles=5)
    assert (tiled.rows, tiled.columns, tiled.resized_size) == (2, 2, (150, 90))
    canvas = np.zeros((160, 160, 3))
    canvas[:90, :150] = image
    wanted = (canvas / 255 - IMAGE_MEAN) / IMAGE_STD
    for index, (top, left) in enumerate([(0, 0), (0, 80), (80, 0), (80, 80)]):
        tile = wanted[top : top + 80, left : left + 80].transpose(2, 0, 1)
        np.testing.assert_allclose(tiled.pixels[index], tile, atol=1e-6)
        shown = np.asarray(tiled.tile_picture(index))
        np.testing.assert_array_equal(shown, canvas[top : top + 80, left : left + 80])
    assert not tiled.pixels[4].any()
    with pytest.raises(IndexError):
        tiled.tile_picture(4)


def test_every_byte_value_is_exact() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tiled = preprocess_image(np.stack([values] * 3, axis=-1), tile_size=16, max_tiles=1)
    scaled = (values.astype(np.float64) * (1 / 255)).astype(np.float32)
    for channel in range(3):
        wanted = (scaled - np.float32(IMAGE_MEAN[channel])) / np.float32(IMAGE_STD[channel])
        np.testing.assert_array_equal(tiled.pixels[0, channel], wanted)
    np.testing.assert_array_equal(np.asarray(tiled.tile_picture(0)), np.stack([values] * 3, axis=-1))


def test_supported_grids() -> None:
    assert supported_grids(4) == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    assert supported_grids(1) == ((1, 1),)
    for tiles in range(1, 20):
        every = [(r, c) for r in range(1, tiles + 1) for c in range(1, tiles + 1) if r * c <= tiles]
        assert list(supported_grids(tiles)) == every


@pytest.mark.parametrize("grid", GRID_SIZES)
@pytest.mark.parametrize("tile", [14, 84, 560])
def test_all_eight_grids(grid: tuple[int, int], tile: int) -> None:
    width, height = (round(v * tile) for v in GRID_SIZES[grid])
    assert choose_grid(width, height, tile, 4) == grid


def test_grid_of_equal_scales_is_the_smallest_then_the_first() -> None:
    # 1000x560 fits (1,2) at scale 1, and (2,2) as well: the smaller.
    assert choose_grid(1120, 560, 560, 4) == (1, 2)
    assert choose_grid(560, 1120, 560, 4) == (2, 1)
    # 3x3 in tiles of 1, three at most: (1,3) and (3,1) both reduce to a third, but so does (1,1).
    assert choose_grid(3, 3, 1, 3) == (1, 1)
    # Six tiles: (2,3) and (3,2) reduce 30x30 alike, and (2,2) does it with fewer.
    assert choose_grid(30, 30, 10, 6) == (2, 2)


@pytest.mark.parametrize(
    ("size", "canvas", "wanted"),
    [
        ((1, 1), (560, 560), (560, 560)),
        ((6000, 1), (2240, 560), (2240, 1)),  # never 0 high
        ((1, 6000), (560, 2240), (1, 2240)),
        ((600, 300), (1120, 560), (600, 300)),  # fits: left alone
        ((280, 140), (560, 560), (560, 280)),  # small: enlarged until a side fills a tile
        ((1000, 3000), (560, 2240), (560, 1680)),
    ],
)
def test_fit_size(size: tuple[int, int], canvas: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert fit_size(*size, *canvas, 560) == wanted


@pytest.mark.parametrize("bad", [{"tile_size": 0}, {"max_tiles": 0}, {"tile_size": 2.5}, {"max_tiles": True}])
def test_bad_sizes_are_value_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        preprocess_image(pattern(3, 3, 3), **bad)


def test_fast() -> None:
    image = Image.fromarray(pattern(1400, 1400, 3))
    preprocess_image(image)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert preprocess_image(image).n_tiles == 4
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 3  # some 0.025 on a quiet machine; with a loop over pixels it is a minute


# --- where an image comes from -------------------------------------------------------------------


def test_sources_agree(tmp_path: Path) -> None:
    image = pattern(60, 40, 3)
    data = encode(Image.fromarray(image), "PNG")
    path = tmp_path / "pïcture [1].png"
    path.write_bytes(data)
    b64 = base64.b64encode(data).decode()
    moved = io.BytesIO(data)
    moved.read(11)
    sources: dict[str, Any] = {
        "str": str(path),
        "Path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "BytesIO": io.BytesIO(data),
        "BytesIO read before": moved,
        "base64 URI": "data:image/png;base64," + b64,
        "base64 URI, no padding, lines": "DATA:image/png;BASE64,"
        + b64.rstrip("=")[:100]
        + "\n"
        + b64.rstrip("=")[100:],
        "base64 URI, escaped": "data:;base64," + urllib.parse.quote(b64, safe=""),
        "percent URI": "data:image/png;charset=x," + urllib.parse.quote(data),
        "PIL": Image.fromarray(image),
        "PIL, not loaded": Image.open(io.BytesIO(data)),
        "array": image,
        "array, strided": np.repeat(image, 2, axis=1)[:, ::2],
        "array, reversed twice": image[::-1].copy()[::-1],
    }
    for name, source in sources.items():
        np.testing.assert_array_equal(rgb(load_image(source)), image, err_msg=name)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(rgb(load_image(file)), image)
        assert not file.closed


def test_a_stream_that_cannot_seek(tmp_path: Path) -> None:
    image = pattern(20, 10, 3)
    read, write = os.pipe()
    os.write(write, encode(Image.fromarray(image), "PNG"))
    os.close(write)
    with os.fdopen(read, "rb") as file:
        np.testing.assert_array_equal(rgb(load_image(file)), image)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "it is a pipe, not a file" in error_of(fifo)  # nobody waits for a writer


def test_the_callers_image_is_not_changed() -> None:
    image = make_image("P+transparency", 30, 20)
    before, info = image.tobytes(), dict(image.info)
    load_image(image)
    assert (image.mode, image.tobytes(), image.info) == ("P", before, info)


# --- formats and modes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_lossless_formats(format: str, options: dict[str, Any]) -> None:
    image = pattern(70, 50, 3)
    np.testing.assert_array_equal(rgb(load_image(encode(Image.fromarray(image), format, **options))), image)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats(format: str) -> None:
    y, x = np.mgrid[:50, :70]
    image = np.stack([x * 3, y * 5, 255 - x * 3], axis=-1).astype(np.uint8)
    loaded = rgb(load_image(encode(Image.fromarray(image), format, quality=95)))
    assert loaded.shape == image.shape
    assert np.abs(loaded.astype(int) - image).mean() < 3


def test_cmyk_and_grey_jpeg() -> None:
    flat = Image.new("RGB", (32, 32), (200, 30, 60))
    for mode, wanted in (("CMYK", (200, 30, 60)), ("L", (84, 84, 84))):
        got = rgb(load_image(encode(flat.convert(mode), "JPEG", quality=95)))
        assert np.abs(got.astype(int) - wanted).max() <= 4, mode


def test_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (20, 10), c) for c in ("red", "blue", "green")]
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3, format
        assert set(map(tuple, rgb(load_image(data)).reshape(-1, 3).tolist())) == {(255, 0, 0)}, format


def test_transparent_gif_and_palette_png_are_white_behind() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    for format in ("GIF", "PNG"):
        got = rgb(load_image(encode(image, format, transparency=0)))
        assert got[0, 0].tolist() == [255, 255, 255] and got[1, 1].tolist() == [200, 100, 50], format


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    """Against a slow formula where there is one; all of them at least give RGB of the right size."""
    image = make_image(mode, 40, 30, seed=3)
    got = rgb(load_image(image)).astype(int)
    assert got.shape == (30, 40, 3)
    raw = np.asarray(image).astype(np.float64)
    grey = raw[..., None] if raw.ndim == 2 else raw
    if mode == "1":
        wanted, alpha = grey * 255, None
    elif mode in ("L", "RGB", "RGB+transparency"):
        wanted, alpha = grey, None
    elif mode == "RGBX":
        wanted, alpha = grey[..., :3], None
    elif mode == "L+transparency":
        wanted, alpha = grey, (grey != image.info["transparency"]) * 255.0
    elif mode in ("LA", "RGBA"):
        wanted, alpha = grey[..., :-1], grey[..., -1:]
    elif mode in ("La", "RGBa"):  # premultiplied: what shows is colour + white * (1 - alpha)
        wanted, alpha = grey[..., :-1] + 255 - grey[..., -1:], None
    elif mode.startswith("I"):
        wanted, alpha = grey / 257, None
    elif mode == "CMYK":
        wanted, alpha = (255 - grey[..., :3]) * (255 - grey[..., 3:]) / 255, None
    elif mode.startswith("P"):
        rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
        wanted, alpha = rgba[..., :3], rgba[..., 3:]
        if mode != "P":
            assert (alpha < 255).any()
    else:
        return
    if alpha is not None:
        wanted = (wanted * alpha + 255 * (255 - alpha)) / 255
    difference = np.abs(got - wanted)
    assert difference.max() <= (1 if mode not in ("1", "L", "RGB", "RGBX", "P") else 0), difference.max()


def test_sixteen_bit_grey() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    wanted = [0, 0, 1, 1, 128, 254, 255, 255]
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    for source in (
        image,
        encode(image, "PNG"),
        encode(image, "TIFF"),
        Image.fromarray(values.astype(np.int32)),
    ):
        assert rgb(load_image(source))[0].tolist() == [[v] * 3 for v in wanted]
    assert rgb(load_image(b"P5 2 1 65535\n\x01\x00\xff\xff"))[0, :, 0].tolist() == [1, 255]
    assert rgb(load_image(encode(image, "PNG", transparency=257)))[0, :, 0].tolist() == [
        0,
        0,
        1,
        255,
        128,
        254,
        255,
        255,
    ]
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(rgb(load_image(Image.fromarray(every)))[..., 1], np.round(every / 257.0))


def test_refused_modes() -> None:
    assert "mode F" in error_of(Image.new("F", (4, 4)))
    assert "mode F" in error_of(encode(Image.new("F", (4, 4)), "TIFF"))
    for value in (-1, 65536):
        assert "mode I" in error_of(Image.new("I", (4, 4), value))


# --- EXIF -----------------------------------------------------------------------------------------

# How an upright image is stored under each orientation (the inverse of what the tag asks for).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],  # asks for 90 degrees clockwise
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int) -> None:
    upright = np.full((16, 48, 3), 255, np.uint8)
    upright[:8, :16] = (255, 0, 0)
    upright[8:, 32:] = (0, 0, 255)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(stored, format, exif=exif(orientation), **options)
        once = load_image(data)
        np.testing.assert_array_equal(rgb(once), upright, err_msg=format)
        np.testing.assert_array_equal(rgb(load_image(once)), upright, err_msg=f"{format} turned twice")
        np.testing.assert_array_equal(
            rgb(load_image(Image.open(io.BytesIO(data)))), upright, err_msg=f"PIL {format}"
        )
        assert preprocess_image(data, tile_size=16).image_size == (48, 16)
    jpeg = rgb(load_image(encode(stored, "JPEG", exif=exif(orientation), quality=95, subsampling=0)))
    assert np.abs(jpeg.astype(int) - upright).mean() < 3
    palette = encode(stored.quantize(8), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(rgb(load_image(palette)), upright)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_ignored(orientation: int) -> None:
    image = pattern(20, 10, 3)
    data = encode(Image.fromarray(image), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(rgb(load_image(data)), image)


@pytest.mark.parametrize(
    "junk", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_is_ignored(junk: bytes) -> None:
    image = Image.new("RGB", (16, 8), "red")
    for format in ("JPEG", "PNG"):
        assert load_image(encode(image, format, exif=junk)).size == (16, 8), format


# --- what is wrong with an image -----------------------------------------------------------------


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.png") == f"{tmp_path}/none.png: no such file"
    assert error_of(tmp_path).startswith(f"{tmp_path}: is a directory")
    assert "too long" in error_of("x" * 5000)
    assert "not a usable path" in error_of("a\0b")
    assert "a\\nb.png: no such file" in error_of("a\nb.png")
    assert "download it" in error_of("https://example.org/cat.png")
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    assert error_of(empty) == f"{empty}: is empty (0 bytes)"
    text = tmp_path / "text.png"
    text.write_text("not an image at all, only words that somebody named .png")
    assert error_of(text).startswith(f"{text}: not an image that can be read")
    with open(text) as file:
        assert error_of(file) == f"{text}: gave str, not bytes; open it in binary mode ('rb')"


def test_unsupported_sources() -> None:
    assert error_of(b"%PDF-1.4 not an image").startswith("image bytes: a PDF document")
    assert "a PostScript document" in error_of(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )  # would run Ghostscript
    assert error_of(17).startswith("int object: not an image")
    assert error_of(None).startswith("NoneType object")

    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError("the disk\nis gone")

    assert error_of(Broken()) == "file object: cannot be read: the disk is gone"


def test_bad_data_uris() -> None:
    assert error_of("data:image/png").startswith("data URI (image/png): no comma")
    assert "damaged base64" in error_of("data:image/png;base64,@@@@")
    assert error_of("data:image/png;base64,") == "data URI (image/png): is empty (0 bytes)"
    assert error_of("data:,hello").startswith("data URI (no type): not an image")
    assert len(error_of("data:" + "x" * 100_000)) < 400


def test_bad_arrays() -> None:
    good = pattern(5, 4, 3)
    assert "array float64 [4, 5, 3]" in error_of(good / 255) and "255" in error_of(good / 255)
    assert "array int64 [4, 5, 3]" in error_of(good.astype(np.int64))
    assert "np.stack" in error_of(good[..., 0])
    assert "transpose" in error_of(good.transpose(2, 0, 1))
    assert "RGBA" in error_of(pattern(5, 4, 4))
    assert "[2, 4, 5, 3]" in error_of(np.stack([good, good]))
    assert "no pixels (5x0)" in error_of(good[:0])
    assert "no pixels (0x4)" in error_of(good[:, :0])
    assert "no pixels (0x3)" in error_of(Image.new("RGB", (0, 3)))


def test_a_closed_image_is_an_error() -> None:
    image = Image.open(io.BytesIO(encode(make_image("RGB", 8, 8), "PNG")))
    image.close()
    assert error_of(image).startswith("PIL image: ")


@pytest.mark.parametrize("size", [(60000, 60000), (13400, 13400), (178_956_971, 1), (1, 2_000_000)])
def test_bombs_are_refused_before_decoding(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    data = png_header(*size)
    assert error_of(data).startswith("image bytes: too large")
    # With Pillow's own limit out of the way ours must still hold.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert f"too large ({size[0]}x{size[1]})" in error_of(data)


def test_own_limit_and_pillows_setting() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert before is not None
    data = encode(make_image("RGB", 100, 50), "PNG")
    assert load_image(data, max_pixels=5000).size == (100, 50)
    assert "too large (100x50): the limit is 4999 pixels" in error_of(data, max_pixels=4999)
    assert "4999" in error_of(Image.open(io.BytesIO(data)), max_pixels=4999)
    assert "4999" in error_of(pattern(100, 50, 3), max_pixels=4999)
    # Between Pillow's warning and its error: refused for being truncated, and no warning (they raise here).
    assert "truncated" in error_of(png_header(10_000, 9_000))
    assert before < 10_000 * 9_000 < 2 * before == MAX_PIXELS
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_stricter_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = error_of(encode(make_image("RGB", 100, 50), "PNG"))
    assert message.startswith("image bytes: too large: Image size (5000 pixels)")


FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("RGB", "PNG", {}),
    "png alpha": ("RGBA", "PNG", {}),
    "jpeg": ("RGB", "JPEG", {"quality": 90}),
    "jpeg progressive": ("RGB", "JPEG", {"progressive": True}),
    "webp": ("RGB", "WEBP", {"lossless": True}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "bmp palette": ("P", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "tiff zip": ("RGB", "TIFF", {"compression": "tiff_adobe_deflate"}),
}


@pytest.mark.parametrize("name", FILES)
def test_truncated(name: str, tmp_path: Path) -> None:
    """Cut anywhere: an error, or the whole image (when only a trailer is missing). Never half an image."""
    mode, format, options = FILES[name]
    data = encode(make_image(mode, 47, 31), format, **options)
    whole = rgb(load_image(data))
    refused = 0
    cuts = range(0, len(data), max(1, len(data) // 150))
    for cut in cuts:
        try:
            got = rgb(load_image(data[:cut]))
        except ImageError as e:
            assert str(e).startswith("image bytes: ") and str(e).isprintable()
            refused += 1
        else:
            np.testing.assert_array_equal(got, whole, err_msg=f"cut at {cut} of {len(data)}")
    assert refused >= 0.97 * len(cuts)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    assert error_of(path).startswith(f"{path}: ")


@pytest.mark.parametrize("name", FILES)
def test_mutated(name: str) -> None:
    """Any damage gives an image or an ImageError: no other exception, no warning."""
    mode, format, options = FILES[name]
    data = encode(make_image(mode, 23, 17), format, **options)
    rng = random.Random(name)
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            position = rng.randrange(min(len(data), rng.choice((40, 200, 10**6))))
            broken[position] = rng.choice((0, 255, 128, rng.randrange(256)))
        try:
            image = load_image(bytes(broken), max_pixels=100_000)
        except ImageError as e:
            assert str(e).isprintable() and str(e).startswith("image bytes: ")
        else:
            assert image.mode == "RGB"


def test_errors_are_what_they_say() -> None:
    assert issubclass(ImageError, ValueError) and issubclass(ImageError, MllamaError)


def test_threads_leave_the_warning_filters_alone() -> None:
    data = encode(make_image("P+alphas", 60, 40), "PNG")
    wanted = rgb(load_image(data)).tobytes()
    before = list(warnings.filters)
    right: list[bool] = []

    def work() -> None:
        for _ in range(20):
            right.append(load_image(data).tobytes() == wanted)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80
    assert list(warnings.filters) == before


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "wide [x].png"
    make_image("RGB", 150, 60).save(path)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(preprocess_command, [str(a) for a in arguments])


def test_command_text(image_file: Path) -> None:
    result = run(image_file, "--tile-size", 80)
    assert result.exit_code == 0, result.output
    tiled = preprocess_image(image_file, tile_size=80)
    lines = {line[:15].strip(): line[17:] for line in result.stdout.splitlines()}
    assert lines["image"] == str(image_file)
    assert lines["image size"].startswith("150 x 60 ") and lines["canvas"] == "160 x 80"
    assert lines["grid"].startswith("1 x 2 ") and lines["aspect_ratio_id"] == "2"
    assert lines["sha256"] == tiled.sha256
    for index in range(2):
        shown = [float(v) for v in lines[f"tile {index} (0,{index})"].split()]
        np.testing.assert_allclose(shown, tiled.pixels[index].ravel()[:10], atol=1e-6)
    assert len(lines) == 9  # nothing wrapped, unused tiles not shown


def test_command_json(image_file: Path) -> None:
    result = run(image_file, image_file, "--json", "--tile-size", 80, "--max-tiles", 5)
    assert result.exit_code == 0, result.output
    first, second = map(json.loads, result.stdout.splitlines())
    tiled = preprocess_image(image_file, tile_size=80, max_tiles=5)
    assert first == second
    assert first["image_size"] == [150, 60] and first["shape"] == [5, 3, 80, 80] and first["n_tiles"] == 2
    assert first["sha256"] == tiled.sha256
    np.testing.assert_array_equal(
        np.array(first["first_values"], np.float32), tiled.pixels[:2].reshape(2, -1)[:, :10]
    )


def test_command_files(image_file: Path, tmp_path: Path) -> None:
    out, tiles = tmp_path / "pixels.npy", tmp_path / "new" / "tiles"
    result = run(image_file, "--tile-size", 80, "--out", out, "--png", tiles)
    assert result.exit_code == 0, result.output
    tiled = preprocess_image(image_file, tile_size=80)
    np.testing.assert_array_equal(np.load(out), tiled.pixels)
    assert sorted(p.name for p in tiles.iterdir()) == [
        "wide [x]_0_0.png",
        "wide [x]_0_1.png",
        "wide [x]_grid.png",
    ]
    np.testing.assert_array_equal(
        rgb(Image.open(tiles / "wide [x]_0_1.png")), np.asarray(tiled.tile_picture(1))
    )
    result = run(image_file, image_file, "--tile-size", 80, "--png", tiles, "--overwrite")
    assert result.exit_code == 0 and len(list(tiles.iterdir())) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "new",
        "pixels.npy",
        "wide [x].png",
    ]  # no temporary file left


def test_command_errors(image_file: Path, tmp_path: Path) -> None:
    for arguments, code, words in (
        (["none.png"], 1, "none.png: no such file"),
        ([image_file, "--out", tmp_path / "no" / "x.npy"], 1, "x.npy: there is no folder"),
        ([image_file, "--png", image_file / "x"], 1, "is a file, not a folder"),
        ([image_file, image_file, "--out", "x.npy"], 2, "one image"),
        ([image_file, "--tile-size", "0"], 2, "0"),
        ([], 2, "Missing argument"),
    ):
        result = run(*arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert words in result.stderr
        if code == 1:
            assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1
            assert not result.stdout


def test_a_failed_write_leaves_the_old_file(
    image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pixels.npy"
    np.save(out, np.zeros((1, 3, 2, 2), np.float32))
    old = out.read_bytes()

    def full(file: Any, header: Any) -> None:
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    result = run(image_file, "--out", out, "--overwrite")
    assert result.exit_code == 1 and "the disk is full" in result.stderr
    assert out.read_bytes() == old and len(list(tmp_path.iterdir())) == 2


def gguf_head(**keys: int) -> bytes:
    """A GGUF of keys only, all uint32."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    pairs = b"".join(text(f"mllama.vision.{k}") + struct.pack("<II", 4, v) for k, v in keys.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + pairs


def test_command_takes_the_sizes_from_a_model(image_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "mmproj.gguf"
    model.write_bytes(gguf_head(image_size=84, max_num_tiles=3))
    for options, shape in (
        ([], [3, 3, 84, 84]),
        (["--max-tiles", 2], [2, 3, 84, 84]),
        (["--tile-size", 20], [3, 3, 20, 20]),
    ):
        result = run(image_file, "--json", "-m", model, *options)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["shape"] == shape
    for data, words in (
        (gguf_head(block_count=3), "holds no vision encoder"),
        (gguf_head(image_size=84), "max_num_tiles None"),
        (gguf_head(image_size=0, max_num_tiles=4), "image_size 0"),
        (gguf_head(image_size=84, max_num_tiles=4)[:-3], "truncated"),
        (b"not a model", "not a GGUF file"),
    ):
        model.write_bytes(data)
        result = run(image_file, "-m", model)
        assert result.exit_code == 1 and words in result.stderr, (words, result.output)
        assert result.stderr.startswith(f"Error: {model}: ") and len(result.stderr.splitlines()) == 1
    assert run(image_file, "-m", tmp_path / "none.gguf").exit_code == 1
