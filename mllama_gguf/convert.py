"""Convert a Hugging Face Mllama checkpoint (Llama 3.2 Vision) to GGUF, in our canonical layout.

The canonical layout is described in the documentation of the file formats: text tensors named as llama.cpp
names them for Llama, vision tensors under ``v.`` and ``mm.``, cross-attention and vision rows left as they
are in the checkpoint, the rows of the text's self-attention q and k reordered for ggml's interleaved RoPE,
vision gates stored with tanh already applied. Every file that is written here says so in the key
``mllama.converter``.

Nothing but numpy and gguf is needed: safetensors files, ``config.json`` and ``tokenizer.json`` are read
directly, so bfloat16 needs no torch. Tensors are streamed in pieces of rows, so memory stays small whatever
the size of the model.

Types. Matrices take the type asked for (``type`` for the text, ``vision_type`` for the vision part, the
projector included). These are always F32: 1-D tensors (norms, biases, gates, class embedding, RoPE factors)
and the small position tables ``v.position_embd``, ``v.pre_tile_position_embd`` and
``v.post_tile_position_embd``. The large table ``v.tile_position_embd`` (74 M values at 11B) takes the vision
type. `plan` lists every tensor with its type.

References
- safetensors: https://github.com/huggingface/safetensors (README, "Format")
- GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
- Llama 3 RoPE factors: https://github.com/meta-llama/llama-models, ``apply_scaling``
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from mllama_gguf.errors import MllamaError, ModelError

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
FloatType = Literal["f32", "f16", "bf16"]

logger = logging.getLogger(__name__)

FLOAT_TYPES: tuple[FloatType, ...] = ("f32", "f16", "bf16")
IMAGE_TOKEN = "<|image|>"

# How many values are in memory at a time: 16 MB as float32.
_CHUNK_VALUES = 4 << 20
_ITEM_SIZE: dict[FloatType, int] = {"f32": 4, "f16": 2, "bf16": 2}
_SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# llama_ftype of llama.h: ALL_F32, MOSTLY_F16, MOSTLY_BF16.
_FILE_TYPE: dict[FloatType, int] = {"f32": 0, "f16": 1, "bf16": 32}
_QUANTIZATION_VERSION = 2

# Split pattern of Llama 3's tokenizer (tokenizer.json, pre_tokenizer), which llama.cpp knows as "llama-bpe".
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# CLIP's normalisation, which Llama 3.2 Vision uses too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# ------------------------------------------------------------------------------------------------------------
# The checkpoint


@dataclass(frozen=True)
class Source:
    """Where one tensor of the checkpoint lies."""

    file: Path
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file

    @property
    def item_size(self) -> int:
        return np.dtype(_SAFETENSORS_TYPES[self.dtype]).itemsize


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ModelError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _read_safetensors_header(path: Path) -> dict[str, Source]:
    """The tensors of one safetensors file, with every offset checked against the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise ModelError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e}") from e
    except ValueError as e:
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"{path}: not a safetensors file: {e}") from e
    if not isinstance(header, dict):
        raise ModelError(f"{path}: not a safetensors file: the header is no JSON object")

    sources = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
            begin, end = (int(n) for n in info["data_offsets"])
        except (KeyError, TypeError, ValueError) as e:
            raise ModelError(f"{path}: tensor {name}: broken entry in the header: {info}") from e
        if dtype not in _SAFETENSORS_TYPES:
            # Only an error for a tensor that we need; recorded with its type and found out then.
            sources[name] = Source(path, name, dtype, shape, 8 + length + begin)
            continue
        source = Source(path, name, dtype, shape, 8 + length + begin)
        n_bytes = math.prod(shape) * source.item_size
        if any(n < 0 for n in shape) or begin < 0 or end - begin != n_bytes:
            raise ModelError(
                f"{path}: tensor {name}: {end - begin} bytes for {dtype} {list(shape)}, {n_bytes} needed"
            )
        if 8 + length + end > size:
            raise ModelError(f"{path}: truncated: tensor {name} ends at byte {8 + length + end} of {size}")
        sources[name] = source
    return sources


def _old_name(name: str) -> str | None:
    """The name of a tensor with the prefixes of transformers up to 4.51 (None: not a weight).

    Newer versions write ``model.language_model.``, ``model.vision_model.``, ``model.multi_modal_projector.``
    and ``lm_head.``.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return None
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return old + name[len(new) :]
    return name


class Checkpoint:
    """A Hugging Face checkpoint directory: its JSON files and where its tensors lie. Holds no weights."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ModelError(f"{self.directory}: not a directory")
        self.config_file = self.directory / "config.json"
        self.config = _read_json(self.config_file)
        self.sources: dict[str, Source] = {}  # by old name
        for source in self._all_sources():
            name = _old_name(source.name)
            if name is None:
                continue
            if name in self.sources:
                raise ModelError(f"{source.file}: tensor {source.name} is also in {self.sources[name].file}")
            self.sources[name] = source

    def _all_sources(self) -> Iterator[Source]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index}: no weight_map")
            headers: dict[str, dict[str, Source]] = {}
            for name, file in weight_map.items():
                file = str(file)
                if Path(file).name != file:
                    raise ModelError(f"{index}: tensor {name}: {file!r} is not a plain file name")
                if file not in headers:
                    headers[file] = _read_safetensors_header(self.directory / file)
                if name not in headers[file]:
                    raise ModelError(
                        f"{self.directory / file}: tensor {name} is missing (it is named in {index.name})"
                    )
                yield headers[file][name]
        elif single.exists():
            yield from _read_safetensors_header(single).values()
        else:
            raise ModelError(f"{self.directory}: neither {single.name} nor {index.name}")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory, {} if it does not exist."""
        path = self.directory / name
        return _read_json(path) if path.exists() else {}


# ------------------------------------------------------------------------------------------------------------
# The configuration


@dataclass(frozen=True)
class Shape:
    """What the converter needs to know of config.json."""

    vocab_size: int
    image_token_id: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ctx: int
    rms_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    cross_layers: tuple[int, ...]
    vision_embd: int
    vision_layers: int
    vision_global_layers: int
    vision_head: int
    vision_ff: int
    vision_eps: float
    image_size: int
    patch_size: int
    channels: int
    max_tiles: int
    n_ratios: int
    intermediate: tuple[int, ...]

    @property
    def n_positions(self) -> int:
        """Patches of a tile and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


def tile_grids(max_tiles: int) -> list[tuple[int, int]]:
    """The supported tile grids (rows, columns) in the order of their aspect ratio ids, which start at 1."""
    n = range(1, max_tiles + 1)
    return [(rows, columns) for rows in n for columns in n if rows * columns <= max_tiles]


def read_shape(checkpoint: Checkpoint) -> Shape:
    """Read and check config.json."""
    file, config = checkpoint.config_file, checkpoint.config

    def fail(key: str, value: object, why: str) -> ModelError:
        return ModelError(f"{file}: {key} = {value!r}: {why}")

    if config.get("model_type") != "mllama":
        raise fail("model_type", config.get("model_type"), "only mllama (Llama 3.2 Vision) is supported")
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict):
        raise fail("text_config", text, "an object is expected")
    if not isinstance(vision, dict):
        raise fail("vision_config", vision, "an object is expected")

    def count(section: dict[str, Any], name: str, key: str, default: int | None = None) -> int:
        value = section.get(key, default)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{file}: {name}.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise fail(f"{name}.{key}", value, "a positive whole number is expected")
        return value

    def real(section: dict[str, Any], name: str, key: str, default: float) -> float:
        value = section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise fail(f"{name}.{key}", value, "a positive number is expected")
        return float(value)

    def indices(
        section: dict[str, Any], name: str, key: str, below: int, default: list[int]
    ) -> tuple[int, ...]:
        value = section.get(key, default)
        if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < below for i in value):
            raise fail(f"{name}.{key}", value, f"a list of layers below {below} is expected")
        return tuple(value)

    t, v = "text_config", "vision_config"
    vocab_size = count(text, t, "vocab_size", 128256)
    n_embd, n_layer = count(text, t, "hidden_size"), count(text, t, "num_hidden_layers")
    n_head = count(text, t, "num_attention_heads")
    n_head_kv = count(text, t, "num_key_value_heads", n_head)
    head_dim = count(text, t, "head_dim", n_embd // n_head)
    if n_head % n_head_kv:
        raise fail(f"{t}.num_key_value_heads", n_head_kv, f"does not divide the {n_head} heads")
    if head_dim % 2:
        raise fail(f"{t}.head_dim", head_dim, "RoPE needs an even number")
    if text.get("hidden_act", "silu") != "silu":
        raise fail(f"{t}.hidden_act", text["hidden_act"], "only silu is supported")
    # transformers 5 keeps theta and scaling together in rope_parameters.
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if rope is not None and not isinstance(rope, dict):
        raise fail(f"{t}.rope_scaling", rope, "an object is expected")
    theta_section = rope if rope and "rope_theta" in rope else text
    cross = indices(text, t, "cross_attention_layers", n_layer, [3, 8, 13, 18, 23, 28, 33, 38])
    if not cross or list(cross) != sorted(set(cross)):
        raise fail(
            f"{t}.cross_attention_layers", list(cross), "different layers in rising order are expected"
        )

    image_token_id = config.get("image_token_index", config.get("image_token_id", vocab_size))
    if (
        isinstance(image_token_id, bool)
        or not isinstance(image_token_id, int)
        or not 0 <= image_token_id <= vocab_size
    ):
        raise fail("image_token_index", image_token_id, f"a token up to {vocab_size} is expected")

    if vision.get("hidden_act", "gelu") != "gelu":
        raise fail(f"{v}.hidden_act", vision["hidden_act"], "only gelu is supported")
    vision_eps = real(vision, v, "norm_eps", 1e-5)
    if vision_eps != 1e-5:
        # layernorm_pre and layernorm_post have 1e-5 whatever norm_eps says; the file has one key for all.
        raise fail(f"{v}.norm_eps", vision_eps, "only 1e-5 is supported")
    vision_embd = count(vision, v, "hidden_size")
    # HF writes num_attention_heads or, as the attribute is named in its class, attention_heads.
    vision_head = count(
        vision, v, "attention_heads" if "attention_heads" in vision else "num_attention_heads", 16
    )
    if vision_embd % vision_head:
        raise fail(f"{v}.num_attention_heads", vision_head, f"does not divide the width {vision_embd}")
    image_size, patch_size = count(vision, v, "image_size", 448), count(vision, v, "patch_size", 14)
    if patch_size > image_size:
        raise fail(f"{v}.patch_size", patch_size, f"larger than the image of {image_size}")
    max_tiles = count(vision, v, "max_num_tiles", 4)
    grids = [list(grid) for grid in tile_grids(max_tiles)] if max_tiles <= 64 else []
    ratios = vision.get("supported_aspect_ratios")
    if ratios is not None and ratios != grids:
        raise fail(f"{v}.supported_aspect_ratios", ratios, f"{grids} are expected for {max_tiles} tiles")
    vision_layers = count(vision, v, "num_hidden_layers", 32)
    channels = count(vision, v, "num_channels", 3)
    if channels != 3:
        raise fail(f"{v}.num_channels", channels, "only 3 is supported")

    return Shape(
        vocab_size=vocab_size,
        image_token_id=image_token_id,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=count(text, t, "intermediate_size"),
        n_ctx=count(text, t, "max_position_embeddings", 131072),
        rms_eps=real(text, t, "rms_norm_eps", 1e-5),
        rope_theta=real(theta_section, t, "rope_theta", 500000.0),
        rope_scaling=rope,
        cross_layers=cross,
        vision_embd=vision_embd,
        vision_layers=vision_layers,
        vision_global_layers=count(vision, v, "num_global_layers", 8),
        vision_head=vision_head,
        vision_ff=count(vision, v, "intermediate_size"),
        vision_eps=vision_eps,
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        max_tiles=max_tiles,
        n_ratios=len(grids),
        intermediate=indices(vision, v, "intermediate_layers_indices", vision_layers, [3, 7, 15, 23, 30]),
    )


def rope_factors(shape: Shape, file: Path) -> npt.NDArray[np.float32] | None:
    """What each RoPE frequency is divided by, [head_dim / 2]; None if there is no scaling.

    Long waves are slowed down by ``factor``, short ones are kept, those between are interpolated: Meta's
    ``apply_scaling``.
    """
    scaling = shape.rope_scaling
    kind = "default" if not scaling else scaling.get("rope_type", scaling.get("type", "default"))
    if not scaling or kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"{file}: text_config.rope_scaling.rope_type = {kind!r}: only llama3 is supported")
    values = {}
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ModelError(
                f"{file}: text_config.rope_scaling.{key} = {value!r}: a positive number is expected"
            )
        values[key] = float(value)
    factor, low, high, n_orig = values.values()
    if high <= low:
        raise ModelError(
            f"{file}: text_config.rope_scaling.high_freq_factor = {high}: not above low_freq_factor = {low}"
        )
    half = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    turns = n_orig / (2 * np.pi * shape.rope_theta**half)  # full turns within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------
# The plan: every tensor of the output


@dataclass(frozen=True)
class Tensor:
    """One tensor of the output and where it comes from. Shapes are in the order of numpy, slowest dimension
    first."""

    name: str
    shape: tuple[int, ...]
    part: Literal["text", "vision"]
    type: FloatType
    source: Source | None = None
    rope_head_dim: int = 0  # > 0: reorder the rows of each head for interleaved RoPE
    gate: Literal["", "tanh", "1-tanh"] = ""
    value: Array | None = None  # instead of a source

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_SIZE[self.type]


def plan(
    checkpoint: Checkpoint, shape: Shape, type: FloatType = "bf16", vision_type: FloatType = "bf16"
) -> list[Tensor]:
    """Every tensor of the output, in the order of the file, with sources checked for presence, shape and
    type."""
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
        if source.dtype not in _SAFETENSORS_TYPES:
            raise ModelError(
                f"{source.file}: tensor {source.name} has type {source.dtype}, a float type is expected"
            )
        part: Literal["text", "vision"] = "vision" if name.startswith(("v.", "mm.")) else "text"
        kind: FloatType = (vision_type if part == "vision" else type) if matrix else "f32"
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
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )


def permute_rope_rows(rows: Array, head_dim: int) -> Array:
    """Reorder the rows of q or k of each head from halves (HF: rotate i with i + d/2) to pairs (ggml: 2i with
    2i + 1)."""
    n = rows.shape[0]
    return rows.reshape(n // head_dim, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(n, -1)


def apply_gate(value: Array, gate: str) -> npt.NDArray[np.float32]:
    """The gate as it multiplies: tanh(g) or 1 - tanh(g), computed in double precision."""
    t = np.tanh(value.astype(np.float64))
    return (1.0 - t if gate == "1-tanh" else t).astype(np.float32)


def _encode(raw: Array, dtype: str, type: FloatType, where: str) -> Array:
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


def read_pieces(tensor: Tensor) -> Iterator[Array]:
    """The values of a tensor in its output type, in pieces of whole rows (bfloat16 as uint16)."""
    source = tensor.source
    if source is None:
        assert tensor.value is not None
        yield tensor.value
        return
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    unit = tensor.rope_head_dim or 1
    step = max(unit, _CHUNK_VALUES // max(columns, 1) // unit * unit)
    where = f"{source.file}: tensor {source.name}"
    try:
        with source.file.open("rb") as f:
            f.seek(source.offset)
            for first in range(0, rows, step):
                n = min(step, rows - first)
                raw = np.fromfile(f, dtype=_SAFETENSORS_TYPES[source.dtype], count=n * columns)
                if raw.size != n * columns:
                    raise ModelError(f"{where}: the file is truncated")
                if tensor.gate:
                    piece: Array = apply_gate(_encode(raw, source.dtype, "f32", where), tensor.gate)
                else:
                    piece = _encode(raw, source.dtype, tensor.type, where)
                if tensor.rope_head_dim:
                    piece = permute_rope_rows(piece.reshape(n, columns), tensor.rope_head_dim)
                yield piece
    except OSError as e:
        raise ModelError(f"{where}: cannot be read: {e}") from e


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer as GGUF stores it."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    add_bos: bool
    special: dict[str, int]  # bos, eos, eot, eom, padding: token ids
    eos_ids: list[int]
    chat_template: str | None


_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type


def read_tokenizer(checkpoint: Checkpoint, shape: Shape) -> Tokenizer:
    """Read tokenizer.json and the small JSON files beside it."""
    file = checkpoint.directory / "tokenizer.json"
    data = _read_json(file)
    model = data.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        raise ModelError(f"{file}: model.type: only a BPE vocabulary is supported")
    n_tokens = shape.vocab_size + 1
    tokens: list[str | None] = [None] * n_tokens
    types = [_UNUSED] * n_tokens

    def put(token: object, i: object, kind: int) -> None:
        if (
            not isinstance(token, str)
            or isinstance(i, bool)
            or not isinstance(i, int)
            or not 0 <= i < n_tokens
        ):
            raise ModelError(
                f"{file}: token {token!r} has id {i!r}: an id up to {shape.vocab_size} is expected"
            )
        if tokens[i] not in (None, token):
            raise ModelError(f"{file}: tokens {tokens[i]!r} and {token!r} have the same id {i}")
        tokens[i], types[i] = token, kind

    for token, i in model["vocab"].items():
        put(token, i, _NORMAL)
    for entry in data.get("added_tokens") or []:
        if not isinstance(entry, dict):
            raise ModelError(f"{file}: added_tokens: an object is expected, not {entry!r}")
        put(entry.get("content"), entry.get("id"), _CONTROL if entry.get("special", True) else _USER_DEFINED)
    if tokens[shape.image_token_id] is None:
        tokens[shape.image_token_id] = IMAGE_TOKEN
    if tokens[shape.image_token_id] != IMAGE_TOKEN:
        other = tokens[shape.image_token_id]
        raise ModelError(
            f"{file}: token {shape.image_token_id} is {other!r}: the configuration says {IMAGE_TOKEN!r}"
        )
    types[shape.image_token_id] = _CONTROL
    names = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(names)}
    if len(ids) != n_tokens:
        double = next(token for i, token in enumerate(names) if ids[token] != i)
        raise ModelError(f"{file}: token {double!r} occurs twice")

    merges = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(s, str) and s and " " not in s for s in pair)
        ):
            raise ModelError(f"{file}: merge {merge!r}: a pair of byte-level tokens is expected")
        merges.append(f"{pair[0]} {pair[1]}")

    settings = checkpoint.json("tokenizer_config.json")
    special_map = checkpoint.json("special_tokens_map.json")
    generation = checkpoint.json("generation_config.json")
    text_config = checkpoint.config["text_config"]

    def token_id(role: str) -> int | None:
        for section in (settings, special_map):
            value = section.get(f"{role}_token")
            content = value.get("content") if isinstance(value, dict) else value
            if content is not None:
                if content not in ids:
                    raise ModelError(
                        f"{checkpoint.directory}: {role}_token {content!r} is not in {file.name}"
                    )
                return ids[content]
        for section in (generation, checkpoint.config, text_config):
            value = section.get(f"{role}_token_id")
            value = value[-1] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < n_tokens:
                return value
        return None

    special: dict[str, int] = {}
    for name, found in (
        ("bos", token_id("bos")),
        ("eos", token_id("eos")),
        ("eot", ids.get("<|eot_id|>")),
        ("eom", ids.get("<|eom_id|>")),
        ("padding", token_id("pad")),
    ):
        if found is not None:
            special[name] = found
    if "bos" not in special or "eos" not in special:
        raise ModelError(f"{checkpoint.directory}: tokenizer_config.json: bos_token or eos_token is missing")
    ends = generation.get("eos_token_id", text_config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    eos_ids = {i for i in ends if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < n_tokens}
    eos_ids.add(special["eos"])

    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = _template_adds(data.get("post_processor"), names[special["bos"]])
    if not model.get("ignore_merges", False):
        logger.info(
            "%s: model.ignore_merges is off, llama.cpp always treats llama-bpe as if it were on", file
        )
    return Tokenizer(
        pre=_pre_tokenizer(file, data.get("pre_tokenizer")),
        tokens=names,
        types=types,
        merges=merges,
        add_bos=add_bos,
        special=special,
        eos_ids=sorted(eos_ids),
        chat_template=_chat_template(checkpoint, settings),
    )


def _parts(node: object, key: str) -> list[dict[str, Any]]:
    """The members of a tokenizers' Sequence, or the one that is there."""
    if not isinstance(node, dict):
        return []
    members = node.get(key) if node.get("type") == "Sequence" else [node]
    return [m for m in members or [] if isinstance(m, dict)]


def _template_adds(post_processor: object, token: str) -> bool:
    for part in _parts(post_processor, "processors"):
        first = (part.get("single") or [None])[0] if part.get("type") == "TemplateProcessing" else None
        if isinstance(first, dict) and isinstance(first.get("SpecialToken"), dict):
            return bool(first["SpecialToken"].get("id") == token)
    return False


def _pre_tokenizer(file: Path, node: object) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    parts = _parts(node, "pretokenizers")
    if any(part.get("type") == "ByteLevel" for part in parts):
        splits = [part.get("pattern") for part in parts if part.get("type") == "Split"]
        if splits == [{"Regex": LLAMA3_SPLIT}]:
            return "llama-bpe"
        if not splits and any(part.get("use_regex", True) for part in parts):
            return "gpt-2"
    raise ModelError(f"{file}: pre_tokenizer: only Llama 3's and GPT-2's are supported")


def _chat_template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    """The chat template: the processor's own file first, as transformers does."""
    path = checkpoint.directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ModelError(f"{path}: cannot be read: {e}") from e
    for template in (
        checkpoint.json("chat_template.json").get("chat_template"),
        settings.get("chat_template"),
    ):
        if isinstance(template, list):  # named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default", next(iter(named.values()), None))
        if isinstance(template, str) and template:
            return template
    return None


# ------------------------------------------------------------------------------------------------------------
# Writing


def _version() -> str:
    try:
        return metadata.version("mllama_gguf")
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_preprocessor(checkpoint: Checkpoint, shape: Shape) -> None:
    """Refuse a model whose pictures are prepared otherwise than ours: the file has no keys for that."""
    settings = checkpoint.json("preprocessor_config.json")
    file = checkpoint.directory / "preprocessor_config.json"
    size = {"height": shape.image_size, "width": shape.image_size}
    for key, expected in (("size", size), ("max_image_tiles", shape.max_tiles)):
        if settings.get(key, expected) != expected:
            raise ModelError(f"{file}: {key} = {settings[key]!r}: {expected!r} expected from config.json")
    for key, numbers in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        value = settings.get(key, list(numbers))
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not np.allclose(value, numbers, rtol=0, atol=1e-6)
        ):
            raise ModelError(f"{file}: {key} = {value!r}: only CLIP's {list(numbers)} is supported")


def _writer(
    path: Path,
    parts: tuple[str, ...],
    shape: Shape,
    tokenizer: Tokenizer,
    name: str,
    file_type: FloatType,
    tensors: list[Tensor],
) -> Any:
    """A GGUFWriter with all keys and the list of tensors, nothing written yet."""
    import gguf  # a moment to import: only when needed

    w = gguf.GGUFWriter(None, "mllama")
    w.add_string("general.type", "model" if "text" in parts else "projector")
    w.add_string("general.name", name)
    w.add_uint32("general.file_type", _FILE_TYPE[file_type])
    w.add_uint32("general.quantization_version", _QUANTIZATION_VERSION)
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
        w.add_uint32("mllama.image_token_id", shape.image_token_id)
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

    types = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
    types["bf16"] = gguf.GGMLQuantizationType.BF16
    for t in tensors:
        w.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, raw_dtype=types[t.type])
    w.path = path
    return w


def _write_file(writer: Any, tensors: list[Tensor], tick: Callable[[int], None]) -> None:
    """Write one GGUF. Tensor data goes past the writer's own method, which wants a whole tensor at once."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out: IO[bytes] = writer.fout[0]
        writer.write_padding(out, out.tell())
        for tensor in tensors:
            for piece in read_pieces(tensor):
                out.write(np.ascontiguousarray(piece).data)
                tick(piece.nbytes)
            writer.write_padding(out, tensor.n_bytes)
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
    type: FloatType = "bf16",
    vision_type: FloatType | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Convert a Hugging Face checkpoint directory to GGUF and return the files written.

    The text goes to ``out`` and the vision part to ``mmproj``, by default ``<out without .gguf>-mmproj.gguf``
    beside it; with ``single_file`` all goes to ``out``. ``type`` is the type of the text matrices,
    ``vision_type`` (as ``type`` if not given) that of the vision matrices. ``progress(done, total)`` is
    called with bytes written. Files appear under their names only when all are complete. Raises `ModelError`
    for a checkpoint that is damaged or not supported, `MllamaError` when the output cannot be written.
    """
    vision_type = type if vision_type is None else vision_type
    for given in (type, vision_type):
        if given not in FLOAT_TYPES:
            raise ValueError(f"type {given!r}: one of {', '.join(FLOAT_TYPES)} is expected")
    if single_file and mmproj is not None:
        raise ValueError("single_file and mmproj exclude each other")
    text_path = Path(out)
    if single_file:
        layout: list[tuple[Path, tuple[str, ...]]] = [(text_path, ("text", "vision"))]
    else:
        stem = text_path.name.removesuffix(".gguf")
        vision_path = text_path.with_name(f"{stem}-mmproj.gguf") if mmproj is None else Path(mmproj)
        if vision_path.resolve() == text_path.resolve():
            raise ValueError(
                f"{text_path}: text and vision cannot be written to the same file; use single_file"
            )
        layout = [(text_path, ("text",)), (vision_path, ("vision",))]

    checkpoint = Checkpoint(hf_dir)
    shape = read_shape(checkpoint)
    _check_preprocessor(checkpoint, shape)
    tokenizer = read_tokenizer(checkpoint, shape)
    tensors = plan(checkpoint, shape, type, vision_type)
    name = Path(os.path.abspath(hf_dir)).name

    total, done = sum(t.n_bytes for t in tensors), 0
    _check_space(layout, tensors)

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    if progress is not None:
        progress(0, total)
    temporary: list[Path] = []
    try:
        for path, parts in layout:
            chosen = [t for t in tensors if t.part in parts]
            temp = path.with_name(f".{path.name}.{os.getpid()}.part")
            temporary.append(temp)
            file_type = type if "text" in parts else vision_type
            try:
                _write_file(_writer(temp, parts, shape, tokenizer, name, file_type, chosen), chosen, tick)
            except OSError as e:
                raise _cannot_write(path, e) from e
        for temp, (path, _) in zip(temporary, layout, strict=True):
            try:
                os.replace(temp, path)
            except OSError as e:
                raise _cannot_write(path, e) from e
    finally:
        for temp in temporary:
            with suppress(OSError):
                temp.unlink()
    return [path for path, _ in layout]


def _cannot_write(path: Path, e: OSError) -> MllamaError:
    reason = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else (e.strerror or str(e))
    return MllamaError(f"cannot write {path}: {reason}")


def _check_space(layout: list[tuple[Path, tuple[str, ...]]], tensors: list[Tensor]) -> None:
    """Fail early, before gigabytes are written, if the disk cannot hold the files."""
    need: dict[int, int] = {}
    for path, parts in layout:
        try:
            device = path.parent.stat().st_dev
            free = shutil.disk_usage(path.parent).free
        except OSError as e:
            raise _cannot_write(path, e) from e
        need[device] = need.get(device, 0) + sum(t.n_bytes for t in tensors if t.part in parts)
        if need[device] > free:
            needed = f"{need[device] / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on the disk"
            raise MllamaError(f"cannot write {path}: {needed}")
