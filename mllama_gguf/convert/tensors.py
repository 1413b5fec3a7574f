"""The plan of a conversion: every tensor of the output with its name, shape and type.

Types. Matrices get the type asked for: ``type`` for the text, ``vision_type`` for the vision encoder and the
projector. The quantized types of the text are the mixes of `quantize`. Always F32 are:

- tensors of one dimension: norms, biases, gates, the class embedding, RoPE factors;
- the small tables ``v.position_embd``, ``v.pre_tile_position_embd`` and ``v.post_tile_position_embd``.

The large table ``v.tile_position_embd`` (74 million values at 11B) gets the vision type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from ..errors import ModelError
from .checkpoint import SAFETENSORS_TYPES, Checkpoint, Source
from .quantize import TARGETS, block, fitting, mix
from .shape import Shape, rope_factors

Array = npt.NDArray[Any]
FloatType = Literal["f32", "f16", "bf16"]

FLOAT_TYPES: tuple[FloatType, ...] = ("f32", "f16", "bf16")
TYPES: tuple[str, ...] = ("f32", *TARGETS)


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
