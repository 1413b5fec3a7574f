"""Convert the values of a tensor: float types, RoPE rows, gates, quantized rows.

A tensor is read and converted in pieces of whole rows, so memory stays small for any size of model. All of it
is numpy, bfloat16 included; only quantized types need the native library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..gguf.writer import Job
from ..reading import open_unbuffered
from .checkpoint import SAFETENSORS_TYPES
from .quantize import quantize_rows
from .tensors import FLOAT_TYPES, Array, Tensor

# Values that a thread has in memory at a time: 4 MB as float32, and copies.
_CHUNK_VALUES = 1 << 20


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16, given as its bits: exact, a bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round finite float32 values to bfloat16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + (np.uint32(0x7FFF) + even)) >> np.uint32(16)).astype(np.uint16)


def permute_rope_rows(rows: Array, head_dim: int) -> Array:
    """Reorder the rows of q or k of each head from halves (HF: rotate i with i + d/2) to pairs (ggml: 2i with
    2i + 1)."""
    n = rows.shape[0]
    return rows.reshape(n // head_dim, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(n, -1)


def apply_gate(value: Array, gate: str) -> npt.NDArray[np.float32]:
    """The gate as it multiplies: tanh(g) or 1 - tanh(g), computed in double precision."""
    t = np.tanh(value.astype(np.float64))
    return (1.0 - t if gate == "1-tanh" else t).astype(np.float32)


def _encode(raw: Array, dtype: str, type: str, where: str) -> Array:
    """Values as stored in safetensors to the output type; bfloat16 is given as its bits. Checks for NaN
    and infinity."""
    if dtype == "BF16":
        if np.any((raw & 0x7F80) == 0x7F80):
            raise ModelError(f"{where}: holds a value that is not finite")
        if type == "bf16":
            return raw
        values = bf16_to_f32(raw)
    else:
        if not np.isfinite(raw).all():
            raise ModelError(f"{where}: holds a value that is not finite")
        if (dtype, type) == ("F16", "f16"):
            return raw
        with np.errstate(over="ignore"):
            values = raw.astype(np.float32)
    if type == "f32":
        converted: Array = values
        finite = bool(np.isfinite(values).all())
    elif type == "f16":
        with np.errstate(over="ignore"):
            converted = values.astype(np.float16)
        finite = bool(np.isfinite(converted).all())
    else:
        converted = f32_to_bf16(values)
        finite = not bool(np.any((converted & 0x7F80) == 0x7F80))
    if not finite:
        raise ModelError(f"{where}: the value {np.abs(values).max():g} is too large for {type}")
    return converted


def piece_jobs(tensor: Tensor) -> Iterator[Job]:
    """Jobs that each give a piece of whole rows of a tensor, in its output type (bfloat16 as uint16,
    quantized rows as uint8)."""
    value = tensor.value
    if value is not None:
        yield lambda: value
        return
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    unit = tensor.rope_head_dim or 1
    step = max(unit, _CHUNK_VALUES // max(columns, 1) // unit * unit)
    for first in range(0, rows, step):
        yield partial(_read_piece, tensor, first, min(step, rows - first))


def _read_piece(tensor: Tensor, first: int, n: int) -> Array:
    """Rows first to first + n."""
    source = tensor.source
    assert source is not None
    columns, dtype = math.prod(tensor.shape[1:]), np.dtype(SAFETENSORS_TYPES[source.dtype])
    where = f"{source.file}: tensor {source.name}"
    try:
        with open_unbuffered(source.file) as f:
            f.seek(source.offset + first * columns * dtype.itemsize)
            raw = np.fromfile(f, dtype=dtype, count=n * columns)
    except OSError as e:
        raise ModelError(f"{where}: cannot be read: {e}") from e
    if raw.size != n * columns:
        raise ModelError(f"{where}: the file is truncated")
    if tensor.rope_head_dim:
        raw = permute_rope_rows(raw.reshape(n, columns), tensor.rope_head_dim)
    if tensor.gate:
        return apply_gate(_encode(raw, source.dtype, "f32", where), tensor.gate)
    if tensor.type in FLOAT_TYPES:
        return _encode(raw, source.dtype, tensor.type, where)
    stored = source.dtype
    if stored == "F64":
        raw, stored = _encode(raw, stored, "f32", where), "F32"
    try:
        return quantize_rows(raw, stored, tensor.type.upper(), columns)
    except ModelError as e:
        raise ModelError(f"{where}: {e}") from e
