"""JPEG 2000 of other than 8 bits a sample, which Pillow brings to 8 bits wrongly.

Of more than 8 bits it rounds the largest values up to 256, which becomes 0: white turns black. Such an image
is decoded once more, from a copy that declares one bit more a sample. Its values lie in the middle half of
the range, so that nothing overflows, and tell white from black. Less than 8 bits are shifted, not scaled:
white is grey. One component of more than 8 bits (mode I;16) is right.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from ..errors import ImageError

_START = b"\xff\x4f\xff\x51"  # of a codestream: two markers, the second of its sizes
_COMPONENTS = 40  # bytes from there to their number, and to what is said of each
_TILE, _DATA, _QUANTA, _QUANTA_OF_ONE = 0xFF90, 0xFF93, 0xFF5C, 0xFF5D  # markers
_YCC = b"colr\x01\x00\x00\x00\x00\x00\x12"  # the box of a file whose colours are YCbCr
_MODES = ("L", "LA", "RGB", "RGBA", "CMYK")


def mend_jpeg2000(image: Image.Image, data: bytes, name: str) -> Image.Image:
    """An image with the right pixels: itself, or another image in its place.

    image: opened by Pillow, decoded or not; data: its file; name: for the error. Raises ImageError.
    """
    bits = _bits(data)
    if image.mode not in _MODES or set(bits) <= {8}:
        return image
    if _YCC in data:
        raise ImageError(
            f"{name}: a JPEG 2000 image in YCbCr, not of 8 bits a sample; convert it to PNG first"
        )
    samples = np.array(image)
    samples = samples.reshape(*samples.shape[:2], -1)
    n = samples.shape[2]
    bits = (bits * n)[:n]
    if max(bits) > 8 and not samples.all():
        try:
            copy = Image.open(io.BytesIO(_with_one_bit_more(data)), formats=["JPEG2000"])
        except ValueError as e:
            raise ImageError(f"{name}: a JPEG 2000 image {e}; convert it to PNG first") from e
        in_the_middle = np.asarray(copy).reshape(samples.shape)
        large = np.array(bits) > 8
        samples[(samples == 0) & (in_the_middle >= 128) & large] = 255
    for index, depth in enumerate(bits):
        if depth < 8:
            top = 2**depth - 1
            values = samples[..., index].astype(np.uint16) >> (8 - depth)
            samples[..., index] = (values * 255 + top // 2) // top
    mended = Image.fromarray(samples.squeeze(2) if n == 1 else samples, image.mode)
    mended.info.update(image.info)
    return mended


def _bits(data: bytes) -> list[int]:
    """Bits a sample, of each component; [] if the file does not say."""
    at = data.find(_START)
    if at < 0 or len(data) < at + _COMPONENTS + 2:
        return []
    (n,) = struct.unpack_from(">H", data, at + _COMPONENTS)
    return [(size & 127) + 1 for size in data[at + _COMPONENTS + 2 : at + _COMPONENTS + 2 + 3 * n : 3]]


def _with_one_bit_more(data: bytes) -> bytes:
    """A file that declares one bit more a sample, with the values of the same size: x in place of
    x - 2**(bits - 1) + 2**bits.

    Lossy values have a unit that depends on the number of bits: its exponent is one more as well, and the
    number of guard bits one less, so that all that is decoded stays. Raises ValueError for what cannot be
    written so.
    """
    out = bytearray(data)
    start = data.find(_START)
    for index in range(len(_bits(data))):
        out[start + _COMPONENTS + 2 + 3 * index] += 1
    (n,) = struct.unpack_from(">H", data, start + _COMPONENTS)
    at, tile, tile_bytes = start + 2, start, 0
    while at + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, at)
        if marker == _TILE and at + 10 <= len(data):
            tile, (tile_bytes,) = at, struct.unpack_from(">I", data, at + 6)
        if marker == _DATA:
            if not tile_bytes:
                break
            at = max(tile + tile_bytes, at + 2)  # forward, whatever the file says
            continue
        if marker < 0xFF00 or length < 2:
            break  # the end, or damage
        if marker in (_QUANTA, _QUANTA_OF_ONE):
            first = at + 4 if marker == _QUANTA else at + 5 + (n > 256)
            _shift_quanta(out, first, at + 2 + length)
        at += 2 + length
    return bytes(out)


def _shift_quanta(out: bytearray, at: int, end: int) -> None:
    style, n_guard = out[at] & 31, out[at] >> 5
    if style == 0:  # lossless
        return
    if not n_guard or any(exponent >> 3 == 31 for exponent in out[at + 1 : end : 2]):
        raise ValueError("of an unusual lossy kind, not of 8 bits a sample")
    out[at] -= 1 << 5
    for place in range(at + 1, end, 2):
        out[place] += 1 << 3
