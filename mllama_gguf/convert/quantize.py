"""Quantize the text part of a GGUF model with ggml's own kernels.

Which tensors. The matrices of the text: embedding, attention, feed-forward, output. Everything else is copied
byte by byte: norms, gates, all one-dimensional tensors, and the whole vision part (``v.*``, ``mm.*``), for
every target type, bf16 and f16 included.

Which types. Those of llama.cpp's mixes (its ``llama-quant.cpp``, without an importance matrix). Every type
but bf16, f16 and q8_0 gives output.weight Q6_K. q4_k_m and q5_k_m give Q6_K also to attn_v and ffn_down of
the first and last eighth of the layers and of every third between; cross_attn_v_proj counts as attn_v. In
q4_k_m the other attn_v are Q5_K where eight or more heads share one of K and V, as llama.cpp has it for the
70B text of which the 90B is made. Rows that are not multiples of a block get another type: Q4_K becomes
Q5_0, Q5_K Q5_1, Q6_K Q8_0 (as does output.weight of any mix), and where that fails too, F16.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cpus import check_threads, usable_cpus
from ..errors import ModelError
from ..files import check_output, check_room
from ..gguf.reader import GGUFFile, TensorEntry, read_gguf
from ..gguf.writer import GGUF, Job, Progress, counter, new_gguf, write_data, write_head
from ..reading import open_regular, open_unbuffered
from ..words import brief, os_reason

Array = npt.NDArray[Any]
Warn = Callable[[str], object]

logger = logging.getLogger(__name__)

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_LONGEST_NAME = 63  # characters of a tensor's name that ggml reads
# How many values a thread has in memory at a time: at most 4 MB, and its result.
_PIECE_VALUES = 1 << 20


@dataclass(frozen=True)
class Target:
    """What a model can be quantized to."""

    file_type: int  # llama_ftype of llama.h
    default: str
    output: str  # of output.weight
    more: str = ""  # of attn_v and ffn_down in layers that get more bits; "": none do


TARGETS: dict[str, Target] = {
    "q4_k_m": Target(15, "Q4_K", "Q6_K", more="Q6_K"),
    "q5_k_m": Target(17, "Q5_K", "Q6_K", more="Q6_K"),
    "q6_k": Target(18, "Q6_K", "Q6_K"),
    "q8_0": Target(7, "Q8_0", "Q8_0"),
    "q4_0": Target(2, "Q4_0", "Q6_K"),
    "bf16": Target(32, "BF16", "BF16"),
    "f16": Target(1, "F16", "F16"),
}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did."""

    path: Path
    size_before: int  # bytes
    size: int
    types: dict[str, int]  # of the tensors written: how many of each
    fallbacks: dict[str, str]  # tensors whose rows do not fit the type of the mix: what they got instead


# ---- which type a tensor gets ------------------------------------------------------------------------------


def more_bits(layer: int, n_layer: int) -> bool:
    """Whether attn_v and ffn_down of a layer get more bits in a mix."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def is_text_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of the text."""
    return (
        len(shape) == 2
        and min(shape) > 1
        and name.endswith(".weight")
        and not name.startswith(("v.", "mm."))
        and not name.endswith("_norm.weight")
    )


def mix(name: str, target: Target, n_layer: int, heads_per_kv: int) -> str:
    """The ggml type that the mix gives a matrix of the text, without regard to the length of its rows."""
    if name == "output.weight":
        return target.output
    layer = re.match(r"blk\.(\d+)\.(?:(attn_v|cross_attn_v_proj)|ffn_down)\.weight$", name)
    if not target.more or not layer:
        return target.default
    if more_bits(int(layer[1]), n_layer):
        return target.more
    return "Q5_K" if target.default == "Q4_K" and layer[2] and heads_per_kv >= 8 else target.default


def fitting(kind: str, n_per_row: int, name: str = "") -> str:
    """The type, or the nearest that can hold rows of this length."""
    if n_per_row % block(kind)[0] == 0:
        return kind
    kind = "Q8_0" if name == "output.weight" else _FALLBACK.get(kind, "F16")
    return kind if n_per_row % block(kind)[0] == 0 else "F16"


def fallback_words(fallbacks: dict[str, str]) -> str:
    """The warning about them, in one line."""
    first, kind = next(iter(fallbacks.items()))
    more = f" and {len(fallbacks) - 1} more" if len(fallbacks) > 1 else ""
    got = f"{kind} instead" if len(set(fallbacks.values())) == 1 else f"{kind} and others instead"
    return f"{first}{more}: rows are not multiples of the block of the type asked for; {got}"


def block(kind: str) -> tuple[int, int]:
    """Values and bytes of a block of a ggml type."""
    import gguf

    values, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(values), int(n_bytes)


# ---- values ------------------------------------------------------------------------------------------------


def quantize_rows(values: Array, from_type: str, to_type: str, n_per_row: int) -> npt.NDArray[np.uint8]:
    """Rows of one ggml type ("F32", "Q4_K", ...) in another, both as ggml stores them; on this thread alone.

    values: any dtype, whole rows of n_per_row values. Returns uint8 [rows, bytes of a row].
    Raises ModelError for a value that is not finite, or too large for the type.
    """
    import gguf

    from ..backend.library import load

    native = load()
    (size_in, bytes_in), (size_out, bytes_out) = block(from_type), block(to_type)
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    row = n_per_row // size_in * bytes_in
    if n_per_row % size_in or n_per_row % size_out or not row or raw.size % row or not raw.size:
        raise ValueError(f"{raw.size} bytes are not rows of {n_per_row} {from_type} values for {to_type}")
    out = np.empty((raw.size // row, n_per_row // size_out * bytes_out), np.uint8)
    from_number, to_number = (int(gguf.GGMLQuantizationType[kind]) for kind in (from_type, to_type))
    source, result = native.ffi.from_buffer(raw), native.ffi.from_buffer(out, require_writable=True)
    native.check(native.lib.mllama_quantize_rows(from_number, source, to_number, result, len(out), n_per_row))
    return out


def _jobs(file: GGUFFile, entry: TensorEntry, kind: str) -> Iterator[Job]:
    """What makes the data of one tensor of the output."""
    n_per_row = entry.ne[0]
    n_rows = entry.n_values // n_per_row
    row = entry.n_bytes // n_rows
    step = max(1, _PIECE_VALUES // n_per_row)
    for first in range(0, n_rows, step):
        n = min(step, n_rows - first)
        position = file.data_offsets[entry.part] + entry.offset + first * row
        yield partial(_piece, file.paths[entry.part], entry, position, n * row, kind)


def _piece(path: Path, entry: TensorEntry, position: int, n_bytes: int, kind: str) -> Array:
    try:
        with open_unbuffered(path) as f:
            f.seek(position)
            raw = np.fromfile(f, np.uint8, n_bytes)
    except OSError as e:
        raise ModelError(f"{path}: tensor {entry.name} cannot be read: {os_reason(e)}") from e
    if raw.size != n_bytes:
        raise ModelError(f"{path}: tensor {entry.name}: the file has become shorter")
    if kind == entry.type_name:
        return raw
    try:
        return quantize_rows(raw, entry.type_name, kind, entry.ne[0])
    except ModelError as e:
        raise ModelError(f"{path}: tensor {entry.name}: {e}") from e


# ---- the file ----------------------------------------------------------------------------------------------


def quantize(
    in_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    type: str,
    *,
    progress: Progress | None = None,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    overwrite: bool = True,
    warn: Warn = logger.warning,
) -> Quantized:
    """Write a copy of a GGUF model with the matrices of its text in other types.

    type: one of `TARGETS`
    progress: called as progress(done, total) with bytes written
    n_threads: by default all usable CPUs
    allow_requantize: take matrices that are quantized already, which loses more than quantizing once
    overwrite: replace out_path if it is a GGUF file with content; other files with content are never replaced
    warn: called with a warning of one line

    Keys are copied as they are, but for general.file_type and general.quantization_version. The output
    appears under its name only when it is whole; it is one file, also of a split model. Raises ModelError for
    an input that is damaged or not fit, naming the tensor, RequestError for an output that must not be
    written, MllamaError when it cannot be written.
    """
    if type not in TARGETS:
        raise ValueError(f"type {type!r}: one of {', '.join(TARGETS)} is expected")
    if n_threads is not None:
        check_threads(n_threads)
    path = Path(out_path)
    file = read_gguf(in_path)
    _check_input(file)
    target = check_output(out_path, GGUF, inputs=file.paths, overwrite=overwrite)

    kinds, fallbacks = _plan(file, TARGETS[type], allow_requantize)
    if fallbacks:
        warn(fallback_words(fallbacks))
    entries, offset = [], 0
    for entry, kind in zip(file.tensors, kinds, strict=True):
        entries.append(replace(entry, type=_number(kind), offset=offset, part=0))
        offset += entries[-1].n_bytes + -entries[-1].n_bytes % file.alignment
    keys = _keys(file, TARGETS[type].file_type)
    check_room([(target, offset + sum(map(len, keys)))])

    tick = counter(progress, sum(entry.n_bytes for entry in entries))
    with new_gguf(path, overwrite=overwrite) as out:
        write_head(out, keys, entries, file.alignment)
        write_data(
            out,
            (
                (new.n_bytes, _jobs(file, old, kind))
                for old, new, kind in zip(file.tensors, entries, kinds, strict=True)
            ),
            alignment=file.alignment,
            n_threads=n_threads or usable_cpus(),
            tick=tick,
        )
    return Quantized(path, file.size, path.stat().st_size, dict(Counter(kinds)), fallbacks)


def _number(kind: str) -> int:
    import gguf

    return int(gguf.GGMLQuantizationType[kind])


def _check_input(file: GGUFFile) -> None:
    """The tensor table against the file, and what this program can quantize at all."""
    if file.architecture != "mllama":
        raise ModelError(f"{file.path}: architecture {brief(file.architecture)}, expected 'mllama'")
    if not file.has_text:
        raise ModelError(f"{file.path}: holds no text model; the vision encoder is never quantized")
    sizes = [path.stat().st_size for path in file.paths]
    names = Counter(t.name for t in file.tensors)
    for t in file.tensors:
        path = file.paths[t.part]
        if not t.name.isprintable() or len(t.name) > _LONGEST_NAME:
            raise ModelError(f"{path}: damaged GGUF header: a tensor is named {brief(t.name)}")
        if names[t.name] > 1:
            raise ModelError(f"{path}: tensor {t.name} is there twice")
        if not t.ne or not t.n_bytes or t.ne[0] % block(t.type_name)[0]:
            raise ModelError(f"{path}: tensor {t.name}: {list(t.ne)} of {t.type_name} cannot be read")
        if file.data_offsets[t.part] + t.offset + t.n_bytes > sizes[t.part]:
            raise ModelError(f"{path}: the file is truncated or damaged at tensor {t.name}")


def _plan(file: GGUFFile, target: Target, allow_requantize: bool) -> tuple[list[str], dict[str, str]]:
    """The type of each tensor of the output, and the types of those that fell back."""
    n_layer, n_head, n_head_kv = (
        _count(file, f"mllama.{key}")
        for key in ("block_count", "attention.head_count", "attention.head_count_kv")
    )
    kinds, fallbacks = [], {}
    for t in file.tensors:
        kind = t.type_name
        if is_text_matrix(t.name, t.ne):
            asked = mix(t.name, target, n_layer, n_head // n_head_kv)
            wanted = fitting(asked, t.ne[0], t.name)
            if wanted != kind and kind not in ("F32", "F16", "BF16") and not allow_requantize:
                raise ModelError(
                    f"{file.path}: tensor {t.name} is quantized already ({kind}); start from the F16, BF16 "
                    "or F32 model, or use --allow-requantize, which loses more"
                )
            kind = wanted
            if wanted != asked:
                fallbacks[t.name] = wanted
        kinds.append(kind)
    return kinds, fallbacks


def _count(file: GGUFFile, key: str) -> int:
    value = file.keys.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{file.path}: key {key!r} is {brief(value)}, expected a number from 1")
    return value


def _keys(file: GGUFFile, file_type: int) -> list[bytes]:
    """Every key as it is stored, but for those of a split model, and the two that say how the file is
    quantized."""
    ours = {"general.file_type": file_type, "general.quantization_version": QUANTIZATION_VERSION}
    with open_regular(file.path) as f:
        keys = []
        for name, (start, end) in file.key_spans.items():
            if name.startswith("split."):
                continue
            f.seek(start)
            keys.append(_uint32_key(name, ours.pop(name)) if name in ours else f.read(end - start))
    return keys + [_uint32_key(name, value) for name, value in ours.items()]


def _uint32_key(name: str, value: int) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<II", 4, value)
