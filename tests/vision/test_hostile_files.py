"""Small files that cost much: time or memory that their size does not explain."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib

import pytest
from PIL import Image

from mllama_gguf.errors import ImageError
from mllama_gguf.vision.loading import load_image
from mllama_gguf.vision.repair import jpeg_heads, jpeg_scans_complete
from mllama_gguf.vision.signatures import describe_signature
from mllama_gguf.vision.thumbnail import thumbnail

SECONDS = 5.0  # of the processor; the faults took minutes


def encode(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


# --- time -------------------------------------------------------------------------------------------------

SOS = b"\xff\xda\0\x08\1\1\0\x3f\0\0"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xff" * 200_000 + b"\0",
        b"\xff\xd8\xff" + b"\xff" * 200_000,
        b"\xff\xd8\xff" + (b"\xff" * 1000 + b"\0") * 2000,
        b"\xff\xd8" + SOS * 500_000,
        b"<!---->" * 29 + b"x",
        b"<!-- -->" * 29 + b"<!--",
        b"A" + b" " * 200_000 + b"!",
        b"data:," * 100_000,
    ],
    ids=[
        "fill bytes",
        "only fill bytes",
        "runs",
        "scans",
        "comments",
        "an open comment",
        "blanks",
        "data URIs",
    ],
)
def test_what_is_no_image_is_refused_soon(data: bytes) -> None:
    before = time.process_time()
    for source in (data, data.decode("latin-1")):
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert len(str(caught.value)) < 500
    assert time.process_time() - before < SECONDS


def test_heads_after_fill_bytes_are_found() -> None:
    data = b"\xff\xd8" + b"\xff" * 1000 + b"\xe0\0\x04ab" + b"\xff\0" * 9 + b"\xff\xff\xc0\0\x03c\xff\xd9"
    assert list(jpeg_heads(data)) == [(0xE0, b"ab"), (0xC0, b"c")]
    assert list(jpeg_heads(b"\xff\xd8" + b"\xff" * 1000 + b"\0\xff\0")) == []
    assert list(jpeg_heads(b"\xff\xd8\xff\xe0\0\x03\xff\xff\xe1\0\x02")) == [(0xE0, b"\xff"), (0xE1, b"")]


def test_scans_bring_all_coefficients_or_not() -> None:
    def scan(component: int, first: int, last: int, bits: int) -> bytes:
        return b"\xff\xda\0\x08\1" + bytes([component, 0, first, last, bits])

    head = b"\xff\xd8\xff\xc2\0\x0e\x08\0\1\0\1\2\1\x11\0\2\x11\0"
    first = scan(1, 0, 0, 0) + scan(1, 1, 63, 1) + scan(2, 0, 255, 0)
    assert not jpeg_scans_complete(head + first)
    assert not jpeg_scans_complete(head + first + scan(1, 1, 62, 0x10))
    assert jpeg_scans_complete(head + first + scan(1, 1, 5, 0x10) + scan(1, 6, 63, 0x10))
    assert not jpeg_scans_complete(head + scan(1, 0, 63, 0))
    before = time.process_time()
    jpeg_scans_complete(head + scan(1, 0, 63, 0) * 1_000_000)
    assert time.process_time() - before < SECONDS


@pytest.mark.parametrize(
    "text",
    [
        b"<svg>",
        b"\xef\xbb\xbf \n<svg:svg xmlns='x'>",
        b"<!-- a --><!-- b -->\n<SVG>",
        b"<?xml version='1.0'?>\n<!-- a > b -->\n<!DOCTYPE svg PUBLIC 'x'>\n<svg>",
        b"<!-- a --><!doctype  svg []><svg>",
    ],
)
def test_svg_is_named(text: bytes) -> None:
    assert "an SVG drawing" in describe_signature(text)
    assert "an SVG drawing" not in describe_signature(text.lower().replace(b"svg", b"svgs"))


# --- memory -----------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def png(width: int, height: int, *chunks: bytes, depth: int = 8, wrong: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head, wrong) + b"".join(chunks)


def peak(source: bytes) -> tuple[int, str]:
    """The most bytes that were allocated for an image, Pillow's own apart, and the error."""
    tracemalloc.start()
    error = ""
    try:
        thumbnail(source)
    except ImageError as e:
        error = str(e)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(error.splitlines()) < 2
    return most, error


MUCH = 20_000_000


def test_a_png_is_not_filled_beyond_its_limit() -> None:
    for chunks in ((), (chunk(b"IDAT", zlib.compress(bytes(99))),), (chunk(b"IDAT", b"x", 1),)):
        for wrong in (0, 1):
            most, error = peak(png(30_000, 30_000, *chunks, wrong=wrong))
            assert "too large (30000x30000): the limit is" in error and most < MUCH
    assert "has no pixels" in peak(png(0, 5))[1]
    most, error = peak(png(10_000, 10_000, depth=255))
    assert error and most < MUCH


def test_a_png_is_not_unpacked_beyond_its_size() -> None:
    # A row of a filter that does not exist: the decoder gives up, and the file is filled.
    bomb = chunk(b"IDAT", zlib.compress(b"\x09" * 300_000_000, 9))
    for data in (png(1, 1, bomb), png(1, 1, bomb, bomb, bomb), png(1, 2, chunk(b"IDAT", b""), bomb)):
        most, error = peak(data)
        assert "corrupt or truncated" in error and most < MUCH


def test_many_packed_texts_are_passed_over() -> None:
    body = b"Raw profile type exif\0\0" + zlib.compress(b" " * 1_000_000, 9)
    data = encode(Image.new("RGB", (9, 9)), "PNG")
    full = data[:33] + chunk(b"zTXt", body) * 3000 + data[33:]
    before = time.process_time()
    assert load_image(full).size == (9, 9)
    assert time.process_time() - before < SECONDS
