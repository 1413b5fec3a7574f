"""What a file is by its first bytes, so that one that cannot be read is at least named."""

from __future__ import annotations

import re

from .repair import jpeg_heads

# A box at the head of an ISO file names its brand: which of its formats it is.
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (rb"%PDF-", "a PDF document; save its page as an image: pdftoppm -png file.pdf page"),
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
    (rb"GGUF", "a GGUF model, not an image"),
    (rb"ID3|OggS|fLaC|RIFF....WAVE", "a sound file, not an image"),
    (rb"v/1\x01|#\?RADIANCE", "an image of high dynamic range; convert it to 8-bit PNG first"),
    (rb"SIMPLE  =", "a FITS image; convert it to 8-bit PNG first"),
    (rb"DDS |\x76\x2f\x31\x01", "a texture; convert it to PNG first"),
    (rb"II\xbc\x01", "JPEG XR; convert it to PNG first"),
    (rb"MM\x00\x2b", "a BigTIFF of the byte order that is not read; convert it to PNG first"),
    (rb"\xd7\xcd\xc6\x9a|\x01\x00\x09\x00|.{40} EMF", "a Windows metafile; save it as PNG first"),
    (rb"FUJIFILM|II\*\x00.{4}CR|IIRO|IIU\x00", "a camera's raw file; develop it to JPEG or PNG first"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the image; run: git lfs pull"),
)
# Images of other formats, which all have one way out.
_OTHER_IMAGES: tuple[tuple[bytes, str], ...] = (
    (rb"\x0a[\x00-\x05]\x01[\x01\x02\x04\x08]", "PCX"),
    (rb"\x01\xda[\x00\x01][\x01\x02]", "SGI"),
    (rb"P7\s|P[Ff]\s", "PAM or PFM"),
    (rb"/\* XPM \*/|#define \w+_width", "X pixmap or bitmap"),
    (rb"qoif", "QOI"),
    (rb"icns", "Apple icon"),
    (rb"AT&TFORM", "DjVu"),
    (rb"[\x8a\x8b][MJ]NG", "MNG or JNG"),
    (rb"\x59\xa6\x6a\x95", "Sun raster"),
    (rb"id=ImageMagick", "MIFF"),
    (rb"BPG\xfb|FLIF", "BPG or FLIF"),
    (rb"SDPX|XPDS|\x80\x2a\x5f\xd7", "DPX or Cineon"),
)
_TEXT_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (
        rb"<!DOCTYPE\s+html|<html\b|<head\b|<body\b",
        "an HTML page, not an image; was the download refused?",
    ),
    (rb"<\?xml", "an XML document, not an image"),
    (rb"[{\[]\s*\"", "a JSON document, not an image"),
)
_SVG_WORDS = "an SVG drawing; render it first: rsvg-convert file.svg -o file.png"
_SVG = re.compile(rb"<(?:\w+:)?svg\b", re.IGNORECASE)
_BEFORE_SVG = re.compile(rb"<\?xml|<!DOCTYPE\s+svg", re.IGNORECASE)


def is_heif(head: bytes) -> bool:
    """Whether a file with these first bytes (at least 12) is HEIC or another HEIF, which Pillow alone does
    not read."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head[8:32]


def describe_signature(head: bytes) -> str:
    """What a file with these first bytes (up to some 1000) is, and the way out; "" if they say nothing."""
    for pattern, words in _SIGNATURES:
        if re.match(pattern, head, re.DOTALL):
            return words
    for pattern, kind in _OTHER_IMAGES:
        if re.match(pattern, head, re.DOTALL):
            return f"an image of a format that is not read ({kind}); convert it to PNG first"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _is_svg(text):
        return _SVG_WORDS
    for pattern, words in _TEXT_SIGNATURES:
        if re.match(pattern, text, re.DOTALL | re.IGNORECASE):
            return words
    return ""


def _is_svg(text: bytes) -> bool:
    """Whether a text begins as an SVG file does. One pattern for all of it would try each comment from each
    place before it."""
    at = 0
    while text.startswith(b"<!--", at):
        end = text.find(b"-->", at)
        if end < 0:
            return False
        at = end + 3 + len(text[end + 3 :]) - len(text[end + 3 :].lstrip())
    return (_SVG.search if _BEFORE_SVG.match(text, at) else _SVG.match)(text, at) is not None


def describe_jpeg(data: bytes) -> str:
    """Why a JPEG file cannot be opened, by the head of its frame; "" if that says nothing."""
    for marker, body in jpeg_heads(data):
        if marker == 0xF7:
            return "JPEG-LS; convert it to PNG first"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and body:
            if body[0] != 8:
                return f"a JPEG of {body[0]} bits a sample; convert it to 8 bits first"
            return "a hierarchical JPEG; convert it to PNG first" if marker & 7 in (5, 6, 7) else ""
    return ""
