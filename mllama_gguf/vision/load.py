"""Decode an image to upright 8-bit RGB, from a path, bytes, a data URI, a PIL image or an array.

Modes are converted as `MllamaImageProcessor` of transformers 4.52.4 (the Pillow one) converts them. The
exceptions, where that processor has no useful behaviour:

- EXIF orientation is applied to every image that has one, PIL images included. The processor ignores it.
- 16-bit grey (`I;16` in any byte order) is scaled: round(v / 257). The processor clips it to 255, which turns
  the image white. `I` is also read as 16-bit grey, because Pillow opens 16-bit PGM in that mode. Values
  outside 0..65535 are refused. 16-bit colour never arrives here: Pillow keeps only the high byte.
- `La` is converted by way of `LA`. The processor fails.
- `F` is refused: nothing says which range its values have.
- The transparent colour of an `RGB` image (PNG tRNS) is ignored, as in the processor. Every other kind of
  transparency is composited over white, as in the processor.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ..errors import ImageError
from ..reading import open_regular
from ..words import one_line, show_name

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[Any]"
)

MAX_PIXELS = 178_956_970  # 512 MiB as RGB; Pillow refuses above it as well
MAX_SIDE = 1_000_000  # Pillow's resize needs 16 bytes of coefficients for every pixel of a side

# Formats that hold pixels and have a signature: no EPS (runs a program), no TGA (guesses). Names that the
# installed Pillow does not know are left out.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "MPO",
    "DIB",
    "PPM",
    "ICO",
    "JPEG2000",
    "AVIF",
    "HEIF",
)
_FORMAT_WORDS = "JPEG, PNG, WebP, GIF, BMP or TIFF"

_OPAQUE_MODES = ("1", "L", "RGBX", "CMYK", "YCbCr", "HSV")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Quiet:
    """Pillow's warnings silenced, in any number of threads at once.

    warnings.catch_warnings swaps a process-wide list: the first thread does it, and the last one undoes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to an upright 8-bit RGB PIL image.

    source: one of
      - a path (str or os.PathLike)
      - a data URI (str), base64 or percent-encoded
      - the bytes of a picture file
      - a binary file object; it is read from its start and left open
      - a PIL image; it is not changed, and may be returned itself if nothing had to be done
      - a uint8 array [height, width, 3], RGB
    max_pixels: larger pictures are refused before they are decoded. Pillow's own limit,
      2 * PIL.Image.MAX_IMAGE_PIXELS, is never exceeded either.

    Of several frames the first is taken (of a PIL image the current one). How the modes are converted, the
    module's documentation says. Raises ImageError, one line that names the source.
    """
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name = show_name(filename) if isinstance(filename, str) and filename else "PIL image"
        with _decoding(name):
            return _finish(source, name, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(bytes(source)), "image bytes", max_pixels)
    if isinstance(source, str) and source[:5].lower() == "data:":
        name, data = _parse_data_uri(source)
        return _decode(io.BytesIO(data), name, max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, max_pixels)
    if hasattr(source, "read"):
        return _from_file(source, max_pixels)
    raise ImageError(
        f"{type(source).__name__} object: not a picture; give a path, bytes, a file object, a data URI, "
        "a PIL image or a uint8 array [height, width, 3]"
    )


def _from_path(source: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    path = os.fspath(source)
    name = show_name(path)
    if isinstance(path, str) and path.lower().startswith(("http://", "https://")):
        raise ImageError(f"{name}: pictures are not fetched from the web; download it and give the file")
    try:
        with open_regular(path) as file:
            return _decode(file, name, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a directory, not a picture") from None
    except OSError as e:
        raise ImageError(f"{name}: cannot be opened: {one_line(e.strerror or e)}") from e
    except ValueError as e:  # a NUL in the path
        raise ImageError(f"{name}: not a usable path: {one_line(e)}") from e


def _from_file(file: BinaryIO, max_pixels: int) -> Image.Image:
    filename = getattr(file, "name", None)
    name = show_name(filename) if isinstance(filename, str) else "file object"
    try:
        if file.seekable():
            file.seek(0)
        data = file.read()
    except Exception as e:  # whatever the caller's object raises
        raise ImageError(f"{name}: cannot be read: {one_line(e)}") from e
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: gave {type(data).__name__}, not bytes; open it in binary mode ('rb')")
    return _decode(io.BytesIO(data), name, max_pixels)


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> Image.Image:
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
    _check_size((array.shape[1], array.shape[0]), found, max_pixels)
    return Image.fromarray(array)


def _parse_data_uri(uri: str) -> tuple[str, bytes]:
    header, comma, body = uri[5:].partition(",")
    media_type, *parameters = header.split(";")
    name = show_name(f"data URI ({media_type.strip() or 'no type'})")
    if not comma:
        raise ImageError(f"{name}: no comma, so no data; expected data:image/png;base64,...")
    data = unquote_to_bytes(body)
    if any(p.strip().lower() == "base64" for p in parameters):
        digits = b"".join(data.split()).rstrip(b"=")
        try:
            # Padded anew, since browsers accept URIs without padding.
            data = base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
        except binascii.Error as e:
            raise ImageError(f"{name}: damaged base64: {one_line(e)}") from e
    return name, data


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    with _decoding(name):
        return _finish(_open(file, name), name, max_pixels)


def _open(file: BinaryIO, name: str) -> Image.Image:
    if not file.seekable():
        file = io.BytesIO(file.read())
    if not file.read(1):
        raise ImageError(f"{name}: is empty (0 bytes)")
    file.seek(0)
    # preinit() imports the few common plugins, init() all of them, several times slower.
    for register in (Image.preinit, Image.init):
        register()
        try:
            return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
        except UnidentifiedImageError:
            file.seek(0)
    raise ImageError(
        f"{name}: not a picture that can be read (corrupt, or not {_FORMAT_WORDS}); convert it to PNG first"
    )


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Pillow's warnings silenced, and whatever it raises turned into an ImageError."""
    with _quiet:
        try:
            yield
        except ImageError:
            raise
        except Image.DecompressionBombError as e:
            raise ImageError(f"{name}: too large: {one_line(e)}; make it smaller first") from e
        except MemoryError as e:
            raise ImageError(f"{name}: not enough memory to decode it; make it smaller first") from e
        except Exception as e:  # a damaged file makes the decoders raise nearly anything
            raise ImageError(
                f"{name}: corrupt or truncated: {one_line(e)}; get a fresh copy or save it again"
            ) from e


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Check the size, then decode, orient and convert to RGB."""
    _check_size(image.size, name, max_pixels)
    image.load()
    orientation = None
    with suppress(Exception):  # damaged EXIF is no reason to refuse the pixels
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    if orientation not in _UPRIGHT:
        return _to_rgb(image, name)
    upright = _to_rgb(image.transpose(_UPRIGHT[orientation]), name)
    upright.info = {}  # it still holds the orientation, which must not be applied twice
    return upright


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width}x{height})")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: too large ({width}x{height}): the limit is {max_pixels} pixels and {MAX_SIDE} a side; "
            "make it smaller first"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode == "I" or mode.startswith("I;16"):
        return _grey16_to_rgb(image, name)
    if mode == "F":
        raise ImageError(f"{name}: float pixels (mode F) have no defined range; convert to 8 bits first")
    if mode in _OPAQUE_MODES and "transparency" not in image.info:
        return image.convert("RGB")  # what the composite below gives, without its two RGBA copies
    if mode == "La":
        image = image.convert("LA")  # the only conversion that Pillow has for it
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255)), rgba).convert("RGB")


def _grey16_to_rgb(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise ImageError(f"{name}: 32-bit integer pixels outside 0..65535 (mode I); convert to 8 bits first")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # round(v / 257), which has no ties
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
