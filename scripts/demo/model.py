"""The demo model in plain torch: a real mllama in small, with Meta's semantics.

Parameter names are those of a Hugging Face checkpoint (transformers 4.52.4), so a state dict exports as is;
`export.py --check` proves that transformers computes the same. What transformers does not offer and training
needs is here: the encoder on the used tiles only (`exact=False`), with neither pad rows nor unused tiles, for
speed, and `exact=True` with all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG: dict[str, dict] = {
    "vision": {
        "hidden_size": 192,
        "attention_heads": 6,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_global_layers": 2,
        "intermediate_layers_indices": [1, 2, 3],
        "image_size": 80,
        "patch_size": 16,
        "max_num_tiles": 4,
        "norm_eps": 1e-5,
    },
    "text": {
        "vocab_size": 1024,
        "hidden_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "cross_attention_layers": [1, 3],
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
GRID_IDS = {(1, 1): 1, (1, 2): 2, (1, 3): 3, (1, 4): 4, (2, 1): 5, (2, 2): 6, (3, 1): 7, (4, 1): 8}
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


# ------------------------------------------------------------------------------------------------- vision
class VisionAttention(nn.Module):
    """Plain multi-head attention, no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, D]; mask bool [N, N], True where attention is allowed."""
        b, n, d = x.shape
        qkv = F.linear(x, torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]))
        q, k, v = qkv.view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, d))


class VisionMLP(nn.Module):
    """fc1, erf GELU, fc2."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm layer; a global one has tanh gates."""

    def __init__(self, config: dict, gated: bool) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.input_layernorm = nn.LayerNorm(width, eps=config["norm_eps"])
        self.self_attn = VisionAttention(width, config["attention_heads"])
        self.post_attention_layernorm = nn.LayerNorm(width, eps=config["norm_eps"])
        self.mlp = VisionMLP(width, config["intermediate_size"])
        self.gated = gated
        if gated:
            self.gate_attn = nn.Parameter(torch.full((1,), math.pi / 4))
            self.gate_ffn = nn.Parameter(torch.full((1,), math.pi / 4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attn = self.self_attn(self.input_layernorm(x), mask)
        x = x + (self.gate_attn.tanh() * attn if self.gated else attn)
        out = self.mlp(self.post_attention_layernorm(x))
        return x + (self.gate_ffn.tanh() * out if self.gated else out)


class Stack(nn.Module):
    """A numbered list of layers."""

    def __init__(self, config: dict, count: int, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, gated) for _ in range(count))


class TileEmbedding(nn.Module):
    """One vector per (aspect ratio, tile), gated."""

    def __init__(self, tiles: int, width: int) -> None:
        super().__init__()
        self.tiles = tiles
        self.embedding = nn.Embedding(9, tiles * width)
        self.gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, ratio: int, tiles: int) -> Tensor:
        """[tiles, 1, D]"""
        weight = self.embedding.weight[ratio].view(self.tiles, 1, -1)
        return self.gate.tanh() * weight[:tiles]


class PositionEmbedding(nn.Module):
    """A position inside the tile, and one for (aspect ratio, tile, position); the gate weighs them."""

    def __init__(self, tiles: int, positions: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(positions, width))
        self.gate = nn.Parameter(torch.full((1,), 0.55))
        self.tile_embedding = nn.Embedding(9, tiles * positions * width)

    def forward(self, ratio: int, tiles: int) -> Tensor:
        """[tiles, P, D]"""
        gate = self.gate.tanh()
        tile = self.tile_embedding.weight[ratio].view(-1, *self.embedding.shape)[:tiles]
        return (1 - gate) * self.embedding + gate * tile


class VisionModel(nn.Module):
    """The encoder: local layers over all tiles, global layers, kept intermediate states."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        width, tiles, patch = config["hidden_size"], config["max_num_tiles"], config["patch_size"]
        self.side = config["image_size"] // patch
        self.positions = self.side**2 + 1
        self.padded = -(-self.positions // 8) * 8
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.gated_positional_embedding = PositionEmbedding(tiles, self.positions, width)
        self.pre_tile_positional_embedding = TileEmbedding(tiles, width)
        self.post_tile_positional_embedding = TileEmbedding(tiles, width)
        self.layernorm_pre = nn.LayerNorm(width)
        self.layernorm_post = nn.LayerNorm(width)
        self.transformer = Stack(config, config["num_hidden_layers"], gated=False)
        self.global_transformer = Stack(config, config["num_global_layers"], gated=True)
        self._masks: dict[int, Tensor] = {}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start from cosine patch filters, and sine-cosine positions in the tile and the canvas."""
        width, patch = self.config["hidden_size"], self.config["patch_size"]
        t = torch.arange(patch) + 0.5
        waves = torch.stack([torch.cos(math.pi * t * k / patch) for k in range(patch)])
        order = sorted((u * u + v * v, u, v) for u in range(patch) for v in range(patch))
        mixes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
        filters = []
        for rank in range(width):  # three of five brightness, the rest colour differences
            mix = 0 if rank % 5 < 3 else 1 + rank % 5 % 2
            count = len([f for f in filters if f[0] == mix])
            distance, u, v = order[count]
            wave = waves[u][:, None] * waves[v][None]
            kernel = mixes[mix][:, None, None] * (wave / wave.norm())
            boost = (1.0 + distance) ** 0.35 * (2.0 if mix else 1.0)
            filters.append((mix, kernel / mixes[mix].norm() * boost))
        self.patch_embedding.weight.copy_(torch.stack([f[1] for f in filters]) * 0.25)
        embedding = self.gated_positional_embedding
        inside = self._waves([(y, x) for y in range(self.side) for x in range(self.side)], width)
        embedding.embedding.copy_(torch.cat([torch.zeros(1, width), inside]))
        table = torch.zeros(9, 4, self.positions, width)
        pre = torch.zeros(9, 4, width)
        for (rows, columns), ratio in GRID_IDS.items():
            for tile in range(rows * columns):
                top, left = tile // columns * self.side, tile % columns * self.side
                places = [(top + y, left + x) for y in range(self.side) for x in range(self.side)]
                table[ratio, tile, 1:] = self._waves(places, width)
                pre[ratio, tile] = self._waves([(top, left)], width)[0] * 0.2
        embedding.tile_embedding.weight.copy_(table.view(9, -1))
        self.pre_tile_positional_embedding.embedding.weight.copy_(pre.view(9, -1))
        self.post_tile_positional_embedding.embedding.weight.copy_(pre.view(9, -1))

    @staticmethod
    def _waves(places: list[tuple[int, int]], width: int) -> Tensor:
        spots = torch.tensor(places, dtype=torch.float32)
        rates = 1.2 * (1 / 30.0) ** (torch.arange(width // 4) / (width // 4))
        angles = spots[:, :, None] * rates
        return torch.cat([angles.sin(), angles.cos()], -1).reshape(len(places), -1) * 0.5

    def mask(self, used: int) -> Tensor:
        """[4 * PP, 4 * PP], False only between two pad rows."""
        if used not in self._masks:
            rows = torch.arange(self.config["max_num_tiles"] * self.padded)
            pad = (rows // self.padded >= used) | (rows % self.padded >= self.positions)
            self._masks[used] = ~(pad[:, None] & pad[None])
        return self._masks[used]

    def forward(self, patches: Tensor, grid: tuple[int, int], exact: bool) -> tuple[Tensor, Tensor]:
        """Normalised patches [B, used, P - 1, 3 * patch^2] to the final states and all states."""
        b, used = patches.shape[:2]
        ratio = GRID_IDS[grid]
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))
        tiles = self.config["max_num_tiles"] if exact else used
        if tiles > used:
            x = torch.cat([x, x.new_zeros(b, tiles - used, *x.shape[2:])], 1)
        x = x + self.pre_tile_positional_embedding(ratio, tiles)
        x = torch.cat([self.class_embedding.expand(b, tiles, 1, -1), x], 2)
        x = x + self.gated_positional_embedding(ratio, tiles)
        x = self.layernorm_pre(x)
        mask = None
        if exact:
            x = F.pad(x, (0, 0, 0, self.padded - self.positions))
            mask = self.mask(used)
        shape = x.shape
        x = x.flatten(1, 2)
        kept = []
        for i, layer in enumerate(self.transformer.layers):
            if i in self.config["intermediate_layers_indices"]:
                kept.append(x)
            x = layer(x, mask)
        x = self.layernorm_post(x).view(shape) + self.post_tile_positional_embedding(ratio, tiles)
        x = x.flatten(1, 2)
        for layer in self.global_transformer.layers:
            x = layer(x, mask)
        both = torch.cat([x, torch.stack(kept, -1).flatten(-2)], -1)
        both = both.view(b, shape[1], shape[2], -1)[:, :used, : self.positions]
        return both[..., : x.shape[-1]], both


# --------------------------------------------------------------------------------------------------- text
class TextAttention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.heads, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        width = config["hidden_size"]
        self.head = width // self.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, self.kv * self.head, bias=False)
        self.v_proj = nn.Linear(width, self.kv * self.head, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat([-b, a], -1) * sin

        q, k = turn(self.split(self.q_proj(x), self.heads)), turn(self.split(self.k_proj(x), self.kv))
        v = self.split(self.v_proj(x), self.kv)
        group = self.heads // self.kv
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class CrossAttention(TextAttention):
    """Text looks at the image; normalised queries and keys, no RoPE."""

    def __init__(self, config: dict) -> None:
        super().__init__(config)
        self.q_norm = nn.RMSNorm(self.head, eps=config["rms_norm_eps"])
        self.k_norm = nn.RMSNorm(self.head, eps=config["rms_norm_eps"])

    def look(self, x: Tensor, states: Tensor) -> Tensor:
        q = self.q_norm(self.split(self.q_proj(x), self.heads))
        k = self.k_norm(self.split(self.k_proj(states), self.kv))
        v = self.split(self.v_proj(states), self.kv)
        group = self.heads // self.kv
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class TextMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    """A self-attention layer, or a gated cross-attention layer."""

    def __init__(self, config: dict, cross: bool) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.cross = cross
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.mlp = TextMLP(config)
        if cross:
            self.cross_attn = CrossAttention(config)
            self.cross_attn_attn_gate = nn.Parameter(torch.full((1,), math.pi / 4))
            self.cross_attn_mlp_gate = nn.Parameter(torch.full((1,), math.pi / 4))
        else:
            self.self_attn = TextAttention(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, states: Tensor | None, sees: Tensor | None
    ) -> Tensor:
        if not self.cross:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin)
            return x + self.mlp(self.post_attention_layernorm(x))
        if states is None:
            return x
        assert sees is not None
        attn = self.cross_attn.look(self.input_layernorm(x), states)
        x = x + self.cross_attn_attn_gate.tanh() * attn * sees
        return x + self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x)) * sees


class TextModel(nn.Module):
    """Embedding (eight rows more than the vocabulary, the first is the image token), layers, norm."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embed_tokens = nn.Embedding(config["vocab_size"] + 8, width)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(
            TextLayer(config, i in config["cross_attention_layers"])
            for i in range(config["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(width, eps=config["rms_norm_eps"])


class LanguageModel(nn.Module):
    """The decoder and its head, in the nesting of the checkpoint names."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.model = TextModel(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)


class DemoModel(nn.Module):
    """The whole model."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        vision, text = config["vision"], config["text"]
        self.vision_model = VisionModel(vision)
        width = vision["hidden_size"] * (1 + len(vision["intermediate_layers_indices"]))
        self.multi_modal_projector = nn.Linear(width, text["hidden_size"])
        self.language_model = LanguageModel(text)
        self.image_token = text["vocab_size"]
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        area = vision["patch_size"] ** 2
        self.register_buffer("pixel_scale", (1 / 255 / std).repeat_interleave(area), persistent=False)
        self.register_buffer("pixel_shift", (mean / std).repeat_interleave(area), persistent=False)
        self.register_buffer("frequencies", self._frequencies(), persistent=False)

    def _frequencies(self) -> Tensor:
        text = self.config["text"]
        head, rope = text["hidden_size"] // text["num_attention_heads"], text["rope_scaling"]
        base = 1.0 / text["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
        length = 2 * math.pi / base
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        smooth = ((original / length - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * base / rope["factor"] + smooth * base

    def see(self, patches: Tensor, grid: tuple[int, int], exact: bool) -> tuple[Tensor, Tensor]:
        """uint8 patches [B, used, P - 1, 3 * patch^2] to final vision states and all states."""
        return self.vision_model(patches.float() * self.pixel_scale - self.pixel_shift, grid, exact)

    def encode(self, patches: Tensor, grid: tuple[int, int], exact: bool) -> tuple[Tensor, Tensor]:
        """The final vision states, and the cross-attention states."""
        final, both = self.see(patches, grid, exact)
        return final, self.multi_modal_projector(both)

    def decode(self, tokens: Tensor, states: Tensor | None) -> Tensor:
        """Hidden states [B, N, D] for tokens [B, N]; states [B, used, P, D] or [B, S, D]."""
        model = self.language_model.model
        x = model.embed_tokens(tokens)
        angles = torch.outer(torch.arange(tokens.shape[1]).float(), self.frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        sees = None
        if states is not None:
            if states.dim() == 4:
                states = states.flatten(1, 2)
            sees = ((tokens == self.image_token).cumsum(1) > 0).float()[..., None]
        for layer in model.layers:
            x = layer(x, cos, sin, states, sees)
        return model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.language_model.lm_head(hidden)

    @torch.no_grad()
    def generate(self, prompt: list[int], states: Tensor, stop: set[int], limit: int = 32) -> list[list[int]]:
        """Greedy replies for a batch of images and one prompt."""
        tokens = torch.tensor(prompt).expand(len(states), -1)
        done = torch.zeros(len(states), dtype=torch.bool)
        for _ in range(limit):
            best = self.logits(self.decode(tokens, states)[:, -1]).argmax(-1)
            done |= torch.tensor([int(t) in stop for t in best])
            tokens = torch.cat([tokens, best[:, None]], 1)
            if bool(done.all()):
                break
        replies = []
        for row in tokens[:, len(prompt) :].tolist():
            end = next((i for i, t in enumerate(row) if t in stop), len(row))
            replies.append(row[:end])
        return replies
