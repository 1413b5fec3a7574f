"""Images of requests: base64 to the bytes of an image file, and from there to pixels.

A text of a request is never taken for a path or an address: it is base64 or a data URI, or it is refused.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..errors import ImageError
from ..vision.decoding import LARGER, decode
from ..waiting import acquire
from .problems import Refused

# How the kinds begin that are taken; decoders of other kinds are larger and less tried.
_KINDS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
_WEBP = re.compile(rb"RIFF....WEBP", re.DOTALL)
_BLANKS = re.compile(r"\s+")
_OTHER_ALPHABET = str.maketrans("-_", "+/")
NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"


@dataclass(frozen=True)
class ImageLimits:
    """most: images a request; n_bytes: of one file; pixels: of one image; any_kind: take every kind that
    the package reads, not those of NAMES alone; hosts: from which images are fetched."""

    most: int = 16
    n_bytes: int = 32 << 20
    pixels: int = 64_000_000
    any_kind: bool = False
    hosts: tuple[str, ...] = ()


def from_base64(text: str | memoryview, where: str, limits: ImageLimits) -> bytes:
    """The bytes of an image file that a text holds: base64 in either alphabet, with blanks, without padding,
    or a data URI. See `bodies` for the memoryview.

    where: the field of the request, for errors

    Raises Refused.
    """
    if isinstance(text, memoryview):
        data = _decode_view(text, where)
    else:
        data = _from_data_uri(text, where) if is_data_uri(text) else _decode(text, where)
    return checked_kind(data, where, limits)


def checked_kind(data: bytes, where: str, limits: ImageLimits) -> bytes:
    """The same bytes, if they may be an image of a kind that is taken. Raises Refused."""
    if len(data) > limits.n_bytes:
        raise Refused(413, f"{where}: an image of {len(data)} bytes; at most {limits.n_bytes} are taken")
    if not data:
        raise Refused(400, f"{where}: the image is empty", "invalid_image")
    if not limits.any_kind and not (data.startswith(_KINDS) or _WEBP.match(data)):
        raise Refused(400, f"{where}: not an image; {NAMES} are taken", "invalid_image")
    return data


def is_data_uri(text: str | memoryview) -> bool:
    """Whether a text is a data URI."""
    head = text[:5]
    return (
        head.tobytes() if isinstance(head, memoryview) else head.encode("utf-8", "replace")
    ).lower() == b"data:"


def _decode_view(view: memoryview, where: str) -> bytes:
    """The bytes of a base64 text whose characters are all of its alphabet."""
    head = bytes(view[:100]) if is_data_uri(view) else b""
    if head and b";base64," not in head.lower():
        return _from_data_uri(str(view, "ascii"), where)
    try:
        return binascii.a2b_base64(view[head.find(b",") + 1 :])
    except binascii.Error:
        return _decode(str(view[head.find(b",") + 1 :], "ascii"), where)


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)  # as nearly all clients write it
    except (binascii.Error, ValueError, TypeError):
        pass
    digits = _BLANKS.sub("", text).translate(_OTHER_ALPHABET).rstrip("=")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise Refused(
            400,
            f"{where}: not base64 of an image; images are sent in the request, as base64",
            "invalid_image",
        ) from None


def _from_data_uri(uri: str, where: str) -> bytes:
    comma = uri.find(",", 0, 300)
    if comma < 0:
        raise Refused(400, f"{where}: a data URI without a comma holds no image", "invalid_image")
    parameters = uri[5:comma].lower().split(";")
    if parameters[-1].strip() != "base64":  # the other form takes 80 times its size, and nobody sends it
        raise Refused(400, f"{where}: a data URI of an image must say ;base64", "invalid_image")
    return _decode(uri[comma + 1 :], where)


# An image of many pixels takes a gigabyte while it is decoded, however small its file is.
_decoding = threading.BoundedSemaphore(2)


def to_pixels(data: bytes, limits: ImageLimits, stop: Callable[[], bool] = bool) -> Image.Image:
    """The image of a file's bytes, upright, RGB. Two are decoded at a time.

    Raises ImageError, and Aborted once `stop` says so while it waits.
    """
    acquire(_decoding, stop, "waiting for other images was stopped")
    try:
        return decode(io.BytesIO(data), "image", limits.pixels, False)
    except MemoryError:
        raise ImageError("image: not enough memory to decode it") from None
    except ImageError as e:
        words = str(e).replace(LARGER, "make it smaller first, or allow more (--max-image-pixels)")
        raise ImageError(words) from e
    finally:
        _decoding.release()
