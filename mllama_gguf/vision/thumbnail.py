"""Small copies of images, as JPEG: for a page, or for a notebook."""

from __future__ import annotations

import base64
import io
import os

from PIL import Image

from ..errors import ImageError
from ..reading import open_regular
from .decoding import check_size, decoding, pixel_limit
from .loading import ImageSource, load_image

SIDE = 256  # pixels
QUALITY = 75


def thumbnail(source: ImageSource, side: int = SIDE, quality: int = QUALITY) -> bytes:
    """A JPEG of an image, upright, in RGB. It has no metadata of the image.

    source: as in `load_image`; a path (os.PathLike) is read fastest
    side:   the longer side in pixels; smaller images keep their size

    A file that ends too early is shown as far as it goes. Raises ImageError.
    """
    image = None
    if isinstance(source, os.PathLike):
        image = _reduced(source, side)
    if image is None:
        image = load_image(source, allow_truncated=True)
    return to_jpeg(image, side, quality)


def to_jpeg(image: Image.Image, side: int, quality: int = QUALITY) -> bytes:
    """A JPEG of an RGB image, without metadata. side: the longer one in pixels, or the image's own if
    smaller."""
    scale = min(1.0, side / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    small.info = {}  # a comment would be written too
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def data_url(jpeg: bytes) -> str:
    """A JPEG as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _reduced(path: os.PathLike[str], side: int) -> Image.Image | None:
    """A JPEG file decoded at a half, a quarter or an eighth of its size, which is much faster than all of it.
    None for another file, or a damaged one."""
    try:
        with open_regular(path) as file, decoding("JPEG"):
            image = Image.open(file, formats=["JPEG"])
            check_size(image.size, "JPEG", pixel_limit(None))
            image.draft(None, (2 * side, 2 * side))  # None: the mode stays
            return load_image(image)
    except (ImageError, OSError, ValueError):
        return None
