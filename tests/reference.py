"""The model in plain numpy and double precision, straight from a GGUF in the canonical layout.

A second reading of the specification, independent of transformers and of the runtime: no masks in the vision
encoder (real queries over all keys, pad queries over the real keys), no mask in cross-attention (only the
rows that a token sees), interleaved RoPE on the reordered rows. It checks the converter and the golden
numbers without the runtime, and tells which of two others is wrong when they differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: F64) -> F64:
    return np.asarray(0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))))


def silu(x: F64) -> F64:
    return np.asarray(x / (1.0 + np.exp(-x)))


def layer_norm(x: F64, weight: F64, bias: F64, eps: float) -> F64:
    x = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight + bias)


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight)


def attention(q: F64, k: F64, v: F64, mask: npt.NDArray[np.bool_] | None = None) -> F64:
    """q [n, heads, d], k and v [m, kv_heads, d] -> [n, heads * d]; mask [n, m]: which keys a query sees."""
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[2])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("hnm,mhd->nhd", weights, v).reshape(len(q), -1))


class Reference:
    """A model from one file with everything, or from a text file and a projector file."""

    def __init__(self, *paths: Path) -> None:
        self.keys: dict[str, Any] = {}
        self.weights: dict[str, F64] = {}
        for path in paths:
            reader = gguf.GGUFReader(path)
            self.keys.update({name: field.contents() for name, field in reader.fields.items()})
            for t in reader.tensors:
                shape = [int(n) for n in t.shape[::-1]]
                values = gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
                self.weights[t.name] = values.reshape(shape)

    def key(self, name: str) -> Any:
        return self.keys[f"mllama.{name}"]

    # --------------------------------------------------------------------------------------------------------
    # Vision

    def states(self, pixels: npt.NDArray[np.float32], aspect_ratio_id: int, n_tiles: int) -> F64:
        """cross_attention_states [n_tiles, positions, text width]."""
        w, size, patch = self.weights, self.key("vision.image_size"), self.key("vision.patch_size")
        tiles, side, width = len(pixels), size // patch, self.key("vision.embedding_length")
        n_patches = side * side
        cut = pixels[:, :, : side * patch, : side * patch].astype(np.float64)
        cut = cut.reshape(tiles, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
        x = cut.reshape(tiles, n_patches, -1) @ w["v.patch_embd.weight"].reshape(width, -1).T

        def tile_table(name: str, positions: int) -> F64:
            table = w[f"{name}.weight"][aspect_ratio_id].reshape(tiles, positions, width)
            return np.asarray(table * w[f"{name}.gate"])

        x = x + tile_table("v.pre_tile_position_embd", 1)
        x = np.concatenate([np.broadcast_to(w["v.class_embd"], (tiles, 1, width)), x], axis=1)
        x = x + w["v.position_embd.gate"] * w["v.position_embd.weight"]
        x = x + tile_table("v.tile_position_embd", n_patches + 1)
        x = self._norm(x, "v.pre_ln")
        x = np.concatenate([x, np.zeros((tiles, -x.shape[1] % 8, width))], axis=1)
        padded = x.shape[1]
        used = np.zeros((tiles, padded), dtype=bool)
        used[:n_tiles, : n_patches + 1] = True
        real = used.ravel()

        x = x.reshape(tiles * padded, width)
        inputs = []
        for i in range(self.key("vision.block_count")):
            inputs.append(x)
            x = self._vision_layer(x, f"v.blk.{i}", real, gated=False)
        x = self._norm(x, "v.post_ln").reshape(tiles, padded, width)
        x = (x + tile_table("v.post_tile_position_embd", 1)).reshape(tiles * padded, width)
        for i in range(self.key("vision.global.block_count")):
            x = self._vision_layer(x, f"v.global.blk.{i}", real, gated=True)
        taken = np.stack([inputs[i] for i in self.key("vision.intermediate_layers_indices")], axis=-1)
        out = np.concatenate([x, taken.reshape(len(x), -1)], axis=1)[real]
        out = out @ w["mm.0.weight"].T + w["mm.0.bias"]
        return np.asarray(out.reshape(n_tiles, n_patches + 1, -1))

    def _norm(self, x: F64, name: str) -> F64:
        eps = self.key("vision.attention.layer_norm_epsilon")
        return layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def _vision_layer(self, x: F64, name: str, real: npt.NDArray[np.bool_], gated: bool) -> F64:
        w = self.weights
        heads = self.key("vision.attention.head_count")
        y = self._norm(x, f"{name}.attn_norm")
        q, k, v = ((y @ w[f"{name}.attn_{s}.weight"].T).reshape(len(x), heads, -1) for s in "qkv")
        y = np.empty_like(x)
        y[real] = attention(q[real], k, v)
        y[~real] = attention(q[~real], k[real], v[real])
        y = y @ w[f"{name}.attn_output.weight"].T
        x = x + (w[f"{name}.attn_gate"] * y if gated else y)
        y = self._norm(x, f"{name}.ffn_norm")
        y = gelu(y @ w[f"{name}.ffn_up.weight"].T + w[f"{name}.ffn_up.bias"])
        y = y @ w[f"{name}.ffn_down.weight"].T + w[f"{name}.ffn_down.bias"]
        return x + (w[f"{name}.ffn_gate"] * y if gated else y)

    # --------------------------------------------------------------------------------------------------------
    # Text

    def logits(self, tokens: Sequence[int], images: Sequence[F64] = ()) -> F64:
        """Logits [tokens, vocab_size]; ``images``: the states of each image token in order."""
        w, eps = self.weights, self.key("attention.layer_norm_rms_epsilon")
        heads, kv_heads = self.key("attention.head_count"), self.key("attention.head_count_kv")
        n = len(tokens)
        sees = self._visible(tokens)
        x = w["token_embd.weight"][list(tokens)]
        for i in range(self.key("block_count")):
            name = f"blk.{i}"
            y = rms_norm(x, w[f"{name}.attn_norm.weight"], eps)
            if i in self.key("attention.cross_attention_layers"):
                x = self._cross_layer(x, y, name, sees, images)
                continue
            q = self._rope((y @ w[f"{name}.attn_q.weight"].T).reshape(n, heads, -1))
            k = self._rope((y @ w[f"{name}.attn_k.weight"].T).reshape(n, kv_heads, -1))
            v = (y @ w[f"{name}.attn_v.weight"].T).reshape(n, kv_heads, -1)
            past = np.tril(np.ones((n, n), dtype=bool))
            x = x + attention(q, k, v, past) @ w[f"{name}.attn_output.weight"].T
            x = x + self._mlp(x, name)
        return np.asarray(rms_norm(x, w["output_norm.weight"], eps) @ w["output.weight"].T)

    def _visible(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The images that each token sees."""
        image_token, count = self.keys["tokenizer.ggml.tokens"].index("<|image|>"), 0
        group: tuple[int, ...] = ()
        out: list[tuple[int, ...]] = []
        for before, token in zip([None, *tokens], tokens, strict=False):
            if token == image_token:
                group = (*group, count) if before == image_token else (count,)
                count += 1
            out.append(group)
        return out

    def _cross_layer(
        self, x: F64, y: F64, name: str, sees: list[tuple[int, ...]], images: Sequence[F64]
    ) -> F64:
        """Tokens are taken together with those that see the same images; those that see none pass
        unchanged."""
        w, eps = self.weights, self.key("attention.layer_norm_rms_epsilon")
        heads, kv_heads = self.key("attention.head_count"), self.key("attention.head_count_kv")
        x = x.copy()
        for group in dict.fromkeys(sees):
            if not group:
                continue
            rows = [i for i, seen in enumerate(sees) if seen == group]
            s = np.concatenate([images[i].reshape(-1, x.shape[1]) for i in group])
            q = (y[rows] @ w[f"{name}.cross_attn_q_proj.weight"].T).reshape(len(rows), heads, -1)
            k = (s @ w[f"{name}.cross_attn_k_proj.weight"].T).reshape(len(s), kv_heads, -1)
            v = (s @ w[f"{name}.cross_attn_v_proj.weight"].T).reshape(len(s), kv_heads, -1)
            q = rms_norm(q, w[f"{name}.cross_attn_q_norm.weight"], eps)
            k = rms_norm(k, w[f"{name}.cross_attn_k_norm.weight"], eps)
            out = attention(q, k, v) @ w[f"{name}.cross_attn_o_proj.weight"].T
            z = x[rows] + np.tanh(w[f"{name}.cross_attn_attn_gate"]) * out
            x[rows] = z + np.tanh(w[f"{name}.cross_attn_mlp_gate"]) * self._mlp(z, name)
        return x

    def _mlp(self, x: F64, name: str) -> F64:
        w = self.weights
        y = rms_norm(x, w[f"{name}.ffn_norm.weight"], self.key("attention.layer_norm_rms_epsilon"))
        y = silu(y @ w[f"{name}.ffn_gate.weight"].T) * (y @ w[f"{name}.ffn_up.weight"].T)
        return np.asarray(y @ w[f"{name}.ffn_down.weight"].T)

    def _rope(self, x: F64) -> F64:
        """Rotate the pairs (2i, 2i + 1) of x [tokens, heads, d] by position * base^(-2i/d) / factor_i."""
        d = x.shape[2]
        frequency = self.key("rope.freq_base") ** (-np.arange(0, d, 2) / d)
        if "rope_freqs.weight" in self.weights:
            frequency = frequency / self.weights["rope_freqs.weight"]
        angle = np.arange(len(x))[:, None, None] * frequency
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
