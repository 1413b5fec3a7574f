"""The values that the backend gives and takes: a model's shape, devices, weights, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
# A tensor's name and, once it is computed, its values; see `base.Context.tap`.
Tap = Callable[[str, Floats | None], bool]


@dataclass(frozen=True)
class HParams:
    """The shape of a model, as its file says. Lengths in values unless a unit is given; see mllama.h."""

    n_layer: int
    n_ctx_train: int  # tokens
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rope_dim: int
    rope_freq_base: float
    rms_eps: float
    vocab_size: int  # logits a token
    n_token_embd: int  # rows of the embedding: the image token has one, and no logit
    image_token_id: int
    n_cross_layers: int
    # vision; all 0 without a projector
    n_vision_layer: int
    n_vision_global_layer: int
    vision_embd: int
    vision_ff: int
    vision_head: int
    vision_eps: float
    image_size: int  # pixels, side of a tile
    patch_size: int  # pixels
    max_tiles: int
    n_positions: int
    n_positions_padded: int
    n_aspect_ratios: int
    n_intermediate: int
    cross_layers: tuple[int, ...]

    @property
    def has_vision(self) -> bool:
        return self.n_vision_layer > 0


@dataclass(frozen=True)
class ModelFacts:
    """What never changes of an open model; see `base.Model`."""

    hparams: HParams
    layout: str
    repairs: tuple[str, ...]
    size: int  # bytes


@dataclass(frozen=True)
class Device:
    """A ggml device."""

    name: str
    description: str
    type: str  # cpu, gpu, igpu or accel
    memory_free: int  # bytes
    memory_total: int  # bytes
    error: str | None = None  # why it cannot be used, where that was tried


@dataclass(frozen=True)
class TensorInfo:
    """A weight and where it was put."""

    name: str
    type: str
    ne: tuple[int, int, int, int]  # fastest first
    n_bytes: int
    device: str
    is_vision: bool
    layout: str  # that it was repacked to; "": none


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that a model and its context hold on one device, or would hold.

    mapped:   weights read in place from the file's pages, which the system may drop and read again
    weights:  weights copied into the device's memory
    self_kv:  the self-attention cache
    cross_kv: of all images in the cache
    compute:  the text compute buffers, which stay
    vision:   the most that encoding an image, or computing its image_kv, takes while it runs
    staging:  this machine's memory while weights are copied, before any cache exists
    """

    device: str
    mapped: int
    weights: int
    self_kv: int
    cross_kv: int
    compute: int
    vision: int
    staging: int

    @property
    def peak(self) -> int:
        """The most at one time, without the mapped weights."""
        running = self.self_kv + self.cross_kv + self.compute + self.vision
        return self.weights + max(running, self.staging)


@dataclass(frozen=True)
class Memory:
    """Bytes that a model and its context hold; of all devices together by the names of `DeviceMemory`."""

    devices: tuple[DeviceMemory, ...]  # the CPU is the first

    def with_encoder(self, encoder: Memory) -> Memory:
        """Together with a context of the same model that only encodes images."""
        pairs = zip(self.devices, encoder.devices, strict=True)
        return Memory(
            tuple(replace(a, self_kv=a.self_kv + b.self_kv, vision=max(a.vision, b.vision)) for a, b in pairs)
        )

    @property
    def self_kv(self) -> int:
        return sum(device.self_kv for device in self.devices)

    @property
    def cross_kv(self) -> int:
        return sum(device.cross_kv for device in self.devices)

    @property
    def compute(self) -> int:
        return sum(device.compute for device in self.devices)
