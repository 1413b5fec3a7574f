"""Convert a Hugging Face Mllama checkpoint (Llama 3.2 Vision) to GGUF, in our canonical layout.

The canonical layout (docs/formats.md):

- Text tensors have the names that llama.cpp gives a Llama. Vision tensors begin with ``v.`` or ``mm.``.
- The rows of q and k of the text's self-attention are reordered for ggml's interleaved RoPE.
- The rows of cross-attention and of the vision encoder keep the order of the checkpoint.
- Vision gates are stored with tanh applied.
- The key ``mllama.converter`` names this converter, in every file.

GGUF itself: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..cpus import check_threads, usable_cpus
from ..files import check_distinct, check_output, check_room
from ..gguf.writer import GGUF, Progress, counter, new_gguf, write_data
from .checkpoint import Checkpoint
from .quantize import QUANTIZATION_VERSION, TARGETS, Warn, fallback_words, is_text_matrix, mix
from .shape import Shape, check_preprocessor, read_shape
from .tensors import FLOAT_TYPES, TYPES, FloatType, Tensor, plan
from .tokenizer import Tokenizer, read_tokenizer
from .values import piece_jobs

logger = logging.getLogger(__name__)

_ALL_F32 = 0  # llama_ftype of llama.h
_ALIGNMENT = 32


def _version() -> str:
    try:
        return metadata.version("mllama_gguf")
    except metadata.PackageNotFoundError:
        return "unknown"


def _writer(
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
    if "text" in parts:
        _add_text_keys(w, shape)
    if "vision" in parts:
        _add_vision_keys(w, shape)
    if "text" in parts:
        _add_tokenizer_keys(w, tokenizer)
    for t in tensors:
        kind = gguf.GGMLQuantizationType[t.type.upper()]
        w.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, raw_dtype=kind)
    return w


def _add_text_keys(w: Any, shape: Shape) -> None:
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
    _add_integers(w, "mllama.attention.cross_attention_layers", shape.cross_layers)
    w.add_float32("mllama.rope.freq_base", shape.rope_theta)
    w.add_uint32("mllama.rope.dimension_count", shape.head_dim)


def _add_vision_keys(w: Any, shape: Shape) -> None:
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
    _add_integers(w, "mllama.vision.intermediate_layers_indices", shape.intermediate)


def _add_tokenizer_keys(w: Any, tokenizer: Tokenizer) -> None:
    w.add_string("tokenizer.ggml.model", "gpt2")
    w.add_string("tokenizer.ggml.pre", tokenizer.pre)
    w.add_array("tokenizer.ggml.tokens", tokenizer.tokens)
    _add_integers(w, "tokenizer.ggml.token_type", tokenizer.types)
    w.add_array("tokenizer.ggml.merges", tokenizer.merges)
    for role, i in tokenizer.special.items():
        w.add_uint32(f"tokenizer.ggml.{role}_token_id", i)
    _add_integers(w, "tokenizer.ggml.eos_token_ids", tokenizer.eos_ids)
    w.add_bool("tokenizer.ggml.add_bos_token", tokenizer.add_bos)
    if tokenizer.chat_template:
        w.add_string("tokenizer.chat_template", tokenizer.chat_template)


def _add_integers(w: Any, key: str, values: Sequence[int]) -> None:
    from gguf import GGUFValueType

    w.add_key_value(key, list(values), GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32)


def _write_file(
    writer: Any, out: BinaryIO, tensors: list[Tensor], n_threads: int, tick: Callable[[int], None]
) -> None:
    """Write one GGUF. Data is written in pieces; the writer's own method needs whole tensors."""
    from gguf.gguf_writer import WriterState

    writer.fout, writer.state = [out], WriterState.EMPTY  # as if it had opened the file itself
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(out, out.tell())
    data = ((tensor.n_bytes, piece_jobs(tensor)) for tensor in tensors)
    write_data(out, data, alignment=_ALIGNMENT, n_threads=n_threads, tick=tick)
    out.flush()


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
    overwrite: bool = True,
    progress: Progress | None = None,
    warn: Warn = logger.warning,
) -> list[Path]:
    """Convert a Hugging Face checkpoint directory to GGUF and return the files written.

    The text goes to ``out`` and the vision part to ``mmproj``, by default ``<out without .gguf>-mmproj.gguf``
    beside it; with ``single_file`` all goes to ``out``. ``type`` is the type of the text matrices
    (one of `TYPES`), ``vision_type`` that of the vision matrices: by default as ``type``, bf16 if that is a
    quantized type. ``name`` is the model's name, by default that of the directory. ``n_threads``: by default
    all usable CPUs. ``overwrite`` replaces outputs that are GGUF files; other files with content are never
    replaced. ``progress(done, total)`` is called with bytes written, ``warn`` with a warning of one line.
    Files appear under their names only when all are complete. Raises `ModelError` for a checkpoint that is
    damaged or not supported, `RequestError` for an output that must not be written, `MllamaError` when it
    cannot be written.
    """
    floats: FloatType = next((t for t in FLOAT_TYPES if t == type), "bf16")
    vision = floats if vision_type is None else vision_type
    for given, known in ((type, TYPES), (vision, FLOAT_TYPES)):
        if given not in known:
            raise ValueError(f"type {given!r}: one of {', '.join(known)} is expected")
    if n_threads is not None:
        check_threads(n_threads)
    if single_file and mmproj is not None:
        raise ValueError("single_file and mmproj exclude each other")
    layout = _layout(os.fspath(out), None if mmproj is None else os.fspath(mmproj), single_file)

    checkpoint = Checkpoint(hf_dir)
    inputs = checkpoint.files()
    targets = [check_output(path, GGUF, inputs=inputs, overwrite=overwrite) for path, _ in layout]
    shape = read_shape(checkpoint)
    check_preprocessor(checkpoint, shape)
    tensors = plan(checkpoint, shape, type, vision)  # before anything is made as large as config.json says
    tokenizer = read_tokenizer(checkpoint, shape)
    name = (name or Path(os.path.abspath(hf_dir)).name).encode("utf-8", "replace").decode()

    outputs = [(Path(path), parts, [t for t in tensors if t.part in parts]) for path, parts in layout]
    sizes = [sum(t.n_bytes for t in chosen) for _, _, chosen in outputs]
    check_room(zip(targets, sizes, strict=True))
    fallbacks = _fallbacks(tensors, type, shape)
    if fallbacks:
        warn(fallback_words(fallbacks))

    tick = counter(progress, sum(t.n_bytes for t in tensors))
    with ExitStack() as files:
        for path, parts, chosen in outputs:
            file_type = type if "text" in parts else vision
            writer = _writer(parts, shape, tokenizer, name, file_type, chosen)
            file = files.enter_context(new_gguf(path, overwrite=overwrite))
            _write_file(writer, file, chosen, n_threads or usable_cpus(), tick)
        for path, _, _ in outputs:  # again: neither appears if the name of the other was taken meanwhile
            check_output(path, GGUF, inputs=inputs, overwrite=overwrite)
    return [path for path, _, _ in outputs]


def _layout(out: str, mmproj: str | None, single_file: bool) -> list[tuple[str, tuple[str, ...]]]:
    """The files to write, and which parts of the model go to each. Raises RequestError."""
    if single_file:
        return [(out, ("text", "vision"))]
    if mmproj is None:
        mmproj = f"{out.removesuffix('.gguf')}-mmproj.gguf"
    if os.path.basename(out) and os.path.basename(mmproj):  # others are refused with their own words
        check_distinct(out, mmproj)
    return [(out, ("text",)), (mmproj, ("vision",))]


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
