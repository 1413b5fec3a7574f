"""Read config.json: the shape of the model, its RoPE factors, and whether its images are prepared as ours.

RoPE factors: https://github.com/meta-llama/llama-models, ``apply_scaling``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..vision.preprocess import IMAGE_MEAN, IMAGE_STD, supported_grids
from ..words import brief
from .checkpoint import Checkpoint

_LARGEST = float(np.finfo(np.float32).max)


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


def _is_positive(value: object) -> TypeGuard[float]:
    """Whether this is a number above 0 that fits into a float."""
    return isinstance(value, (int, float)) and value is not True and 0 < value <= _LARGEST


class _Section:
    """An object of config.json, read with checks. Missing values get the defaults of transformers."""

    def __init__(self, file: Path, name: str, values: object) -> None:
        """name: where it is in the file; "": it is the whole"""
        self._file, self._name = file, name
        if not isinstance(values, dict):
            raise ModelError(f"{file}: {name} = {brief(values)}: an object is expected")
        self.values: dict[str, Any] = values

    def fail(self, key: str, value: object, why: str) -> ModelError:
        """The error about a value."""
        return ModelError(
            f"{self._file}: {self._name}{'.' if self._name else ''}{key} = {brief(value)}: {why}"
        )

    def count(self, key: str, default: int) -> int:
        """A whole number above 0."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.fail(key, value, "a positive whole number is expected")
        return value

    def real(self, key: str, default: float) -> float:
        """A number above 0 that a float32 can hold."""
        value = self.values.get(key, default)
        if not _is_positive(value):
            raise self.fail(key, value, "a positive number is expected")
        return float(value)

    def layers(self, key: str, below: int, default: list[int]) -> tuple[int, ...]:
        """Numbers of layers, in rising order."""
        value = self.values.get(key, default)
        if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < below for i in value):
            raise self.fail(key, value, f"a list of layers below {below} is expected")
        if not value or value != sorted(set(value)):
            # Meta's encoder goes through its layers and keeps those named: order and repetition mean nothing.
            raise self.fail(key, value, "different layers in rising order are expected")
        return tuple(value)

    def check_only(self, key: str, supported: str) -> None:
        """Raise ModelError for another value than the one that is supported."""
        if self.values.get(key, supported) != supported:
            raise self.fail(key, self.values[key], f"only {supported} is supported")


def read_shape(checkpoint: Checkpoint) -> Shape:
    """Read and check config.json. Missing values get the defaults of transformers."""
    file = checkpoint.config_file
    config = _Section(file, "", checkpoint.config)
    kind = config.values.get("model_type")
    if kind != "mllama":
        raise config.fail("model_type", kind, "only mllama (Llama 3.2 Vision) is supported")
    text = _Section(file, "text_config", config.values.get("text_config"))
    vision = _Section(file, "vision_config", config.values.get("vision_config"))
    vocab_size = text.count("vocab_size", 128256)
    given = config.values.get("image_token_index", config.values.get("image_token_id", vocab_size))
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= vocab_size:
        raise config.fail("image_token_index", given, f"a token up to {vocab_size} is expected")
    return Shape(
        vocab_size=vocab_size, image_token_id=given, **_text_values(file, text), **_vision_values(vision)
    )


def _text_values(file: Path, text: _Section) -> dict[str, Any]:
    """The fields of `Shape` about the text model."""
    n_embd, n_layer = text.count("hidden_size", 4096), text.count("num_hidden_layers", 40)
    n_head, n_head_kv = text.count("num_attention_heads", 32), text.count("num_key_value_heads", 8)
    head_dim = text.count("head_dim", n_embd // n_head)
    if n_head % n_head_kv:
        raise text.fail("num_key_value_heads", n_head_kv, f"does not divide the {n_head} heads")
    if head_dim % 2:
        raise text.fail("head_dim", head_dim, "RoPE needs an even number")
    text.check_only("hidden_act", "silu")
    # transformers 5 keeps theta and scaling together in rope_parameters.
    rope = text.values.get("rope_parameters") or text.values.get("rope_scaling")
    if rope is not None and not isinstance(rope, dict):
        raise text.fail("rope_scaling", rope, "an object is expected")
    theta = _Section(file, "text_config", rope) if rope and "rope_theta" in rope else text
    return {
        "n_embd": n_embd,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "head_dim": head_dim,
        "n_ff": text.count("intermediate_size", 14336),
        "n_ctx": text.count("max_position_embeddings", 131072),
        "rms_eps": text.real("rms_norm_eps", 1e-5),
        "rope_theta": theta.real("rope_theta", 500000.0),
        "rope_scaling": rope,
        "cross_layers": text.layers("cross_attention_layers", n_layer, [3, 8, 13, 18, 23, 28, 33, 38]),
    }


def _vision_values(vision: _Section) -> dict[str, Any]:
    """The fields of `Shape` about the vision encoder."""
    vision.check_only("hidden_act", "gelu")
    eps = vision.real("norm_eps", 1e-5)
    if eps != 1e-5:
        # layernorm_pre and layernorm_post always have 1e-5; the file has one key for all norms.
        raise vision.fail("norm_eps", eps, "only 1e-5 is supported")
    embd = vision.count("hidden_size", 1280)
    # HF writes num_attention_heads or, as the attribute is named in its class, attention_heads.
    heads_key = "attention_heads" if "attention_heads" in vision.values else "num_attention_heads"
    head = vision.count(heads_key, 16)
    if embd % head:
        raise vision.fail("num_attention_heads", head, f"does not divide the width {embd}")
    image_size, patch_size = vision.count("image_size", 448), vision.count("patch_size", 14)
    if image_size % patch_size:
        raise vision.fail("patch_size", patch_size, f"does not divide the image size {image_size}")
    max_tiles = vision.count("max_num_tiles", 4)
    if max_tiles > 64:
        raise vision.fail("max_num_tiles", max_tiles, "at most 64 are supported")
    grids = [list(grid) for grid in supported_grids(max_tiles)]
    ratios = vision.values.get("supported_aspect_ratios")
    if ratios is not None and ratios != grids:
        raise vision.fail("supported_aspect_ratios", ratios, f"{grids} are expected for {max_tiles} tiles")
    channels = vision.count("num_channels", 3)
    if channels != 3:
        raise vision.fail("num_channels", channels, "only 3 is supported")
    layers = vision.count("num_hidden_layers", 32)
    return {
        "vision_embd": embd,
        "vision_layers": layers,
        "vision_global_layers": vision.count("num_global_layers", 8),
        "vision_head": head,
        "vision_ff": vision.count("intermediate_size", 5120),
        "vision_eps": eps,
        "image_size": image_size,
        "patch_size": patch_size,
        "channels": channels,
        "max_tiles": max_tiles,
        "n_ratios": len(grids),
        "intermediate": vision.layers("intermediate_layers_indices", layers, [3, 7, 15, 23, 30]),
    }


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
        raise ModelError(
            f"{file}: text_config.rope_scaling.rope_type = {brief(kind)}: only llama3 is supported"
        )
    values = {}
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        value = scaling.get(key)
        if not _is_positive(value):
            raise ModelError(
                f"{file}: text_config.rope_scaling.{key} = {brief(value)}: a positive number is expected"
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
            raise ModelError(
                f"{file}: {key} = {brief(settings[key])}: {expected!r} expected from config.json"
            )
    for key, numbers in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        value = settings.get(key, list(numbers))
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(
                isinstance(v, (int, float)) and n - 1e-6 <= v <= n + 1e-6
                for v, n in zip(value, numbers, strict=True)
            )
        ):
            raise ModelError(f"{file}: {key} = {brief(value)}: only CLIP's {list(numbers)} is supported")
