"""From the bytes of an image file to an upright 8-bit RGB image: formats, limits, damage, orientation."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, BinaryIO

from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from ..checks import Whole, checked
from ..errors import ImageError, RequestError
from ..handles import ModuleLock
from ..words import one_line
from .colour import describe_compression, describe_tiff, mend_tiff, to_rgb
from .jpeg2000 import mend_jpeg2000
from .repair import (
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    clean_png,
    fill_png,
    jpeg_endings,
    jpeg_scans_complete,
    png_size,
)
from .signatures import describe_jpeg, describe_signature, is_heif

MAX_PIXELS = 178_956_970  # 512 MiB as RGB; Pillow refuses above it as well
MAX_SIDE = 1_000_000  # Pillow's resize needs 16 bytes of coefficients for every pixel of a side
_MOST_PIXELS = 2**63 - 1
MAX_PIXELS_VARIABLE = "MLLAMA_MAX_PIXELS"

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
_HEAD_BYTES = 1024

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


class _Shared:
    """A change of the process's state that any number of threads use together: the first one makes it, the
    last one undoes it."""

    def __init__(self) -> None:
        self._lock = ModuleLock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._begin()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._end()

    def _begin(self) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class _Quiet(_Shared):
    """Pillow's warnings silenced. warnings.catch_warnings swaps a list of the whole process."""

    def _begin(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")

    def _end(self) -> None:
        self._caught.__exit__(None, None, None)


class _Unlimited(_Shared):
    """Pillow's own limit of pixels lifted, for a caller who allows more; ours still holds."""

    def _begin(self) -> None:
        self._limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None

    def _end(self) -> None:
        Image.MAX_IMAGE_PIXELS = self._limit


_quiet = _Quiet()
_unlimited = _Unlimited()


def pixel_limit(max_pixels: int | None) -> int:
    """The most pixels of an image: what the caller says, or the variable MLLAMA_MAX_PIXELS, or MAX_PIXELS.

    Raises RequestError for what is not a number of pixels.
    """
    if max_pixels is not None:
        return int(checked("max_pixels", Whole(1, _MOST_PIXELS), max_pixels))
    words = os.environ.get(MAX_PIXELS_VARIABLE, "").strip()
    if not words:
        return MAX_PIXELS
    try:
        return parse_pixels(words)
    except ValueError as e:
        raise RequestError(f"{MAX_PIXELS_VARIABLE}: {e}") from None


def parse_pixels(words: str) -> int:
    """A number of pixels: "200000000" or "200M". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d{1,18})\s*([kmg]?)(?:p|px|pix|pixels)?\s*", words, re.ASCII | re.IGNORECASE)
    n = int(match[1]) * 1000 ** " kmg".index(match[2].lower() or " ") if match else 0
    if not 0 < n <= _MOST_PIXELS:
        raise ValueError(f"{one_line(words)!r} is not a number of pixels, as in 200000000 or 200M")
    return n


def decode(file: BinaryIO, name: str, max_pixels: int | None, allow_truncated: bool) -> Image.Image:
    """An upright RGB image from a file that can seek. name: for errors. Raises ImageError."""
    limit = pixel_limit(max_pixels)
    lifted = _unlimited if limit > MAX_PIXELS else nullcontext()
    with lifted, decoding(name):
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if not head:
            raise ImageError(f"{name}: is empty (0 bytes)")
        if head.startswith(PNG_SIGNATURE):
            cleaned = clean_png(file.read())
            if (size := png_size(cleaned)) is not None:
                check_size(size, name, limit)
            file = io.BytesIO(cleaned)
        try:
            return finish(_open(file, head, name), name, limit)
        except (ImageError, Image.DecompressionBombError, MemoryError):  # mending would only take more
            raise
        except Exception:
            file.seek(0)
            mended = _decode_cut(file.read(), head, name, limit, allow_truncated)
            if mended is None:
                raise
            return mended


def _decode_cut(data: bytes, head: bytes, name: str, limit: int, allow_truncated: bool) -> Image.Image | None:
    """The image of a file that ends too early, if nothing but its end is missing or the caller allows it."""
    if head.startswith(JPEG_SIGNATURE) and (endings := jpeg_endings(data)):
        if allow_truncated:
            return finish(_open(io.BytesIO(endings[0]), head, name), name, limit)
        if not jpeg_scans_complete(data):
            return None
        images = [finish(_open(io.BytesIO(ending), head, name), name, limit) for ending in endings]
        return images[0] if len({image.tobytes() for image in images}) == 1 else None
    if allow_truncated and head.startswith(PNG_SIGNATURE):
        return finish(_open(io.BytesIO(fill_png(data)), head, name), name, limit)
    if allow_truncated:
        file = io.BytesIO(data)
        image = _open(file, head, name)
        check_size(image.size, name, limit)
        size = len(data) + 4 * image.width * image.height + _HEAD_BYTES
        return finish(_open(io.BytesIO(data.ljust(size, b"\0")), head, name), name, limit)
    return None


def _open(file: BinaryIO, head: bytes, name: str) -> ImageFile.ImageFile:
    if is_heif(head):
        _register_heif(name)
    # preinit() imports the few common plugins, init() all of them, several times slower.
    for register in (Image.preinit, Image.init):
        register()
        try:
            image = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
        except UnidentifiedImageError:
            file.seek(0)
        else:
            return image
    raise ImageError(f"{name}: {_describe(file, head)}")


def _describe(file: BinaryIO, head: bytes) -> str:
    """Why a file cannot be opened."""
    if words := describe_signature(head):
        return words
    if head.startswith(JPEG_SIGNATURE):
        file.seek(0)
        if words := describe_jpeg(file.read()):
            return words
    if head[:4] in (b"II*\0", b"MM\0*"):
        with suppress(Exception):
            tags = TiffImagePlugin.ImageFileDirectory_v2(head[:8], prefix=head[:2])
            file.seek(tags.next)
            tags.load(file)
            if 256 in tags:
                return f"{describe_tiff(tags)}, or damaged; convert it to 8-bit PNG first"
    return f"not an image that can be read (corrupt, or not {_FORMAT_WORDS}); convert it to PNG first"


def _register_heif(name: str) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ImageError(
            f"{name}: a HEIC image; run: pip install 'mllama_gguf[heif]', or convert it to JPEG first"
        ) from None
    if "HEIF" not in Image.OPEN:
        register_heif_opener()


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Pillow's warnings silenced, and whatever it raises turned into an ImageError."""
    with _quiet:
        try:
            yield
        except (ImageError, RequestError):
            raise
        except Image.DecompressionBombError as e:
            raise ImageError(f"{name}: too large: {one_line(e)}; {LARGER}") from e
        except MemoryError as e:
            raise ImageError(f"{name}: not enough memory to decode it; make it smaller first") from e
        except Exception as e:  # a damaged file makes the decoders raise nearly anything
            if "data precision 12" in str(e):
                raise ImageError(f"{name}: a JPEG of 12 bits a sample; convert it to 8 bits first") from e
            if _UNSUPPORTED.search(str(e)):
                raise ImageError(
                    f"{name}: of a kind that is not supported: {one_line(e)}; convert it to PNG first"
                ) from e
            hint = "; --allow-truncated takes what is there" if "truncated" in str(e) else ""
            raise ImageError(
                f"{name}: corrupt or truncated: {one_line(e)}; get a fresh copy or save it again{hint}"
            ) from e


# Words of Pillow's for a file that may be whole.
_UNSUPPORTED = re.compile(r"unsupported|not supported|unknown .*(?:compression|method|mode)", re.IGNORECASE)
LARGER = f"make it smaller first, or allow more (max_pixels, --max-pixels, {MAX_PIXELS_VARIABLE})"


def finish(image: Image.Image, name: str, limit: int) -> Image.Image:
    """Check the size, then decode, orient and convert to RGB. limit: most pixels."""
    check_size(image.size, name, limit)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        image = mend_tiff(image, name)
    elif image.format == "JPEG2000":
        image = mend_jpeg2000(image, _whole_file(image), name)
    try:
        image.load()
    except OSError as e:
        if isinstance(image, TiffImagePlugin.TiffImageFile) and (words := describe_compression(image)):
            raise ImageError(f"{name}: a TIFF with {words}; convert it to 8-bit PNG first") from e
        raise
    orientation: Any = None
    with suppress(Exception):  # damaged EXIF is not a reason to refuse the pixels
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    if orientation not in _UPRIGHT:
        return to_rgb(image, name)
    # to_rgb first: it looks at the tags of a TIFF, which a turned image has not
    upright = to_rgb(image, name).transpose(_UPRIGHT[orientation])
    upright.info = {}  # it still holds the orientation, which must not be applied twice
    return upright


def _whole_file(image: Image.Image) -> bytes:
    """The file of an image that is not decoded yet; b"" if it is, or if it has none."""
    file = getattr(image, "fp", None)
    if file is None:
        return b""
    at = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(at)
    return data


def check_size(size: tuple[int, int], name: str, limit: int) -> None:
    """Raise ImageError for a size in pixels that cannot be used."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width}x{height})")
    if width * height > limit or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: too large ({width}x{height}): the limit is {limit} pixels and {MAX_SIDE} a side; "
            f"{LARGER}"
        )
