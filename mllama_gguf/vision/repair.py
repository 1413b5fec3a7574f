"""Files that viewers show and decoders refuse: a PNG's side matters, and ends that are missing.

Nothing here changes a pixel that the file holds. What holds no pixels is left out, an end that only says that
this was the end is put there, and where pixels are really missing a caller must ask for the rest.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

# Chunks with pixels, or without which they cannot be read. A wrong checksum in one of them is damage.
_PNG_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# Chunks that change what a person sees: transparency and the orientation.
_PNG_USED = (b"tRNS", b"eXIf")
# ImageMagick keeps EXIF, and so the orientation, in a text chunk of this name; XMP has one too.
_PNG_TEXT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MOST_TEXT = 1 << 20  # bytes of such a chunk, unpacked
_MOST_TEXTS = 8  # such chunks that are looked at: a file of 1 MB holds a thousand that unpack to 1 MB each

_EOI = b"\xff\xd9"
_MARKER = re.compile(rb"\xff([^\xff\0])", re.DOTALL)
_BLOCK = 2**64 - 1  # a bit for each coefficient of a block
_PIECE = 256
_ZEROS = 1 << 20  # bytes at a time
_SMALL_GREY = (b"\1\0", b"\2\0", b"\4\0")  # bits a sample and kind of colour, as in the head
# First column and row of each pass of an interlaced PNG, and the steps.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
# Bytes in place of lost data: if the image depends on which, data was lost.
_FILL_BYTES = (b"", b"\x35" * 64, b"\xca" * 64)


def clean_png(data: bytes) -> bytes:
    """A PNG file with those chunks alone that make its pixels.

    Text, profiles, times and the frames of an animation are left out, however large, packed or damaged. A
    missing end chunk is put there.

    Damaged pixels are left to the decoder, which refuses them.
    """
    out = [PNG_SIGNATURE]
    ended, n_texts = False, 0
    for kind, body, right in _png_chunks(data):
        if kind in _PNG_NEEDED:
            out.append(_png_chunk(kind, body, right))
            ended = kind == b"IEND"
            if ended:
                break
        elif kind == b"tRNS" and right and len(body) == 2 and out[1:] and out[1][16:18] in _SMALL_GREY:
            # Pillow compares the transparent grey with pixels that it has widened to 8 bits.
            widened = body[1] * 255 // (2 ** out[1][16] - 1)
            out.append(_png_chunk(kind, struct.pack(">H", widened)))
        elif right and kind in _PNG_USED:
            out.append(_png_chunk(kind, body))
        elif right and n_texts < _MOST_TEXTS and body.startswith(_PNG_TEXT):
            n_texts += 1
            if _is_small(kind, body):
                out.append(_png_chunk(kind, body))
    if not ended:
        out.append(_png_chunk(b"IEND", b""))
    return b"".join(out)


def _png_places(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name of each chunk, and where its content begins and would end, up to where the file ends."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], at + 8, at + 8 + length
        at += 12 + length


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Name, content and whether the checksum is right, up to where the file ends, in a chunk perhaps."""
    for kind, start, end in _png_places(data):
        if kind in _PNG_NEEDED or kind in _PNG_USED or kind in (b"zTXt", b"iTXt", b"tEXt"):
            body, checksum = data[start:end], data[end : end + 4]
            # Cut in the checksum alone: what it would have checked is there.
            whole = len(body) == end - start
            expected = struct.pack(">I", zlib.crc32(kind + body))
            yield kind, body, whole and (len(checksum) < 4 or checksum == expected)


def _png_chunk(kind: bytes, body: bytes, right: bool = True) -> bytes:
    checksum = zlib.crc32(kind + body) ^ (not right)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def _is_small(kind: bytes, body: bytes) -> bool:
    """Whether a text chunk is small enough to be unpacked."""
    rest = body.partition(b"\0")[2]
    if kind == b"tEXt":
        return len(rest) <= _MOST_TEXT
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    if kind == b"iTXt" and rest[:1] == b"\0":
        return len(packed) <= _MOST_TEXT
    try:
        return len(zlib.decompressobj().decompress(packed, _MOST_TEXT + 1)) <= _MOST_TEXT
    except zlib.error:
        return False


def png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that the head of a PNG file says; None if it has none that can be used."""
    header = _png_header(data)
    return struct.unpack_from(">II", header) if header else None


def _png_header(data: bytes) -> bytes:
    """The content of the last head before the pixels, which is the one that Pillow takes; b"" if none can be
    used."""
    header = b""
    for kind, start, end in _png_places(data):
        if kind == b"IHDR":
            header = data[start:end]
        elif kind == b"IDAT":
            break
    return header if len(header) == 13 and header[8] in (1, 2, 4, 8, 16) else b""


def fill_png(cleaned: bytes) -> bytes:
    """A cleaned PNG whose missing pixels are zeros.

    As many bytes are unpacked as its head asks for; check `png_size` first.
    """
    header = _png_header(cleaned)
    if not header:
        return cleaned
    missing = _png_bytes(header)
    unpacker, packer = zlib.decompressobj(), zlib.compressobj(1)
    before, pixels, damaged = [], [], False
    for kind, body, _ in _png_chunks(cleaned):
        if kind not in (b"IDAT", b"IEND", b"IHDR"):
            before.append(_png_chunk(kind, body))
        if kind != b"IDAT" or damaged:
            continue
        try:
            for at in range(0, len(body), _PIECE):  # what comes before damage is kept
                if not missing:  # to the unpacker 0 means as many as there are
                    break
                rows = unpacker.decompress(body[at : at + _PIECE], missing)
                missing -= len(rows)
                pixels.append(packer.compress(rows))
        except zlib.error:
            damaged = True
    while missing:
        zeros = bytes(min(missing, _ZEROS))
        missing -= len(zeros)
        pixels.append(packer.compress(zeros))
    pixels.append(packer.flush())
    head, ending = _png_chunk(b"IHDR", header), _png_chunk(b"IEND", b"")
    return b"".join((PNG_SIGNATURE, head, *before, _png_chunk(b"IDAT", b"".join(pixels)), ending))


def _png_bytes(header: bytes) -> int:
    """How many bytes a PNG's pixels are before packing, the filter byte of each row counted."""
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    total = 0
    for x, y, step_x, step_y in _ADAM7 if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-max(width - x, 0) // step_x), -(-max(height - y, 0) // step_y)
        if columns and rows:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def jpeg_endings(data: bytes) -> tuple[bytes, ...]:
    """The bytes that may continue a JPEG file whose end marker is missing; () if it is there.

    If all of them give the same pixels, and `jpeg_scans_complete`, only the marker was missing.
    """
    body = data.rstrip(b"\0")
    if body.endswith(_EOI) or _has_end(data):
        return ()
    cut = data[:-1] if data.endswith(b"\xff") else data
    return tuple(cut + fill + _EOI for fill in _FILL_BYTES)


def _has_end(data: bytes) -> bool:
    """Whether an end marker follows the last scan: cameras and editors append data of their own to it."""
    scan = data.rfind(b"\xff\xda")
    return scan >= 0 and data.find(_EOI, scan) >= 0


def jpeg_scans_complete(data: bytes) -> bool:
    """Whether the scans of a JPEG file, by their heads, bring every bit of every coefficient. A progressive
    image that ends between two scans decodes without an error, but is not the whole image."""
    components: tuple[int, ...] = ()
    progressive = False
    # Of each component a bit for each coefficient whose lowest bit was sent. No loop over coefficients: a
    # scan's head is so short that a file holds millions of them.
    whole: dict[int, int] = {}
    for marker, body in jpeg_heads(data):
        if marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) and len(body) >= 6:
            progressive = marker in (0xC2, 0xCA)
            components = tuple(body[6 + 3 * i] for i in range(body[5]) if 6 + 3 * i < len(body))
        elif marker == 0xDA and body and len(body) >= 1 + 2 * body[0] + 3:
            n = body[0]
            first, last, bits = body[1 + 2 * n : 4 + 2 * n]
            sent = (_BLOCK >> (63 - min(last, 63))) & (_BLOCK << first)
            for component in body[1 : 1 + 2 * n : 2]:
                before = whole.get(component, 0)
                whole[component] = before & ~sent if bits & 15 else before | sent
    if not components or not whole.keys() >= set(components):
        return False
    return not progressive or all(whole[component] == _BLOCK for component in components)


def jpeg_heads(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment with a length; the data of the scans is passed over."""
    at = 2
    # Any number of 0xFF may stand before a marker. "\xff+" would try such a run from each of its bytes.
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        if 0xD0 <= marker <= 0xD9 or marker == 0x01:
            continue
        if at + 2 > len(data):
            return
        (length,) = struct.unpack_from(">H", data, at)
        yield marker, data[at + 2 : at + length]
        at += max(length, 2)
