"""Convert a Hugging Face Mllama checkpoint (Llama 3.2 Vision) to GGUF, in our canonical layout.

The canonical layout is described in the documentation of the file formats: text tensors named as llama.cpp
names them for Llama, vision tensors under ``v.`` and ``mm.``, cross-attention and vision rows left as they
are in the checkpoint, the rows of the text's self-attention q and k reordered for ggml's interleaved RoPE,
vision gates stored with tanh already applied. Every file that is written here says so in the key
``mllama.converter``.

Tensors are streamed in pieces of rows, so memory stays small whatever the size of the model, and converted
with numpy alone, bfloat16 included; only quantized types need the native library.

Types. Matrices take the type asked for (``type`` for the text, ``vision_type`` for the vision part, the
projector included); the quantized types of the text are the mixes of `quantize`. These are always F32: 1-D
tensors (norms, biases, gates, class embedding, RoPE factors) and the small position tables
``v.position_embd``, ``v.pre_tile_position_embd`` and ``v.post_tile_position_embd``. The large table
``v.tile_position_embd`` (74 M values at 11B) takes the vision type. `plan` lists every tensor with its type.

GGUF itself: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import MllamaError, ModelError
from ..gguf.writer import Job, Progress, cannot_write, check_outputs, counter, replacing, write_data
from .checkpoint import (
    SAFETENSORS_TYPES,
    Checkpoint,
    Shape,
    Source,
    Tokenizer,
    check_preprocessor,
    read_shape,
    read_tokenizer,
    rope_factors,
)
from .quantize import (
    QUANTIZATION_VERSION,
    TARGETS,
    Warn,
    block,
    fallback_words,
    fitting,
    is_text_matrix,
    mix,
    quantize_rows,
)

Array = npt.NDArray[Any]
FloatType = Literal["f32", "f16", "bf16"]

FLOAT_TYPES: tuple[FloatType, ...] = ("f32", "f16", "bf16")
TYPES: tuple[str, ...] = ("f32", *TARGETS)

logger = logging.getLogger(__name__)

# How many values a thread has in memory at a time: 4 MB as float32, and copies.
_CHUNK_VALUES = 1 << 20
_ALL_F32 = 0  # llama_ftype of llama.h
_ALIGNMENT = 32


# ------------------------------------------------------------------------------------------------------------
# The plan: every tensor of the output


@dataclass(frozen=True)
class Tensor:
    """One tensor of the output and where it comes from. Shapes are in the order of numpy, slowest dimension
    first."""

    name: str
    shape: tuple[int, ...]
    part: Literal["text", "vision"]
    type: str  # of ggml, in lower case
    source: Source | None = None
    rope_head_dim: int = 0  # > 0: reorder the rows of each head for interleaved RoPE
    gate: Literal["", "tanh", "1-tanh"] = ""
    value: Array | None = None  # instead of a source

    @property
    def n_bytes(self) -> int:
        n_values, n_bytes = block(self.type.upper())
        return math.prod(self.shape) // n_values * n_bytes


def plan(
    checkpoint: Checkpoint, shape: Shape, type: str = "bf16", vision_type: FloatType = "bf16"
) -> list[Tensor]:
    """Every tensor of the output, in the order of the file, with sources checked for presence, shape and
    type. type: one of `TYPES`."""
    tensors: list[Tensor] = []
    used: set[str] = set()

    def add(
        name: str,
        old: str,
        *dims: int,
        matrix: bool = False,
        out: tuple[int, ...] | None = None,
        rope: bool = False,
        gate: Literal["", "tanh", "1-tanh"] = "",
    ) -> None:
        source = checkpoint.sources.get(old)
        if source is None:
            raise ModelError(f"{checkpoint.directory}: tensor {old} is missing")
        used.add(old)
        stored = tuple(n for n in source.shape) if source.shape else (1,)
        if stored != dims:
            raise ModelError(
                f"{source.file}: tensor {source.name} has shape {list(stored)}, {list(dims)} expected"
            )
        if source.dtype not in SAFETENSORS_TYPES:
            raise ModelError(
                f"{source.file}: tensor {source.name} has type {source.dtype}, a float type is expected"
            )
        part: Literal["text", "vision"] = "vision" if name.startswith(("v.", "mm.")) else "text"
        kind: str = (vision_type if part == "vision" else type) if matrix else "f32"
        if kind not in FLOAT_TYPES:
            asked = mix(name, TARGETS[kind], shape.n_layer, shape.n_head // shape.n_head_kv)
            kind = fitting(asked, dims[-1], name).lower()
        tensors.append(Tensor(name, out or dims, part, kind, source, shape.head_dim if rope else 0, gate))

    def matrix(name: str, old: str, rows: int, columns: int, rope: bool = False) -> None:
        add(f"{name}.weight", f"{old}.weight", rows, columns, matrix=True, rope=rope)

    def layer_norm(name: str, old: str) -> None:
        add(f"{name}.weight", f"{old}.weight", shape.vision_embd)
        add(f"{name}.bias", f"{old}.bias", shape.vision_embd)

    # Text
    d, q, kv = shape.n_embd, shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    embed = checkpoint.sources.get("language_model.model.embed_tokens.weight")
    # Some extra rows follow the vocabulary (8 in transformers); the image token uses the first of them.
    n_rows = embed.shape[0] if embed is not None and embed.shape else 0
    matrix(
        "token_embd",
        "language_model.model.embed_tokens",
        max(n_rows, shape.vocab_size, shape.image_token_id + 1),
        d,
    )
    factors = rope_factors(shape, checkpoint.config_file)
    if factors is not None:
        tensors.append(Tensor("rope_freqs.weight", factors.shape, "text", "f32", value=factors))
    for i in range(shape.n_layer):
        out, old = f"blk.{i}", f"language_model.model.layers.{i}"
        add(f"{out}.attn_norm.weight", f"{old}.input_layernorm.weight", d)
        if i in shape.cross_layers:
            matrix(f"{out}.cross_attn_q_proj", f"{old}.cross_attn.q_proj", q, d)
            matrix(f"{out}.cross_attn_k_proj", f"{old}.cross_attn.k_proj", kv, d)
            matrix(f"{out}.cross_attn_v_proj", f"{old}.cross_attn.v_proj", kv, d)
            matrix(f"{out}.cross_attn_o_proj", f"{old}.cross_attn.o_proj", d, q)
            add(f"{out}.cross_attn_q_norm.weight", f"{old}.cross_attn.q_norm.weight", shape.head_dim)
            add(f"{out}.cross_attn_k_norm.weight", f"{old}.cross_attn.k_norm.weight", shape.head_dim)
            add(f"{out}.cross_attn_attn_gate", f"{old}.cross_attn_attn_gate", 1)
            add(f"{out}.cross_attn_mlp_gate", f"{old}.cross_attn_mlp_gate", 1)
        else:
            matrix(f"{out}.attn_q", f"{old}.self_attn.q_proj", q, d, rope=True)
            matrix(f"{out}.attn_k", f"{old}.self_attn.k_proj", kv, d, rope=True)
            matrix(f"{out}.attn_v", f"{old}.self_attn.v_proj", kv, d)
            matrix(f"{out}.attn_output", f"{old}.self_attn.o_proj", d, q)
        add(f"{out}.ffn_norm.weight", f"{old}.post_attention_layernorm.weight", d)
        matrix(f"{out}.ffn_gate", f"{old}.mlp.gate_proj", shape.n_ff, d)
        matrix(f"{out}.ffn_up", f"{old}.mlp.up_proj", shape.n_ff, d)
        matrix(f"{out}.ffn_down", f"{old}.mlp.down_proj", d, shape.n_ff)
    add("output_norm.weight", "language_model.model.norm.weight", d)
    matrix("output", "language_model.lm_head", shape.vocab_size, d)

    # Vision
    w, p, tiles = shape.vision_embd, shape.patch_size, shape.max_tiles
    ids = shape.n_ratios + 1  # id 0 means no image
    v = "vision_model"
    add("v.class_embd", f"{v}.class_embedding", w)
    add("v.patch_embd.weight", f"{v}.patch_embedding.weight", w, shape.channels, p, p, matrix=True)
    table = f"{v}.gated_positional_embedding"
    add("v.position_embd.weight", f"{table}.embedding", shape.n_positions, w)
    add("v.position_embd.gate", f"{table}.gate", 1, gate="1-tanh")
    add(
        "v.tile_position_embd.weight",
        f"{table}.tile_embedding.weight",
        ids,
        tiles * shape.n_positions * w,
        matrix=True,
    )
    add("v.tile_position_embd.gate", f"{table}.gate", 1, gate="tanh")
    for which in ("pre", "post"):
        table = f"{v}.{which}_tile_positional_embedding"
        add(f"v.{which}_tile_position_embd.weight", f"{table}.embedding.weight", ids, tiles * w)
        add(f"v.{which}_tile_position_embd.gate", f"{table}.gate", 1, gate="tanh")
    layer_norm("v.pre_ln", f"{v}.layernorm_pre")
    layer_norm("v.post_ln", f"{v}.layernorm_post")
    for prefix, group, n_layers in (
        ("v.blk", "transformer", shape.vision_layers),
        ("v.global.blk", "global_transformer", shape.vision_global_layers),
    ):
        for i in range(n_layers):
            out, old = f"{prefix}.{i}", f"{v}.{group}.layers.{i}"
            layer_norm(f"{out}.attn_norm", f"{old}.input_layernorm")
            matrix(f"{out}.attn_q", f"{old}.self_attn.q_proj", w, w)
            matrix(f"{out}.attn_k", f"{old}.self_attn.k_proj", w, w)
            matrix(f"{out}.attn_v", f"{old}.self_attn.v_proj", w, w)
            matrix(f"{out}.attn_output", f"{old}.self_attn.o_proj", w, w)
            layer_norm(f"{out}.ffn_norm", f"{old}.post_attention_layernorm")
            matrix(f"{out}.ffn_up", f"{old}.mlp.fc1", shape.vision_ff, w)
            add(f"{out}.ffn_up.bias", f"{old}.mlp.fc1.bias", shape.vision_ff)
            matrix(f"{out}.ffn_down", f"{old}.mlp.fc2", w, shape.vision_ff)
            add(f"{out}.ffn_down.bias", f"{old}.mlp.fc2.bias", w)
            if group == "global_transformer":
                add(f"{out}.attn_gate", f"{old}.gate_attn", 1, gate="tanh")
                add(f"{out}.ffn_gate", f"{old}.gate_ffn", 1, gate="tanh")
    matrix("mm.0", "multi_modal_projector", d, w * (1 + len(shape.intermediate)))
    add("mm.0.bias", "multi_modal_projector.bias", d)

    unknown = sorted(set(checkpoint.sources) - used)
    if unknown:
        source = checkpoint.sources[unknown[0]]
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ModelError(
            f"{source.file}: tensor {source.name}{more} does not belong to the model of config.json"
        )
    return tensors


# ------------------------------------------------------------------------------------------------------------
# Reading and converting values


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
    """Values as stored in safetensors (bfloat16 as its bits) to the output type (likewise). Checks for NaN
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
    """What makes the data of a tensor in its output type, in pieces of whole rows."""
    value = tensor.value
    if value is not None:
        yield lambda: value
        return
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    unit = tensor.rope_head_dim or 1
    step = max(unit, _CHUNK_VALUES // max(columns, 1) // unit * unit)
    for first in range(0, rows, step):
        yield partial(_read_piece, tensor, first, min(step, rows - first))


def read_pieces(tensor: Tensor) -> Iterator[Array]:
    """The values of a tensor in its output type, in pieces of whole rows (bfloat16 as uint16, quantized rows
    as uint8)."""
    for job in piece_jobs(tensor):
        yield job()


def _read_piece(tensor: Tensor, first: int, n: int) -> Array:
    """Rows first to first + n."""
    source = tensor.source
    assert source is not None
    columns, dtype = math.prod(tensor.shape[1:]), np.dtype(SAFETENSORS_TYPES[source.dtype])
    where = f"{source.file}: tensor {source.name}"
    try:
        with source.file.open("rb", buffering=0) as f:
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


# ------------------------------------------------------------------------------------------------------------
# Writing


def _version() -> str:
    try:
        return metadata.version("mllama_gguf")
    except metadata.PackageNotFoundError:
        return "unknown"


def _writer(
    path: Path,
    parts: tuple[str, ...],
    shape: Shape,
    tokenizer: Tokenizer,
    name: str,
    file_type: str,
    tensors: list[Tensor],
) -> Any:
    """A GGUFWriter with all keys and the list of tensors, nothing written yet."""
    import gguf  # a moment to import: only when needed

    w = gguf.GGUFWriter(None, "mllama")
    w.add_string("general.type", "model" if "text" in parts else "projector")
    w.add_string("general.name", name)
    w.add_uint32("general.file_type", TARGETS[file_type].file_type if file_type in TARGETS else _ALL_F32)
    w.add_uint32("general.quantization_version", QUANTIZATION_VERSION)
    w.add_string("mllama.converter", f"mllama_gguf {_version()}")
    integers = gguf.GGUFValueType.INT32

    def int_array(key: str, values: tuple[int, ...] | list[int]) -> None:
        w.add_key_value(key, list(values), gguf.GGUFValueType.ARRAY, sub_type=integers)

    if "text" in parts:
        w.add_uint32("mllama.vocab_size", shape.vocab_size)
        w.add_uint32("mllama.context_length", shape.n_ctx)
        w.add_uint32("mllama.embedding_length", shape.n_embd)
        w.add_uint32("mllama.block_count", shape.n_layer)
        w.add_uint32("mllama.feed_forward_length", shape.n_ff)
        w.add_uint32("mllama.attention.head_count", shape.n_head)
        w.add_uint32("mllama.attention.head_count_kv", shape.n_head_kv)
        if shape.head_dim * shape.n_head != shape.n_embd:
            w.add_uint32("mllama.attention.key_length", shape.head_dim)
            w.add_uint32("mllama.attention.value_length", shape.head_dim)
        w.add_float32("mllama.attention.layer_norm_rms_epsilon", shape.rms_eps)
        int_array("mllama.attention.cross_attention_layers", shape.cross_layers)
        w.add_float32("mllama.rope.freq_base", shape.rope_theta)
        w.add_uint32("mllama.rope.dimension_count", shape.head_dim)
    if "vision" in parts:
        w.add_uint32("mllama.vision.image_size", shape.image_size)
        w.add_uint32("mllama.vision.patch_size", shape.patch_size)
        w.add_uint32("mllama.vision.num_channels", shape.channels)
        w.add_uint32("mllama.vision.max_num_tiles", shape.max_tiles)
        w.add_uint32("mllama.vision.embedding_length", shape.vision_embd)
        w.add_uint32("mllama.vision.block_count", shape.vision_layers)
        w.add_uint32("mllama.vision.global.block_count", shape.vision_global_layers)
        w.add_uint32("mllama.vision.feed_forward_length", shape.vision_ff)
        w.add_uint32("mllama.vision.attention.head_count", shape.vision_head)
        w.add_float32("mllama.vision.attention.layer_norm_epsilon", shape.vision_eps)
        w.add_uint32("mllama.vision.projection_dim", shape.n_embd)
        int_array("mllama.vision.intermediate_layers_indices", shape.intermediate)
    if "text" in parts:
        w.add_string("tokenizer.ggml.model", "gpt2")
        w.add_string("tokenizer.ggml.pre", tokenizer.pre)
        w.add_array("tokenizer.ggml.tokens", tokenizer.tokens)
        int_array("tokenizer.ggml.token_type", tokenizer.types)
        w.add_array("tokenizer.ggml.merges", tokenizer.merges)
        for role, i in tokenizer.special.items():
            w.add_uint32(f"tokenizer.ggml.{role}_token_id", i)
        int_array("tokenizer.ggml.eos_token_ids", tokenizer.eos_ids)
        w.add_bool("tokenizer.ggml.add_bos_token", tokenizer.add_bos)
        if tokenizer.chat_template:
            w.add_string("tokenizer.chat_template", tokenizer.chat_template)

    for t in tensors:
        kind = gguf.GGMLQuantizationType[t.type.upper()]
        w.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, raw_dtype=kind)
    w.path = path
    return w


def _write_file(writer: Any, tensors: list[Tensor], n_threads: int, tick: Callable[[int], None]) -> None:
    """Write one GGUF. Tensor data goes past the writer's own method, which wants a whole tensor at once."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        data = ((tensor.n_bytes, piece_jobs(tensor)) for tensor in tensors)
        write_data(out, data, alignment=_ALIGNMENT, n_threads=n_threads, tick=tick)
        out.flush()
    finally:
        for f in writer.fout or []:
            with suppress(OSError):  # an error in closing would hide the one that led here
                f.close()


def convert(
    hf_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    single_file: bool = False,
    type: str = "bf16",
    vision_type: FloatType | None = None,
    name: str | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
    warn: Warn = logger.warning,
) -> list[Path]:
    """Convert a Hugging Face checkpoint directory to GGUF and return the files written.

    The text goes to ``out`` and the vision part to ``mmproj``, by default ``<out without .gguf>-mmproj.gguf``
    beside it; with ``single_file`` all goes to ``out``. ``type`` is the type of the text matrices
    (one of `TYPES`), ``vision_type`` that of the vision matrices: by default as ``type``, bf16 if that is a
    quantized type. ``name`` is the model's name, by default that of the directory. ``n_threads``: by default
    all usable CPUs. ``progress(done, total)`` is called with bytes written, ``warn`` with a line for people.
    Files appear under their names only when all are complete. Raises `ModelError` for a checkpoint that is
    damaged or not supported, `MllamaError` when the output cannot be written.
    """
    from ..model import usable_cpus

    floats: FloatType = next((t for t in FLOAT_TYPES if t == type), "bf16")
    vision = floats if vision_type is None else vision_type
    for given, known in ((type, TYPES), (vision, FLOAT_TYPES)):
        if given not in known:
            raise ValueError(f"type {given!r}: one of {', '.join(known)} is expected")
    if n_threads is not None and n_threads < 1:
        raise ValueError(f"n_threads is {n_threads}, expected 1 or more")
    if single_file and mmproj is not None:
        raise ValueError("single_file and mmproj exclude each other")
    text_path = Path(out)
    if single_file:
        layout: list[tuple[Path, tuple[str, ...]]] = [(text_path, ("text", "vision"))]
    else:
        stem = text_path.name.removesuffix(".gguf")
        vision_path = text_path.with_name(f"{stem}-mmproj.gguf") if mmproj is None else Path(mmproj)
        if vision_path.resolve() == text_path.resolve():
            raise MllamaError(f"{text_path}: text and vision go to different files, or use single_file")
        layout = [(text_path, ("text",)), (vision_path, ("vision",))]

    checkpoint = Checkpoint(hf_dir)
    shape = read_shape(checkpoint)
    check_preprocessor(checkpoint, shape)
    tokenizer = read_tokenizer(checkpoint, shape)
    tensors = plan(checkpoint, shape, type, vision)
    name = name or Path(os.path.abspath(hf_dir)).name

    outputs = [(path, parts, [t for t in tensors if t.part in parts]) for path, parts in layout]
    check_outputs((path, sum(t.n_bytes for t in chosen)) for path, _, chosen in outputs)
    fallbacks = _fallbacks(tensors, type, shape)
    if fallbacks:
        warn(fallback_words(fallbacks))

    tick = counter(progress, sum(t.n_bytes for t in tensors))
    with replacing([path for path, _, _ in outputs]) as temporary:
        for temp, (path, parts, chosen) in zip(temporary, outputs, strict=True):
            file_type = type if "text" in parts else vision
            try:
                writer = _writer(temp, parts, shape, tokenizer, name, file_type, chosen)
                _write_file(writer, chosen, n_threads or usable_cpus(), tick)
            except OSError as e:
                raise cannot_write(path, e) from e
    return [path for path, _, _ in outputs]


def _fallbacks(tensors: list[Tensor], type: str, shape: Shape) -> dict[str, str]:
    """The text matrices whose rows do not fit the type of the mix, and the types they get."""
    if type in FLOAT_TYPES:
        return {}
    share = shape.n_head // shape.n_head_kv
    return {
        t.name: t.type.upper()
        for t in tensors
        if is_text_matrix(t.name, t.shape)
        and t.type.upper() != mix(t.name, TARGETS[type], shape.n_layer, share)
    }
