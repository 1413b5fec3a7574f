"""Small files that cost much: time or memory that their size does not explain."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image

from mllama_gguf.errors import ImageError
from mllama_gguf.vision.loading import load_image
from mllama_gguf.vision.repair import jpeg_heads, jpeg_scans_complete
from mllama_gguf.vision.signatures import describe_signature

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
        b"<!---->" * 24 + b"x",
        b"<!-- -->" * 24 + b"<!--",
        b"A" + b" " * 200_000 + b"!",
        b"data:," * 100_000,
    ],
    ids=["fill bytes", "only fill bytes", "runs", "scans", "comments", "an open comment", "blanks", "data URIs"],
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
