"""The files of the image cache: how an entry is laid out, and whether it is what was written.

States, `KEY.states`: 64 bytes of header, little-endian: magic "mllama\\x00\\x01", the key's 32 bytes,
n_tiles, n_positions, n_embd, aspect_ratio_id, crc32 of the header (up to here) and the values, 4 zero
bytes; then the values, float32.

Keys and values, `KEY.image_kv` of an image and `KEY.prefix_kv` of a prompt's first tokens: 64 bytes of
header, little-endian: magic "mllama\\x00\\x03", the key's 32 bytes, the number of bytes that follow it
(8 bytes), 16 zero bytes; then these bytes; then the crc32 of all before it. They are large, so they are
written and read in pieces.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Literal, TypeAlias

import numpy as np

from ..backend.types import Bytes, Floats
from ..errors import ImageError

KvKind: TypeAlias = Literal["image_kv", "prefix_kv"]
Kind: TypeAlias = Literal["states"] | KvKind

SUFFIXES: dict[Kind, str] = {"states": ".states", "image_kv": ".image_kv", "prefix_kv": ".prefix_kv"}
OLD_SUFFIXES = (".filling", ".prefix")  # of keys and values in earlier versions
# Piece size of keys and values. Above 10 MB ggml's RPC client first asks the worker whether it has the data
# by hash, and the worker may store it.
PIECE = 8 << 20

_STATES_HEADER = struct.Struct("<8s32s4I")
_STATES_CRC = struct.Struct("<I4x")
_STATES_MAGIC = b"mllama\x00\x01"
_KV_HEADER = struct.Struct("<8s32sQ16x")
_KV_CRC = struct.Struct("<I")
_KV_MAGIC = b"mllama\x00\x03"
KV_OFFSET = _KV_HEADER.size  # where the bytes begin


def states_size(states: Floats) -> int:
    """Bytes of the entry."""
    return _STATES_HEADER.size + _STATES_CRC.size + states.nbytes


def states_parts(key: str, states: Floats, aspect_ratio_id: int) -> list[bytes | memoryview]:
    """The entry of an image's states: C-contiguous float32 [n_tiles, n_positions, n_embd]."""
    header = _STATES_HEADER.pack(_STATES_MAGIC, bytes.fromhex(key), *states.shape, aspect_ratio_id)
    return [header + _STATES_CRC.pack(zlib.crc32(states.data, zlib.crc32(header))), states.data]


def read_states(file: io.FileIO, key: str) -> tuple[Floats, int]:
    """(states, aspect_ratio_id). Raises ImageError for an entry that is not as it was written."""
    header, crc = file.read(_STATES_HEADER.size), file.read(_STATES_CRC.size)
    if len(header) < _STATES_HEADER.size or len(crc) < _STATES_CRC.size:
        raise ImageError("truncated")
    magic, digest, *shape, aspect_ratio_id = _STATES_HEADER.unpack(header)
    n_bytes = 4 * shape[0] * shape[1] * shape[2]
    size = os.fstat(file.fileno()).st_size
    if magic != _STATES_MAGIC or digest.hex() != key or size != file.tell() + n_bytes or not n_bytes:
        raise ImageError("not what its name says")
    states = np.empty(shape, np.float32)
    _read_all(file, states.data.cast("B"))
    if _STATES_CRC.pack(zlib.crc32(states.data, zlib.crc32(header))) != crc:
        raise ImageError("its checksum does not fit")
    return states, int(aspect_ratio_id)


def kv_size(n_bytes: int) -> int:
    """Bytes of an entry that holds n_bytes bytes."""
    return _KV_HEADER.size + n_bytes + _KV_CRC.size


def kv_parts(key: str, n_bytes: int, pieces: Iterable[Bytes]) -> Iterator[bytes | memoryview]:
    """The entry of keys and values: `pieces` of n_bytes in all."""
    header = _KV_HEADER.pack(_KV_MAGIC, bytes.fromhex(key), n_bytes)
    crc = zlib.crc32(header)
    yield header
    for piece in pieces:
        crc = zlib.crc32(piece.data, crc)
        yield piece.data
    yield _KV_CRC.pack(crc)


def read_kv(file: io.FileIO, key: str, n_bytes: int) -> Iterator[Bytes]:
    """The bytes in pieces. A piece is read and checked while the one before it is used, and is there until
    the next one is asked for. Raises ImageError, after the last piece too, for an entry that is not as it
    was written."""
    header = file.read(_KV_HEADER.size)
    expected = _KV_HEADER.pack(_KV_MAGIC, bytes.fromhex(key), n_bytes)
    if header != expected or os.fstat(file.fileno()).st_size != kv_size(n_bytes):
        raise ImageError("truncated, or not what its name says")
    crc = zlib.crc32(header)
    buffers = cycle([np.empty(min(PIECE, n_bytes), np.uint8) for _ in range(2)])

    def read(n: int) -> Bytes:
        nonlocal crc
        piece = next(buffers)[:n]
        _read_all(file, piece.data)
        crc = zlib.crc32(piece.data, crc)
        return piece

    sizes = [min(PIECE, n_bytes - at) for at in range(0, n_bytes, PIECE)]
    with ThreadPoolExecutor(1, "mllama-cache") as reader:
        coming = [reader.submit(read, size) for size in sizes[:1]]
        for size in sizes[1:]:
            piece = coming.pop().result()
            coming.append(reader.submit(read, size))
            yield piece
        for last in coming:
            yield last.result()
    if file.read(_KV_CRC.size) != _KV_CRC.pack(crc):
        raise ImageError("its checksum does not fit")


def _read_all(file: io.FileIO, rest: memoryview) -> None:
    while rest:
        n = file.readinto(rest)
        if not n:
            raise ImageError("truncated")
        rest = rest[n:]
