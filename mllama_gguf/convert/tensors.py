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
from ..words import show_name
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
    planned = _Plan(checkpoint, shape, type, vision_type)
    planned.add_text()
    planned.add_vision()
    planned.check_all_used()
    return planned.tensors


class _Plan:
    """The tensors so far. Each is added by its names in the output and in the checkpoint, and its shape."""

    def __init__(self, checkpoint: Checkpoint, shape: Shape, type: str, vision_type: FloatType) -> None:
        self.tensors: list[Tensor] = []
        self._checkpoint = checkpoint
        self._shape = shape
        self._type = type
        self._vision_type = vision_type
        self._used: set[str] = set()

    def _add(
        self,
        name: str,
        old: str,
        *dims: int,
        matrix: bool = False,
        rope: bool = False,
        gate: Literal["", "tanh", "1-tanh"] = "",
    ) -> None:
        shape, source = self._shape, self._checkpoint.sources.get(old)
        if source is None:
            raise ModelError(f"{self._checkpoint.directory}: tensor {old} is missing")
        self._used.add(old)
        stored = source.shape or (1,)
        if stored != dims:
            raise ModelError(
                f"{source.file}: tensor {source.name} has shape {list(stored)}, {list(dims)} expected"
            )
        if source.dtype not in SAFETENSORS_TYPES:
            raise ModelError(
                f"{source.file}: tensor {source.name} has type {show_name(source.dtype)}, a float type is "
                "expected"
            )
        part: Literal["text", "vision"] = "vision" if name.startswith(("v.", "mm.")) else "text"
        kind: str = (self._vision_type if part == "vision" else self._type) if matrix else "f32"
        if kind not in FLOAT_TYPES:
            asked = mix(name, TARGETS[kind], shape.n_layer, shape.n_head // shape.n_head_kv)
            kind = fitting(asked, dims[-1], name).lower()
        self.tensors.append(Tensor(name, dims, part, kind, source, shape.head_dim if rope else 0, gate))

    def _add_matrix(self, name: str, old: str, rows: int, columns: int, rope: bool = False) -> None:
        self._add(f"{name}.weight", f"{old}.weight", rows, columns, matrix=True, rope=rope)

    def _add_layer_norm(self, name: str, old: str) -> None:
        self._add(f"{name}.weight", f"{old}.weight", self._shape.vision_embd)
        self._add(f"{name}.bias", f"{old}.bias", self._shape.vision_embd)

    # ---- text ----------------------------------------------------------------------------------------------

    def add_text(self) -> None:
        """The text model."""
        shape, embedding = self._shape, "language_model.model.embed_tokens"
        source = self._checkpoint.sources.get(f"{embedding}.weight")
        # Some extra rows follow the vocabulary (8 in transformers); the image token uses the first of them.
        n_rows = source.shape[0] if source is not None and source.shape else 0
        n_rows = max(n_rows, shape.vocab_size, shape.image_token_id + 1)
        self._add_matrix("token_embd", embedding, n_rows, shape.n_embd)
        for i in range(shape.n_layer):
            self._add_text_layer(f"blk.{i}", f"language_model.model.layers.{i}", i in shape.cross_layers)
        factors = rope_factors(shape, self._checkpoint.config_file)  # the layers have checked their number
        if factors is not None:
            self.tensors.insert(1, Tensor("rope_freqs.weight", factors.shape, "text", "f32", value=factors))
        self._add("output_norm.weight", "language_model.model.norm.weight", shape.n_embd)
        self._add_matrix("output", "language_model.lm_head", shape.vocab_size, shape.n_embd)

    def _add_text_layer(self, out: str, old: str, is_cross: bool) -> None:
        shape, d = self._shape, self._shape.n_embd
        q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
        self._add(f"{out}.attn_norm.weight", f"{old}.input_layernorm.weight", d)
        if is_cross:
            self._add_matrix(f"{out}.cross_attn_q_proj", f"{old}.cross_attn.q_proj", q, d)
            self._add_matrix(f"{out}.cross_attn_k_proj", f"{old}.cross_attn.k_proj", kv, d)
            self._add_matrix(f"{out}.cross_attn_v_proj", f"{old}.cross_attn.v_proj", kv, d)
            self._add_matrix(f"{out}.cross_attn_o_proj", f"{old}.cross_attn.o_proj", d, q)
            self._add(f"{out}.cross_attn_q_norm.weight", f"{old}.cross_attn.q_norm.weight", shape.head_dim)
            self._add(f"{out}.cross_attn_k_norm.weight", f"{old}.cross_attn.k_norm.weight", shape.head_dim)
            self._add(f"{out}.cross_attn_attn_gate", f"{old}.cross_attn_attn_gate", 1)
            self._add(f"{out}.cross_attn_mlp_gate", f"{old}.cross_attn_mlp_gate", 1)
        else:
            self._add_matrix(f"{out}.attn_q", f"{old}.self_attn.q_proj", q, d, rope=True)
            self._add_matrix(f"{out}.attn_k", f"{old}.self_attn.k_proj", kv, d, rope=True)
            self._add_matrix(f"{out}.attn_v", f"{old}.self_attn.v_proj", kv, d)
            self._add_matrix(f"{out}.attn_output", f"{old}.self_attn.o_proj", d, q)
        self._add(f"{out}.ffn_norm.weight", f"{old}.post_attention_layernorm.weight", d)
        self._add_matrix(f"{out}.ffn_gate", f"{old}.mlp.gate_proj", shape.n_ff, d)
        self._add_matrix(f"{out}.ffn_up", f"{old}.mlp.up_proj", shape.n_ff, d)
        self._add_matrix(f"{out}.ffn_down", f"{old}.mlp.down_proj", d, shape.n_ff)

    # ---- vision --------------------------------------------------------------------------------------------

    def add_vision(self) -> None:
        """The vision encoder and the projector."""
        shape, v = self._shape, "vision_model"
        w, p = shape.vision_embd, shape.patch_size
        self._add("v.class_embd", f"{v}.class_embedding", w)
        self._add("v.patch_embd.weight", f"{v}.patch_embedding.weight", w, shape.channels, p, p, matrix=True)
        self._add_tables(v)
        self._add_layer_norm("v.pre_ln", f"{v}.layernorm_pre")
        self._add_layer_norm("v.post_ln", f"{v}.layernorm_post")
        for i in range(shape.vision_layers):
            self._add_vision_layer(f"v.blk.{i}", f"{v}.transformer.layers.{i}")
        for i in range(shape.vision_global_layers):
            out, old = f"v.global.blk.{i}", f"{v}.global_transformer.layers.{i}"
            self._add_vision_layer(out, old)
            self._add(f"{out}.attn_gate", f"{old}.gate_attn", 1, gate="tanh")
            self._add(f"{out}.ffn_gate", f"{old}.gate_ffn", 1, gate="tanh")
        self._add_matrix("mm.0", "multi_modal_projector", shape.n_embd, w * (1 + len(shape.intermediate)))
        self._add("mm.0.bias", "multi_modal_projector.bias", shape.n_embd)

    def _add_tables(self, v: str) -> None:
        """What is added to the patches of each position and each tile."""
        shape, w, table = self._shape, self._shape.vision_embd, f"{v}.gated_positional_embedding"
        ids = shape.n_ratios + 1  # id 0 means no image
        row = shape.max_tiles * shape.n_positions * w
        self._add("v.position_embd.weight", f"{table}.embedding", shape.n_positions, w)
        self._add("v.position_embd.gate", f"{table}.gate", 1, gate="1-tanh")
        self._add("v.tile_position_embd.weight", f"{table}.tile_embedding.weight", ids, row, matrix=True)
        self._add("v.tile_position_embd.gate", f"{table}.gate", 1, gate="tanh")
        for which in ("pre", "post"):
            table, out = f"{v}.{which}_tile_positional_embedding", f"v.{which}_tile_position_embd"
            self._add(f"{out}.weight", f"{table}.embedding.weight", ids, shape.max_tiles * w)
            self._add(f"{out}.gate", f"{table}.gate", 1, gate="tanh")

    def _add_vision_layer(self, out: str, old: str) -> None:
        w, ff = self._shape.vision_embd, self._shape.vision_ff
        self._add_layer_norm(f"{out}.attn_norm", f"{old}.input_layernorm")
        self._add_matrix(f"{out}.attn_q", f"{old}.self_attn.q_proj", w, w)
        self._add_matrix(f"{out}.attn_k", f"{old}.self_attn.k_proj", w, w)
        self._add_matrix(f"{out}.attn_v", f"{old}.self_attn.v_proj", w, w)
        self._add_matrix(f"{out}.attn_output", f"{old}.self_attn.o_proj", w, w)
        self._add_layer_norm(f"{out}.ffn_norm", f"{old}.post_attention_layernorm")
        self._add_matrix(f"{out}.ffn_up", f"{old}.mlp.fc1", ff, w)
        self._add(f"{out}.ffn_up.bias", f"{old}.mlp.fc1.bias", ff)
        self._add_matrix(f"{out}.ffn_down", f"{old}.mlp.fc2", w, ff)
        self._add(f"{out}.ffn_down.bias", f"{old}.mlp.fc2.bias", w)

    # ---- all -----------------------------------------------------------------------------------------------

    def check_all_used(self) -> None:
        """Raise ModelError for a checkpoint with other tensors."""
        unknown = sorted(set(self._checkpoint.sources) - self._used)
        if unknown:
            source = self._checkpoint.sources[unknown[0]]
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise ModelError(
                f"{source.file}: tensor {show_name(source.name)}{more} does not belong to the model of "
                "config.json"
            )
