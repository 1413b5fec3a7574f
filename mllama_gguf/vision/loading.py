"""What a caller hands in as an image: a path, an address, bytes, base64, a file, a PIL image, an array."""

from __future__ import annotations

import base64
import binascii
import errno
import io
import os
import re
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ImageError, RequestError
from ..reading import open_regular
from ..words import one_line, os_reason, show_name
from .decoding import check_size, decode, decoding, finish, pixel_limit
from .repair import JPEG_SIGNATURE, PNG_SIGNATURE

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[Any]"
)

# How the formats begin that people put into base64.
_IMAGES = re.compile(
    rb"%b|%b|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|....ftyp|\0\0\0\x0cjP|\xff\x4f\xff\x51|\0\0\x01\0|P[1-6]\s"
    % (re.escape(PNG_SIGNATURE), re.escape(JPEG_SIGNATURE)),
    re.DOTALL,
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+(?:=+\s*)?")  # blanks in one place, or they are tried in both
_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]{1,19}://|blob:)", re.IGNORECASE)
_LONG_TEXT = 300  # characters; a text above it is data rather than a name


def load_image(
    source: ImageSource, *, max_pixels: int | None = None, allow_truncated: bool = False
) -> Image.Image:
    """Decode an image to an upright 8-bit RGB PIL image.

    source: one of
      - a path (str or os.PathLike), "~" for the home folder, or a file:// URL
      - a data URI (str), base64 or percent-encoded, or base64 alone
      - the bytes of an image file
      - a binary file object, or anything with read(); it is read from its start if it can seek, and left open
      - a PIL image; it is not changed, and may be returned itself if nothing had to be done
      - a uint8 array [height, width, 3], RGB
    max_pixels: larger images are refused before they are decoded; None: the variable MLLAMA_MAX_PIXELS, or
      512 MiB as RGB and no more than Pillow's own limit, 2 * PIL.Image.MAX_IMAGE_PIXELS
    allow_truncated: take a file that ends too early, if it is JPEG, PNG or not compressed; the pixels that
      are missing are grey or black

    The first of several frames is taken (of a PIL image the current one). How colours are converted is told
    in `colour`. Raises ImageError, one line that names the source.
    """
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name = show_name(filename) if isinstance(filename, str) and filename else "PIL image"
        with decoding(name):
            return finish(source, name, pixel_limit(max_pixels))
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        is_uri = data[:99].lstrip()[:5].lower() == b"data:"
        if is_uri or (not _IMAGES.match(data) and _looks_like_base64(data)):
            text = data.decode("ascii", "replace")
            return load_image(text, max_pixels=max_pixels, allow_truncated=allow_truncated)
        return decode(io.BytesIO(data), "image bytes", max_pixels, allow_truncated)
    if isinstance(source, str):
        found = _from_text(source)
        if isinstance(found, tuple):
            name, data = found
            return decode(io.BytesIO(data), name, max_pixels, allow_truncated)
        return _from_path(found, source, max_pixels, allow_truncated)
    if isinstance(source, os.PathLike):
        path = os.fspath(source)
        return _from_path(os.path.expanduser(path), path, max_pixels, allow_truncated)
    if hasattr(source, "read"):
        return _from_file(source, max_pixels, allow_truncated)
    raise ImageError(
        f"{type(source).__name__} object: not an image; give a path, bytes, a file object, a data URI, "
        "a PIL image or a uint8 array [height, width, 3]"
    )


def _looks_like_base64(data: bytes) -> bool:
    """Whether some bytes are base64 of an image."""
    digits = b"".join(data[:100].split())[:16]
    return digits.isascii() and _image_in_base64(digits.decode()) is not None


def _from_text(source: str) -> tuple[str, bytes] | str:
    """The path that a text names, or a name for errors and the data that it holds."""
    text = source.strip()
    kind = text[:8].lower()
    if kind.startswith("data:"):
        return _parse_data_uri(text)
    if kind.startswith(("http://", "https://")):
        raise ImageError(
            f"{_named(text)}: images are not fetched from the web; download it and give the file"
        )
    if kind.startswith("file:"):
        return _parse_file_url(text)
    for path in (source, os.path.expanduser(source), text, os.path.expanduser(text)):
        if _exists(path):
            return path
    if not text:
        raise ImageError("an empty text is not a path of an image")
    if _ADDRESS.match(text):
        raise ImageError(f"{_named(text)}: images are not fetched from elsewhere; give a file")
    data = _image_in_base64(text)
    return os.path.expanduser(text) if data is None else (f"base64 text of {len(text)} characters", data)


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL
        return False


def _image_in_base64(text: str) -> bytes | None:
    """The data that a text is in base64, if it looks like an image; None if not."""
    if len(text) < 16 or not _BASE64.fullmatch(text):
        return None
    try:
        data = _decode_base64(text)
    except (binascii.Error, ValueError):
        return None
    return data if _IMAGES.match(data) else None


def _decode_base64(text: str) -> bytes:
    """Base64 as it arrives: either alphabet, padding or none, line breaks, "+" that became a blank."""
    parts = text.strip().split(" ")
    # Blanks between parts of one length are line breaks; any others were "+" before a form was decoded.
    wrapped = len({len(part) for part in parts[:-1]}) <= 1 and (len(parts) == 1 or len(parts[0]) >= 48)
    digits = "".join(("" if wrapped else "+").join(parts).split()).rstrip("=")
    digits = digits.translate({ord("-"): "+", ord("_"): "/"})
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)


def _parse_data_uri(uri: str, is_inner: bool = False) -> tuple[str, bytes]:
    header, comma, body = uri[5:].partition(",")
    media_type, *parameters = header.split(";")
    name = show_name(f"data URI ({media_type.strip()[:60] or 'no type'})")
    if not comma:
        raise ImageError(f"{name}: no comma, so no data; expected data:image/png;base64,...")
    if not is_inner and body[:5].lower() == "data:":  # the prefix was put before a text that had it
        return _parse_data_uri(body, is_inner=True)
    data = unquote_to_bytes(body)
    if any(p.strip().lower() == "base64" for p in parameters):
        try:
            data = _decode_base64(data.decode("ascii"))
        except (UnicodeDecodeError, binascii.Error) as e:
            words = "not ASCII" if isinstance(e, UnicodeDecodeError) else one_line(e)
            raise ImageError(f"{name}: damaged base64: {words}") from e
    return name, data


def _parse_file_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.netloc
    except ValueError as e:
        raise ImageError(f"{_named(url)}: not a usable URL: {one_line(e)}") from e
    if host.lower() not in ("", "localhost"):
        raise ImageError(f"{_named(url)}: a file of another machine ({host}); a file URL has three slashes")
    # "?" and "#" are not parts of a file URL as people write it.
    rest = url[len("file:") :]
    path = os.fsdecode(unquote_to_bytes(rest[2 + len(host) :] if rest.startswith("//") else rest))
    if not path:
        raise ImageError(f"{_named(url)}: names no file")
    return path


def _named(text: str | bytes) -> str:
    """A text for an error: never the data that somebody passed in place of a name."""
    text = os.fsdecode(text)
    if len(text) > 4096 or (len(text) > _LONG_TEXT and (os.sep not in text or _BASE64.fullmatch(text))):
        return f"text of {len(text)} characters"
    return show_name(text)


def _from_path(
    path: str | bytes, given: str | bytes, max_pixels: int | None, allow_truncated: bool
) -> Image.Image:
    name = _named(given)
    try:
        with open_regular(os.fsdecode(path)) as file:
            return decode(file, name, max_pixels, allow_truncated)
    except (ImageError, RequestError):
        raise
    except FileNotFoundError:
        hint = "; neither a path nor base64 of an image" if name.startswith("text of ") else ""
        raise ImageError(f"{name}: no such file{hint}") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a directory, not an image") from None
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG and name.startswith("text of "):
            raise ImageError(f"{name}: too long for a path; neither a path nor base64 of an image") from None
        raise ImageError(f"{name}: cannot be opened: {os_reason(e)}") from e
    except ValueError as e:  # a NUL in the path, or a character that no path can have
        raise ImageError(f"{name}: not a usable path: {one_line(e)}") from e


def _from_file(file: Any, max_pixels: int | None, allow_truncated: bool) -> Image.Image:
    filename = getattr(file, "name", None)
    name = _named(filename) if isinstance(filename, str) else "file object"
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        data = file.read()
    except Exception as e:  # whatever the caller's object raises
        raise ImageError(f"{name}: cannot be read: {one_line(e)}") from e
    if isinstance(data, (bytearray, memoryview)):
        data = bytes(data)
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: gave {type(data).__name__}, not bytes; open it in binary mode ('rb')")
    return decode(io.BytesIO(data), name, max_pixels, allow_truncated)


def _from_array(array: npt.NDArray[Any], max_pixels: int | None) -> Image.Image:
    found = f"array {array.dtype} {list(array.shape)}"
    wanted = "expected uint8 [height, width, 3]"
    if array.ndim != 3 or array.shape[2] != 3:
        hint = ""
        if array.ndim == 2:
            hint = "; for grey use np.stack([a] * 3, axis=-1)"
        elif array.ndim == 3 and array.shape[0] == 3:
            hint = "; channels come last: a.transpose(1, 2, 0)"
        elif array.ndim == 3 and array.shape[2] == 4:
            hint = "; for RGBA use PIL.Image.fromarray(a)"
        raise ImageError(f"{found}: {wanted}{hint}")
    if array.dtype != np.uint8:
        hint = (
            "; for values from 0 to 1 use (a * 255).round().astype('uint8')"
            if array.dtype.kind == "f"
            else ""
        )
        raise ImageError(f"{found}: {wanted}{hint}")
    check_size((array.shape[1], array.shape[0]), found, pixel_limit(max_pixels))
    return Image.fromarray(array)
