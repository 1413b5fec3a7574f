"""Pixels of every kind that Pillow opens to 8-bit RGB.

As the reference does (`MllamaImageProcessor` of transformers, the Pillow one), colour profiles and gamma are
ignored, wide-gamut profiles (Display P3, Adobe RGB) too: the model was trained on values as they are stored.
Transparency is composited over white. Where the reference has no useful behaviour of its own:

- 16-bit grey (`I;16` and its byte orders) is scaled, round(v / 257); the reference clips it to 255, which
  turns the image white. `I` is read as 16-bit grey too, because that is how Pillow opens 16-bit PGM; values
  outside 0..65535 are refused. 12-bit grey of a TIFF is scaled by its own range. 16-bit colour never arrives:
  Pillow keeps the high byte when it decodes (JPEG 2000: see `jpeg2000`).
- Grey of a TIFF where 0 is white is inverted in 16 bits too.
- `La` is converted by way of `LA`; the reference fails.
- `F` is refused: nothing says which range its values have.
- A transparent colour of an `RGB` image (PNG tRNS) is ignored, as the reference does. Transparency of every
  other mode is composited over white, as the reference does.
- An extra sample of a TIFF without a description is not transparency, nor is the fourth byte of a BMP of 32
  bits without a mask for it: many programs leave anything there. ImageMagick takes both for transparency.
- A GIF whose first frame leaves a part of the canvas out has its background colour there.
- L*a*b* is relative to D50, as in ICC profiles. libtiff's programs take D65, so that strong colours differ.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from ..errors import ImageError

_OPAQUE_MODES = ("1", "L", "RGBX", "CMYK", "YCbCr", "HSV")

# TIFF tags
_BITS, _COMPRESSION, _PHOTOMETRIC, _OFFSETS, _SAMPLES, _COUNTS = 258, 259, 262, 273, 277, 279
_PLANAR, _PALETTE, _TILE_OFFSETS, _TILE_COUNTS, _EXTRA, _FORMAT = 284, 320, 324, 325, 338, 339
_WHITE_IS_ZERO, _YCBCR, _LAB = 0, 6, 8
_SUBSAMPLING = 530
_SUBFILE, _SUB_IFDS, _DNG = 254, 330, 50706  # what a page is, pages below it, version of a raw file
# Compressions that Pillow does not read, or not with every libtiff.
_COMPRESSIONS = {
    34661: "JBIG",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG",
    34933: "PNG",
    34934: "JPEG XR",
    50001: "WebP",
    50002: "JPEG XL",
}
# width, height, compression, order of bits, rows of a strip, predictor, size of a tile: of every plane alike
_PLANE_TAGS = (256, 257, _COMPRESSION, 266, 278, 317, 322, 323)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A loaded image in mode RGB; itself if it is that already. name: for the error. Raises ImageError."""
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
    top = 65535
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        top = 4095 if tags.get(_BITS) in (12, (12,)) else 65535
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = top - values
    grey = ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def mend_tiff(image: TiffImagePlugin.TiffImageFile, name: str) -> Image.Image:
    """A TIFF, just opened, so that it decodes to the right pixels: itself, or another image in its place.

    Pillow reads the separate planes of 16-bit samples as 8-bit ones, cannot read some other planes, and takes
    a palette of 8-bit values for black. Raises ImageError.
    """
    tags = image.tag_v2
    # A first page that is a smaller copy, with others below it, is how Nikon, Sony and others write.
    if _DNG in tags or (tags.get(_SUBFILE) in (1, 3, 5) and _SUB_IFDS in tags):
        raise ImageError(
            f"{name}: a camera's raw file, of which only a small preview can be read; develop it to JPEG or "
            "PNG first"
        )
    if image.mode == "P" and max(tags.get(_PALETTE, (256,))) < 256:
        image.load()
        palette = np.array(tags[_PALETTE]).reshape(3, -1).T
        image.putpalette(palette.astype(np.uint8).tobytes())
    if tags.get(_PLANAR) == 2 and tags.get(_SAMPLES, 1) > 1:
        bits, photometric = tags.get(_BITS, (8,)), tags.get(_PHOTOMETRIC)
        if max(bits) > 8 or photometric in (_YCBCR, _LAB) or tags.get(_EXTRA, (2,))[0] != 2:
            return _join_planes(image, name)
    return image


def _join_planes(image: TiffImagePlugin.TiffImageFile, name: str) -> Image.Image:
    """An image whose samples lie in planes: each plane is read as a grey TIFF, then they are put together."""
    tags = image.tag_v2
    n, bits, photometric = tags[_SAMPLES], set(tags.get(_BITS, (8,))), tags.get(_PHOTOMETRIC)
    extra = tags.get(_EXTRA, ())
    n_colours = n - len(extra)
    # raw mode of the joined samples, by the number of colours
    modes = {2: (3, "RGB"), 5: (4, "CMYK"), _YCBCR: (3, "YCbCr")}
    wanted, mode = modes.get(photometric or 0, (0, ""))
    even = tags.get(_SUBSAMPLING, (1, 1)) == (1, 1) or photometric != _YCBCR
    if wanted != n_colours or bits not in ({8}, {16}) or not even or set(tags.get(_FORMAT, (1,))) != {1}:
        raise ImageError(f"{name}: {describe_tiff(image)}; convert it to 8-bit PNG first")
    samples = [np.asarray(_plane(image, i, n)) for i in range(n)]
    if bits == {16}:
        samples = [(plane >> 8).astype(np.uint8) for plane in samples]
    alpha = samples[n_colours] if extra and extra[0] in (1, 2) and mode == "RGB" else None
    joined = Image.merge(mode, [Image.fromarray(plane) for plane in samples[:n_colours]])
    if alpha is not None:
        # as Pillow reads the same samples in one plane
        raw = "RGBA" if extra[0] == 2 else "RGBa"
        data = np.dstack([*samples[:n_colours], alpha]).tobytes()
        joined = Image.frombytes("RGBA", image.size, data, "raw", raw)
    joined.info.update(image.info)
    joined.getexif()[0x0112] = tags.get(274, 1)
    return joined


def _plane(image: TiffImagePlugin.TiffImageFile, index: int, n: int) -> Image.Image:
    """One plane of n as a grey image: the same file, with a list of tags of its own behind its end."""
    tags = image.tag_v2
    assert image.fp is not None
    image.fp.seek(0)
    data = image.fp.read()
    kept: dict[int, Any] = {tag: tags[tag] for tag in _PLANE_TAGS if tag in tags}
    for tag in (_OFFSETS, _COUNTS, _TILE_OFFSETS, _TILE_COUNTS):
        if tag in tags:
            each = len(tags[tag]) // n
            kept[tag] = tags[tag][index * each : (index + 1) * each]
    kept.update({_BITS: tags[_BITS][index], _PHOTOMETRIC: 1, _SAMPLES: 1, _PLANAR: 1})
    order = "<" if data[:2] == b"II" else ">"
    start = len(data) + len(data) % 2
    # Values of more than 4 bytes follow the list. All are written as LONG, which readers take for SHORT too.
    list_bytes, values = b"", b""
    behind = start + 2 + 12 * len(kept) + 4
    for tag, value in sorted(kept.items()):
        numbers = [int(v) for v in np.atleast_1d(value)]
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack(order + "I", behind + len(values)), values + packed
        list_bytes += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    head = data[:4] + struct.pack(order + "I", start) + data[8:].ljust(start - 8, b"\0")
    ifd = struct.pack(order + "H", len(kept)) + list_bytes + bytes(4) + values
    plane = Image.open(io.BytesIO(head + ifd), formats=["TIFF"])
    plane.load()
    return plane


def describe_tiff(image: Any) -> str:
    """What kind of TIFF it is, for people: of an image, or of the tags of one that Pillow does not open."""
    tags = getattr(image, "tag_v2", image)
    kinds = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "L*a*b*"}
    kinds[9] = "ICC L*a*b*"
    photometric = tags.get(_PHOTOMETRIC)
    kind = kinds.get(photometric, f"photometric interpretation {photometric}")
    bits = "/".join(sorted({str(b) for b in np.atleast_1d(tags.get(_BITS, 1))}))
    numbers = {1: "", 2: " signed", 3: " float"}.get(int(np.atleast_1d(tags.get(_FORMAT, 1))[0]), " unusual")
    planes = " in separate planes" if tags.get(_PLANAR) == 2 else ""
    packed = describe_compression(image)
    packed = f", {packed}" if packed else ""
    return f"a TIFF of a kind that is not supported ({kind},{numbers} {bits} bits a sample{planes}{packed})"


def describe_compression(image: Any) -> str:
    """The compression of a TIFF if it is one that Pillow may not read; "" if it is a usual one. image: as for
    `describe_tiff`."""
    compression = getattr(image, "tag_v2", image).get(_COMPRESSION, 1)
    if compression in TiffImagePlugin.COMPRESSION_INFO and compression not in _COMPRESSIONS:
        return ""
    named = _COMPRESSIONS.get(compression)
    return f"{named} compression" if named else f"compression {compression}"
