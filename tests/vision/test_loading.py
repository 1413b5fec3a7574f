"""What people hand in as an image, and files that viewers show though something is wrong with them."""

from __future__ import annotations

import base64
import io
import os
import struct
import urllib.parse
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, TiffImagePlugin, TiffTags
from preprocess_cases import make_image, pattern
from tiffs import make_tiff, ramp

from mllama_gguf.errors import ImageError, RequestError
from mllama_gguf.vision.decoding import MAX_PIXELS_VARIABLE
from mllama_gguf.vision.loading import load_image
from mllama_gguf.vision.preprocess import preprocess_image

IMAGE = pattern(60, 40, 3)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PNG = encode(Image.fromarray(IMAGE), "PNG")
BASE64 = base64.b64encode(PNG).decode()


def rgb(source: Any, **options: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(load_image(source, **options))


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 500, message
    return message


def chunk(kind: bytes, data: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def with_chunk(*chunks: bytes) -> bytes:
    """The PNG with chunks behind its head."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


# --- where it comes from ----------------------------------------------------------------------------------


def test_paths_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a b+%41#?é.png"
    path.write_bytes(PNG)
    quoted = urllib.parse.quote(str(path))
    for source in (
        f"file://{quoted}",
        f"file://localhost{quoted}",
        f"FILE://{quoted}",
        f"file:{quoted}",
        f" {path}\n",
        "~/" + path.name,
        Path("~") / path.name,
        os.fsencode(path) and str(path),
    ):
        np.testing.assert_array_equal(rgb(source), IMAGE, err_msg=str(source))
    assert "another machine (server)" in error_of("file://server/a.png")
    assert "names no file" in error_of("file://")
    assert "not a usable" in error_of("file:///a%00b.png")
    assert "no such file" in error_of("file:///none%20here.png")
    assert "it is a device, not a file" in error_of("/dev/zero")


def test_a_name_that_looks_like_something_else_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~", BASE64[:64].replace("/", "_"), " blank.png", "~user.png"):
        Path(name).write_bytes(PNG)
        np.testing.assert_array_equal(rgb(name), IMAGE, err_msg=name)


def test_base64() -> None:
    safe = BASE64.replace("+", "-").replace("/", "_")
    lines = "\r\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76))
    for name, text in {
        "bare": BASE64,
        "URL-safe": safe,
        "no padding": BASE64.rstrip("="),
        "lines": lines,
        "lines as blanks": lines.replace("\r\n", " "),
        "leading blank": "  " + BASE64,
        "plus as blank": BASE64.replace("+", " "),
        "one prefix": "data:image/png;base64," + BASE64,
        "blank before the prefix": "\n data:image/png;base64," + BASE64,
        "two prefixes": "data:image/png;base64,data:image/png;base64," + BASE64,
        "prefix and URL-safe": "data:image/png;base64," + safe,
        "prefix and blanks": "data:image/png;base64," + BASE64.replace("+", " "),
        "quoted": "data:image/png;base64," + urllib.parse.quote(BASE64),
    }.items():
        np.testing.assert_array_equal(rgb(text), IMAGE, err_msg=name)
        np.testing.assert_array_equal(rgb(text.encode()), IMAGE, err_msg=name)
    assert "+" in BASE64 and "/" in BASE64  # else this tests little


def test_errors_never_hold_the_image() -> None:
    broken = BASE64[:400] + "*" + BASE64[400:]
    for source in (broken, broken * 40, "data:image/png;base64," + broken, BASE64[8:], "/9j/" + "A" * 3000):
        message = error_of(source)
        assert BASE64[20:60] not in message and "AAAAAAAA" not in message
    assert "neither a path nor base64" in error_of(broken)


def test_addresses_and_empty_texts() -> None:
    for address in ("https://x/a.png", "ftp://x/a.png", "s3://bucket/a.png", "blob:https://x/1"):
        assert error_of(address).startswith(f"{address}: images are not fetched from ")
    for empty in ("", " ", "\n"):
        assert error_of(empty) == "an empty text is not a path of an image"


def test_things_that_can_only_be_read() -> None:
    class Body:
        """As the body of an HTTP reply: no seekable(), no name."""

        def __init__(self, data: Any) -> None:
            self.data = data

        def read(self) -> Any:
            return self.data

    for data in (PNG, bytearray(PNG), memoryview(PNG)):
        np.testing.assert_array_equal(rgb(Body(data)), IMAGE)
    assert "gave str" in error_of(Body("text"))
    assert "gave NoneType" in error_of(Body(None))


# --- what is named --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x --><svg/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"  <html lang=en>", "an HTML page"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\xff\x0a\x00\x10", "JPEG XL"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
        (b"PK\x03\x04", "a compressed file"),
        (b"GGUF\3\0\0\0", "a GGUF model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'{"error": "not found"}', "a JSON document"),
        (b"II\xbc\x01\x20\0\0\0", "JPEG XR"),
        (b"MM\0\x2b\0\x08\0\0", "a BigTIFF"),
        (b"\x0a\5\1\x08", "not read (PCX)"),
        (b"qoif\0\0\0\1", "not read (QOI)"),
        (b"P7\nWIDTH 1\n", "not read (PAM or PFM)"),
        (b"\xff\xd8\xff\xf7\0\x0b\x08", "JPEG-LS"),
        (b"\xff\xd8\xff\xc0\0\x0b\x0c" + bytes(9), "a JPEG of 12 bits"),
        (b"\xff\xd8\xff\xc3\0\x0b\x10" + bytes(9), "a JPEG of 16 bits"),
        (b"\xff\xd8\xff\xc5\0\x0b\x08" + bytes(9), "a hierarchical JPEG"),
        (b"BM" + struct.pack("<IIIIiiHHI", 70, 0, 54, 40, 1, 1, 1, 7, 0) + bytes(40), "is not supported"),
    ],
)
def test_files_that_are_no_images_are_named(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert error_of(path).startswith(f"{path}: ") and words in error_of(path)


def test_unsupported_tiffs_are_named() -> None:
    message = error_of(make_tiff(ramp(8, 3) / 255, 32, 2, sample_format=3))
    assert "RGB, float 32 bits a sample" in message
    assert "L*a*b*" in error_of(make_tiff(ramp(8, 3), 8, 8, planar=2))
    for compression, words in ((34712, "JPEG 2000 compression"), (50002, "JPEG XL"), (60000, "60000")):
        assert words in error_of(make_tiff(ramp(8, 3), 8, 2, compression=compression))


@pytest.mark.parametrize(
    "tags",
    [{50706: (TiffTags.BYTE, 1)}, {254: (TiffTags.LONG, 1), 330: (TiffTags.LONG, (8, 8))}],
)
def test_the_preview_of_a_raw_file_is_not_taken(tags: dict[int, tuple[int, Any]]) -> None:
    """DNG, and what else begins with a reduced page and has others below it."""
    more = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, (kind, value) in tags.items():
        more.tagtype[tag] = kind
        more[tag] = value
    data = encode(make_image("RGB", 16, 12), "TIFF", tiffinfo=more)
    assert "a camera's raw file" in error_of(data)
    alone = TiffImagePlugin.ImageFileDirectory_v2()
    alone[254] = 1
    assert load_image(encode(make_image("RGB", 16, 12), "TIFF", tiffinfo=alone)).size == (16, 12)


# --- what is mended ---------------------------------------------------------------------------------------


def test_chunks_that_hold_no_pixels_are_passed_over() -> None:
    text = os.urandom(1000) * 3000
    bomb = zlib.compress(bytes(200_000_000), 9)
    for name, data in {
        "3 MB of text": with_chunk(chunk(b"tEXt", b"prompt\0" + text)),
        "3 MB of packed text": with_chunk(chunk(b"zTXt", b"prompt\0\0" + zlib.compress(text))),
        "3 MB of UTF-8": with_chunk(chunk(b"iTXt", b"workflow\0\0\0\0\0" + b"x" * 3_000_000)),
        "a profile of 30 MB": with_chunk(chunk(b"iCCP", b"p\0\0" + zlib.compress(os.urandom(1000) * 30_000))),
        "bombs": with_chunk(
            chunk(b"zTXt", b"a\0\0" + bomb),
            chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
            chunk(b"iCCP", b"a\0\0" + bomb),
        ),
        "an orientation bomb": with_chunk(chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb)),
        "wrong checksums": with_chunk(
            chunk(b"pHYs", bytes(9), 1),
            chunk(b"iCCP", b"p\0\0x", 1),
            chunk(b"tEXt", b"a\0b", 1),
            chunk(b"eXIf", b"x", 1),
        ),
        "damaged content": with_chunk(chunk(b"iCCP", b"junk"), chunk(b"cHRM", b"1"), chunk(b"gAMA", b"")),
        "unknown chunk": with_chunk(chunk(b"abCd", b"junk")),
        "no end chunk": PNG[:-12],
        "a cut end chunk": PNG[:-6],
        "something behind the end": PNG + b"junk" * 100,
    }.items():
        np.testing.assert_array_equal(rgb(data), IMAGE, err_msg=name)


def test_damaged_pixels_are_refused_or_filled() -> None:
    for damaged in (PNG[:-1000], PNG[:200], with_chunk(chunk(b"IDAT", b"junk"))):
        assert "corrupt or truncated" in error_of(damaged)
        assert rgb(damaged, allow_truncated=True).shape == IMAGE.shape
    position = PNG.index(b"IDAT") + 2000
    wrong = PNG[:position] + bytes([PNG[position] ^ 1]) + PNG[position + 1 :]
    error_of(wrong)
    half = rgb(PNG[: len(PNG) // 2], allow_truncated=True)
    np.testing.assert_array_equal(half[:10], IMAGE[:10])
    assert not half[-5:].any()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end(mode: str, options: dict[str, Any]) -> None:
    data = encode(make_image(mode, 90, 70), "JPEG", **options)
    whole = rgb(data)
    for ending in (data[:-2], data[:-1], data[:-2] + b"\xff", data + b"trailer" * 50, data + bytes(50)):
        np.testing.assert_array_equal(rgb(ending), whole)
    for cut in (3, 20, len(data) // 4):
        assert "corrupt or truncated" in error_of(data[:-cut])
        assert rgb(data[:-cut], allow_truncated=True).shape == whole.shape


def test_a_progressive_jpeg_that_ends_between_two_scans() -> None:
    data = encode(make_image("RGB", 90, 70), "JPEG", progressive=True)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 3
    tables = data.rfind(b"\xff\xc4", 0, scans[-1])
    for cut in (tables, scans[-1]):
        assert "truncated" in error_of(data[:cut])
        assert load_image(data[:cut], allow_truncated=True).size == (90, 70)


def test_truncated_files_of_other_kinds_can_be_allowed() -> None:
    for format in ("BMP", "TIFF", "PPM"):
        data = encode(make_image("RGB", 90, 70), format)
        cut = data[: -len(data) // 4]
        if format == "TIFF":  # Pillow writes its tags before the pixels
            assert data[4:8] == b"\x08\0\0\0"
        error_of(cut)
        assert load_image(cut, allow_truncated=True).size == (90, 70), format


def test_heic() -> None:
    import pillow_heif

    flat = np.full((64, 96, 3), (200, 80, 40), np.uint8)
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(flat)).save(file, quality=95)
    assert np.abs(rgb(file.getvalue()).astype(int) - flat).max() <= 4


def test_heic_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    assert "pip install 'mllama_gguf[heif]'" in error_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


# --- pixels -----------------------------------------------------------------------------------------------


def test_tiffs_that_pillow_alone_reads_wrongly() -> None:
    """Against the samples themselves; tests/judge compares all kinds with another decoder."""
    for order in "<>":
        grey = ramp(16, 1)
        white_is_zero = make_tiff(65535 - grey, 16, 0, order=order)
        if order == "<":
            np.testing.assert_array_equal(rgb(white_is_zero)[..., 0], np.round(grey[..., 0] / 257))
        colours = ramp(16, 3)
        for compression in (1, 8):
            got = rgb(make_tiff(colours, 16, 2, order=order, planar=2, compression=compression))
            np.testing.assert_array_equal(got, colours >> 8)
        turned = rgb(make_tiff(colours, 16, 2, order=order, planar=2, orientation=6))
        np.testing.assert_array_equal(turned, np.rot90(colours >> 8, -1))
        palette = np.arange(768) * 7 % 256
        got = rgb(make_tiff(ramp(8, 1), 8, 3, order=order, palette=palette.tolist()))
        np.testing.assert_array_equal(got, palette.reshape(3, 256).T[ramp(8, 1)[..., 0]])
    twelve = rgb(make_tiff(ramp(12, 1, width=24), 12, 1))
    np.testing.assert_array_equal(twelve[..., 0], np.round(ramp(12, 1, width=24)[..., 0] * 255 / 4095))


# --- limits -----------------------------------------------------------------------------------------------


def big_png(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_more_pixels_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = big_png(16320, 12240)  # a telephone of 200 megapixels
    before = Image.MAX_IMAGE_PIXELS
    message = error_of(data)
    assert "max_pixels" in message and MAX_PIXELS_VARIABLE in message
    tiled = preprocess_image(data, max_pixels=200_000_000, tile_size=56)
    assert tiled.image_size == (16320, 12240)
    assert before == Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "1000")
    assert "the limit is 1000 pixels" in error_of(PNG)
    np.testing.assert_array_equal(rgb(PNG, max_pixels=100_000), IMAGE)
    for wrong in ("many", "-1", "1e9", "0", "9" * 40):
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, wrong)
        with pytest.raises(RequestError, match=MAX_PIXELS_VARIABLE):
            load_image(PNG)
