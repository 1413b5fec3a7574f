"""Read config.json: the shape of the model, its RoPE factors, and whether its images are prepared as ours.

RoPE factors: https://github.com/meta-llama/llama-models, ``apply_scaling``
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..vision.preprocess import IMAGE_MEAN, IMAGE_STD, supported_grids
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Shape:
    """The values of config.json that the converter needs."""

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


def read_shape(checkpoint: Checkpoint) -> Shape:
    """Read and check config.json. Missing values get the defaults of transformers."""
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

    def count(section: dict[str, Any], name: str, key: str, default: int) -> int:
        value = section.get(key, default)
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
        if not value or value != sorted(set(value)):
            # Meta's encoder goes through its layers and keeps those named: order and repetition mean nothing.
            raise fail(f"{name}.{key}", value, "different layers in rising order are expected")
        return tuple(value)

    t, v = "text_config", "vision_config"
    vocab_size = count(text, t, "vocab_size", 128256)
    n_embd, n_layer = count(text, t, "hidden_size", 4096), count(text, t, "num_hidden_layers", 40)
    n_head = count(text, t, "num_attention_heads", 32)
    n_head_kv = count(text, t, "num_key_value_heads", 8)
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
        # layernorm_pre and layernorm_post always have 1e-5; the file has one key for all norms.
        raise fail(f"{v}.norm_eps", vision_eps, "only 1e-5 is supported")
    vision_embd = count(vision, v, "hidden_size", 1280)
    # HF writes num_attention_heads or, as the attribute is named in its class, attention_heads.
    vision_head = count(
        vision, v, "attention_heads" if "attention_heads" in vision else "num_attention_heads", 16
    )
    if vision_embd % vision_head:
        raise fail(f"{v}.num_attention_heads", vision_head, f"does not divide the width {vision_embd}")
    image_size, patch_size = count(vision, v, "image_size", 448), count(vision, v, "patch_size", 14)
    if image_size % patch_size:
        raise fail(f"{v}.patch_size", patch_size, f"does not divide the image size {image_size}")
    max_tiles = count(vision, v, "max_num_tiles", 4)
    if max_tiles > 64:
        raise fail(f"{v}.max_num_tiles", max_tiles, "at most 64 are supported")
    grids = [list(grid) for grid in supported_grids(max_tiles)]
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
        n_ff=count(text, t, "intermediate_size", 14336),
        n_ctx=count(text, t, "max_position_embeddings", 131072),
        rms_eps=real(text, t, "rms_norm_eps", 1e-5),
        rope_theta=real(theta_section, t, "rope_theta", 500000.0),
        rope_scaling=rope,
        cross_layers=cross,
        vision_embd=vision_embd,
        vision_layers=vision_layers,
        vision_global_layers=count(vision, v, "num_global_layers", 8),
        vision_head=vision_head,
        vision_ff=count(vision, v, "intermediate_size", 5120),
        vision_eps=vision_eps,
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        max_tiles=max_tiles,
        n_ratios=len(grids),
        intermediate=indices(vision, v, "intermediate_layers_indices", vision_layers, [3, 7, 15, 23, 30]),
    )


def rope_factors(shape: Shape, file: Path) -> npt.NDArray[np.float32] | None:
    """The divisor of each RoPE frequency, [head_dim / 2]; None without scaling.

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


def check_preprocessor(checkpoint: Checkpoint, shape: Shape) -> None:
    """Refuse a model whose images are prepared in another way: GGUF has no keys for that."""
    settings = checkpoint.json("preprocessor_config.json")
    file = checkpoint.directory / "preprocessor_config.json"
    size = {"height": shape.image_size, "width": shape.image_size}
    for key, expected in (("size", size), ("max_image_tiles", shape.max_tiles)):
        if settings.get(key, expected) != expected:
            raise ModelError(f"{file}: {key} = {settings[key]!r}: {expected!r} expected from config.json")
    for key, numbers in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        value = settings.get(key, list(numbers))
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not np.allclose(value, numbers, rtol=0, atol=1e-6)
        ):
            raise ModelError(f"{file}: {key} = {value!r}: only CLIP's {list(numbers)} is supported")
