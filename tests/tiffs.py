"""TIFF files of every kind of sample, written from arrays: Pillow writes only some of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.integer] | npt.NDArray[np.floating]


def ramp(bits: int, n: int, width: int = 23, height: int = 13) -> npt.NDArray[np.int64]:
    """Samples [height, width, n] that run through the whole range, by column and by row in turns."""
    y, x = np.mgrid[:height, :width]
    top = 2**bits - 1
    return np.stack(
        [(y if i % 2 else x) * top // ((height if i % 2 else width) - 1) for i in range(n)], axis=-1
    )


def pack_rows(rows: npt.NDArray[np.integer], bits: int) -> bytes:
    """Samples of any number of bits, each row filled up to whole bytes."""
    digits = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def make_tiff(
    samples: Samples,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    sample_format: int = 1,
    extra: Sequence[int] = (),
    planar: int = 1,
    compression: int = 1,
    reverse_bits: bool = False,
    orientation: int = 1,
    palette: Sequence[int] = (),
) -> bytes:
    """samples [height, width, n]; the rest as TIFF 6.0 numbers it. compression: 1 (none) or 8 (deflate)."""
    height, width, n = samples.shape
    planes = [samples.reshape(height, -1)] if planar == 1 else [samples[..., i] for i in range(n)]
    strips = []
    for plane in planes:
        if bits in (8, 16, 32, 64):
            kind = {1: "u", 2: "i", 3: "f"}[sample_format]
            data = plane.astype(f"{order}{kind}{bits // 8}").tobytes()
        else:
            data = pack_rows(plane, bits)
        if reverse_bits:
            data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, 8)[:, ::-1]).tobytes()
        strips.append(zlib.compress(data) if compression == 8 else data)
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * n),
        259: ("H", [compression]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        274: ("H", [orientation]),
        277: ("H", [n]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [planar]),
        339: ("H", [sample_format] * n),
    }
    if reverse_bits:
        tags[266] = ("H", [2])
    if extra:
        tags[338] = ("H", list(extra))
    if len(palette):
        tags[320] = ("H", [int(v) for v in palette])
    if photometric == 6:
        tags[530] = ("H", [1, 1])

    def values(kind: str, numbers: list[int]) -> bytes:
        return struct.pack(f"{order}{len(numbers)}{kind}", *numbers)

    start = 8 + 2 + 12 * len(tags) + 4
    long = sum((len(values(*tag)) + 3) // 4 * 4 for tag in tags.values() if len(values(*tag)) > 4)
    ends = np.cumsum([0, *(len(strip) for strip in strips)])
    tags[273] = ("I", [start + long + int(end) for end in ends[:-1]])
    heads, behind = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        data = values(kind, numbers)
        if len(data) > 4:
            place, behind = (
                struct.pack(order + "I", start + len(behind)),
                behind + data + bytes(-len(data) % 4),
            )
        else:
            place = data.ljust(4, b"\0")
        heads += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + place
    magic = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return magic + struct.pack(order + "H", len(tags)) + heads + bytes(4) + behind + b"".join(strips)
