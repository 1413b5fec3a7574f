"""What a file is by its first bytes, so that one that cannot be read is at least named."""

from __future__ import annotations

import re

# A box at the head of an ISO file names its brand: which of its formats it is.
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (rb"%PDF-", "a PDF document; save its page as a picture: pdftoppm -png file.pdf page"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript document; convert it to PNG first"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL; convert it first: djxl file.jxl file.png"),
    (rb"8BPS", "a Photoshop document; save it as PNG first"),
    (rb"gimp xcf", "a GIMP document; export it as PNG first"),
    (
        rb"\x1a\x45\xdf\xa3|....ftyp(?:isom|iso\d|mp4\d|M4V |qt  |avc1|3gp)|RIFF....AVI ",
        "a video; save a frame first",
    ),
    (
        rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd",
        "a compressed file; unpack it first",
    ),
    (rb"GGUF", "a GGUF model, not a picture"),
    (rb"ID3|OggS|fLaC|RIFF....WAVE", "a sound file, not a picture"),
    (rb"v/1\x01|#\?RADIANCE", "a picture of high dynamic range; convert it to 8-bit PNG first"),
    (rb"SIMPLE  =", "a FITS picture; convert it to 8-bit PNG first"),
    (rb"DDS |\x76\x2f\x31\x01", "a texture; convert it to PNG first"),
    (rb"\xd7\xcd\xc6\x9a|\x01\x00\x09\x00|.{40} EMF", "a Windows metafile; save it as PNG first"),
    (rb"FUJIFILM|II\*\x00.{4}CR|IIRO|IIU\x00", "a camera's raw file; develop it to JPEG or PNG first"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the picture; run: git lfs pull"),
)
_TEXT_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (
        rb"(?:<\?xml.*?)?(?:<!--.*?-->\s*)*(?:<!DOCTYPE\s+svg.*?)?<(?:\w+:)?svg\b",
        "an SVG drawing; render it first: rsvg-convert file.svg -o file.png",
    ),
    (
        rb"<!DOCTYPE\s+html|<html\b|<head\b|<body\b",
        "an HTML page, not a picture; was the download refused?",
    ),
    (rb"<\?xml", "an XML document, not a picture"),
    (rb"[{\[]\s*\"", "a JSON document, not a picture"),
)


def is_heif(head: bytes) -> bool:
    """Whether a file with these first bytes (at least 12) is HEIC or another HEIF, which Pillow alone does
    not read."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head[8:32]


def describe_signature(head: bytes) -> str:
    """What a file with these first bytes (up to some 1000) is, and the way out; "" if they say nothing."""
    for pattern, words in _SIGNATURES:
        if re.match(pattern, head, re.DOTALL):
            return words
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, words in _TEXT_SIGNATURES:
        if re.match(pattern, text, re.DOTALL | re.IGNORECASE):
            return words
    return ""
