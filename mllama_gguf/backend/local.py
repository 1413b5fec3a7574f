"""The C API's model and context as two Python classes: numpy in, numpy out, errors as exceptions.

One method for one C function and no decisions; those are in `session` and `model`. Not thread-safe.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import RequestError
from ..handles import Handle, OneProcess
from . import library
from .callbacks import Callbacks
from .library import Native
from .repack import usable_layouts
from .types import Bytes, Device, DeviceMemory, Floats, HParams, Memory, Tap, TensorInfo

KvType = Literal["f32", "f16", "q8_0"]

KV_TYPES: dict[str, int] = {"f32": 0, "f16": 1, "q8_0": 8}
_DEVICE_TYPES = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}


def devices() -> list[Device]:
    """All ggml devices of the process, in the order that indices count. Raises BackendError."""
    native = library.load()
    info = native.ffi.new("mllama_device_info *")
    found = []
    for index in range(native.lib.mllama_device_count()):
        native.check(native.lib.mllama_device_get(index, info))
        found.append(
            Device(
                native.text(info.name),
                native.text(info.description),
                _DEVICE_TYPES.get(info.type, "other"),
                info.memory_free,
                info.memory_total,
            )
        )
    return found


def device_index(name: str) -> int:
    """The index of a device by its name, whatever the case. Raises RequestError naming those that exist."""
    names = [device.name for device in devices()]
    for index, known in enumerate(names):
        if known.lower() == name.lower():
            return index
    raise RequestError(f"no device {name!r}; there are: {', '.join(names)}")


class NativeModel(OneProcess):
    """`mllama_model`: the weights. Contexts made from it keep them in memory until they are closed too."""

    def __init__(
        self,
        text_path: str | os.PathLike[str],
        mmproj_path: str | os.PathLike[str] | None,
        callbacks: Callbacks,
        *,
        n_gpu_layers: int = 0,
        vision_device: int = -1,
        devices: Sequence[int] | None = None,
        tensor_split: Sequence[float] | None = None,
        main_gpu: int = -1,
        use_mmap: bool = True,
        repack: bool = False,
        allow_quantized_vision: bool = False,
        check_only: bool = False,
        no_alloc: bool = False,
    ) -> None:
        """Load, or with check_only read and validate. no_alloc: for contexts that only `reserve`.

        Raises ModelError for a file that is not right, BackendError for memory and devices, and what the
        callbacks raised.
        """
        self.native = library.load()
        ffi, lib = self.native.ffi, self.native.lib
        params = ffi.new("mllama_model_params *", lib.mllama_model_default_params())
        params.n_gpu_layers = n_gpu_layers
        params.vision_device = vision_device
        # NULL is "every GPU"; no devices are an array of none.
        c_devices = ffi.NULL if devices is None else ffi.new("int32_t[]", [*devices, -1])
        c_split = ffi.NULL if tensor_split is None else ffi.new("float[]", [*tensor_split, 0.0])
        params.devices, params.n_devices = c_devices, len(devices or ())
        params.tensor_split, params.n_tensor_split = c_split, len(tensor_split or ())
        params.main_gpu = main_gpu
        params.use_mmap = use_mmap
        params.repack = repack
        layouts = ffi.new("char[]", ",".join(usable_layouts()).encode()) if repack else ffi.NULL
        params.repack_layouts = layouts
        params.allow_quantized_vision = allow_quantized_vision
        params.check_only = check_only
        params.no_alloc = no_alloc
        params.progress, params.abort = callbacks.c_progress, callbacks.c_abort

        out = ffi.new("mllama_model **")
        mmproj = ffi.NULL if mmproj_path is None else ffi.new("char[]", os.fsencode(mmproj_path))
        status = lib.mllama_model_load(os.fsencode(text_path), mmproj, params, out)
        if status == library.OK:
            self.handle = Handle("this model", out[0], lib.mllama_model_free)
            # C holds the callbacks as long as the model lives.
            self._callbacks = callbacks
        _raise(self.native, callbacks, status)

        hparams = lib.mllama_model_hparams(out[0])
        values = {f.name: getattr(hparams, f.name) for f in fields(HParams) if f.name != "cross_layers"}
        layers = lib.mllama_model_cross_layers(out[0])
        self.hparams = HParams(**values, cross_layers=tuple(layers[i] for i in range(hparams.n_cross_layers)))

    @property
    def layout(self) -> str:
        """How the files are laid out: canonical, A, B, text only or unknown, see mllama.h."""
        with self.handle as pointer:
            return self.native.text(self.native.lib.mllama_model_layout(pointer))

    @property
    def repairs(self) -> tuple[str, ...]:
        """What loading puts right or fills in, a line each."""
        repairs: list[str] = []
        with self.handle as pointer:
            while line := self.native.text(self.native.lib.mllama_model_repair(pointer, len(repairs))):
                repairs.append(line)
        return tuple(repairs)

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_model_size(pointer))

    def close(self) -> None:
        """Free it, or let the last of its contexts do so. Twice is fine."""
        self.handle.close()

    def devices(self) -> list[Device]:
        """All devices of the process."""
        return devices()

    def tensors(self) -> Iterator[TensorInfo]:
        """All weights."""
        info = self.native.ffi.new("mllama_tensor_info *")
        with self.handle as pointer:
            for index in range(self.native.lib.mllama_model_n_tensors(pointer)):
                self.native.check(self.native.lib.mllama_model_tensor(pointer, index, info))
                yield TensorInfo(
                    self.native.text(info.name),
                    self.native.text(info.type),
                    tuple(info.ne),
                    info.n_bytes,
                    self.native.text(info.device),
                    info.is_vision,
                    self.native.text(info.layout),
                )


def open_model(
    text_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None,
    *,
    callbacks: Callbacks,
    vision_device: str = "auto",
    devices: Sequence[str] | None = None,
    **settings: Any,
) -> NativeModel:
    """A NativeModel whose devices are given by name; vision_device "auto" and "cpu" too. Raises RequestError
    for a name that does not exist, and what NativeModel raises."""
    special = {"auto": -1, "cpu": -2}
    vision = special.get(vision_device.lower())
    return NativeModel(
        text_path,
        mmproj_path,
        callbacks,
        vision_device=device_index(vision_device) if vision is None else vision,
        devices=None if devices is None else [device_index(name) for name in devices],
        **settings,
    )


class NativeContext(OneProcess):
    """`mllama_context`: the caches and the computation.

    epoch: another number once the caches were lost with their process; never, here (see `engine`)
    """

    epoch = 0

    def __init__(
        self,
        model: NativeModel,
        callbacks: Callbacks,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_threads: int = 0,
        type_k: KvType = "f16",
        type_v: KvType = "f16",
        flash_attn: bool = True,
        offload_kqv: bool = True,
    ) -> None:
        """n_ctx, n_batch in tokens; n_threads 0: ggml's default. Raises RequestError, BackendError."""
        self.native = model.native
        self.hparams = model.hparams
        self._callbacks = callbacks
        ffi, lib = self.native.ffi, self.native.lib
        params = ffi.new("mllama_context_params *", lib.mllama_context_default_params())
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_threads = n_threads
        params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        params.flash_attn = flash_attn
        params.offload_kqv = offload_kqv
        params.progress, params.abort = callbacks.c_progress, callbacks.c_abort
        out = ffi.new("mllama_context **")
        with model.handle as pointer:
            status = lib.mllama_context_new(pointer, params, out)
            if status == library.OK:
                self.handle = Handle("this model", out[0], lib.mllama_context_free, needs=model.handle)
        _raise(self.native, callbacks, status)

    @property
    def n_ctx(self) -> int:
        """Most tokens."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_n_ctx(pointer))

    def close(self) -> None:
        """Free it, or let the thread that uses it do so when it is done. Twice is fine."""
        self.handle.close()

    @property
    def n_past(self) -> int:
        """Tokens in the self-attention cache."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_n_past(pointer))

    def memory(self) -> Memory:
        """Bytes in use now."""
        memory = self.native.ffi.new("mllama_memory *")
        names = [f.name for f in fields(DeviceMemory) if f.name != "device"]
        devices = []
        with self.handle as pointer:
            for index in range(self.native.lib.mllama_memory_count(pointer)):
                self.native.check(self.native.lib.mllama_memory_usage(pointer, index, memory))
                sizes = {name: getattr(memory, name) for name in names}
                devices.append(DeviceMemory(self.native.text(memory.device), **sizes))
        return Memory(tuple(devices))

    def reserve(self, n_tiles: Sequence[int]) -> None:
        """Make room for a full context and one group of pictures with these tiles; of a model opened with
        no_alloc, measure it. Raises OutOfMemoryError."""
        tiles = self.native.ffi.new("int32_t[]", list(n_tiles) or 1)
        with self.handle as pointer:
            status = self.native.lib.mllama_reserve(pointer, len(n_tiles), tiles)
            _raise(self.native, self._callbacks, status)

    def encode(self, pixels: Floats, aspect_ratio_id: int) -> Floats:
        """pixels float32 [n_tiles, 3, image_size, image_size] -> states float32 [n_tiles, n_positions,
        n_embd]."""
        h = self.hparams
        n_tiles = len(pixels)
        pixels = np.ascontiguousarray(pixels, np.float32)
        states = np.empty((n_tiles, h.n_positions, h.n_embd), np.float32)
        with self.handle as pointer:
            status = self.native.lib.mllama_encode(
                pointer, self._floats(pixels), n_tiles, aspect_ratio_id, self._floats(states)
            )
            _raise(self.native, self._callbacks, status)
        return states

    def image_fill(self, states: Sequence[Floats | int]) -> int:
        """Put one picture, or a group of adjacent ones, into a new slot; each states [n_tiles, P, D], or
        n_tiles: `image_set` brings the picture."""
        ffi = self.native.ffi
        arrays = [None if isinstance(s, int) else np.ascontiguousarray(s, np.float32) for s in states]
        pointers = ffi.new("float *[]", [ffi.NULL if a is None else self._floats(a) for a in arrays])
        n_tiles = ffi.new("int32_t[]", [s if isinstance(s, int) else len(s) for s in states])
        slot = ffi.new("int32_t *")
        with self.handle as pointer:
            status = self.native.lib.mllama_image_fill(pointer, len(arrays), pointers, n_tiles, slot)
            try:
                _raise(self.native, self._callbacks, status)
            except BaseException:
                if status == library.OK:  # a callback failed: nobody will hear of the slot
                    self.image_free(slot[0])
                raise
        return int(slot[0])

    def image_mapped_size(self, n_tiles: int) -> int:
        """How many bytes `image_map` wants of a picture with so many tiles; 0: it cannot be."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_image_mapped_size(pointer, n_tiles))

    def image_map(self, n_tiles: int, path: Path, offset: int) -> int:
        """Put one picture into a new slot that has the bytes of a file, as `image_get` gives them, from there
        on. Raises ModelError for a file that is not there or too short."""
        slot = self.native.ffi.new("int32_t *")
        with self.handle as pointer:
            self.native.check(
                self.native.lib.mllama_image_map(pointer, n_tiles, os.fsencode(path), offset, slot)
            )
        return int(slot[0])

    def image_free(self, slot: int) -> None:
        """Give a slot back."""
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_image_free(pointer, slot))

    def image_size(self, slot: int, image: int) -> int:
        """How many bytes `image_get` gives of a slot's picture, counted from 0 in its group."""
        n_bytes = self.native.ffi.new("uint64_t *")
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_image_size(pointer, slot, image, n_bytes))
        return int(n_bytes[0])

    def image_get(self, slot: int, image: int, offset: int, n_bytes: int) -> Bytes:
        """Some bytes of what a slot holds of a picture: uint8 [n_bytes]."""
        data = np.empty(n_bytes, np.uint8)
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_image_get(pointer, slot, image, offset, n_bytes, buffer))
        return data

    def image_set(self, slot: int, image: int, offset: int, data: Bytes) -> None:
        """Put them into another slot."""
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(
                self.native.lib.mllama_image_set(pointer, slot, image, offset, data.nbytes, buffer)
            )

    def decode(
        self,
        tokens: Sequence[int],
        slot: int,
        n_visible: int,
        logits: Literal["none", "last", "all"] = "last",
    ) -> Floats:
        """Append tokens that all see the first n_visible pictures of a slot (-1: no picture yet).

        Returns float32 [0, 1 or n_tokens, vocab_size].
        """
        rows = {"none": 0, "last": 1, "all": len(tokens)}[logits]
        mode = {"none": 0, "last": 1, "all": 2}[logits]
        out = np.empty((rows, self.hparams.vocab_size), np.float32)
        with self.handle as pointer:
            status = self.native.lib.mllama_decode(
                pointer,
                self.native.ffi.new("int32_t[]", list(tokens)),
                len(tokens),
                slot,
                n_visible,
                mode,
                self._floats(out) if rows else self.native.ffi.NULL,
                out.size,
            )
            _raise(self.native, self._callbacks, status)
        return out

    def truncate(self, n_past: int) -> None:
        """Keep the first n_past tokens."""
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_truncate(pointer, n_past))

    def past_size(self, n_tokens: int) -> int:
        """How many bytes `past_get` gives."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_past_size(pointer, n_tokens))

    def past_get(self, n_tokens: int) -> Bytes:
        """What the first tokens left in the self-attention cache: uint8 [past_size]."""
        data = np.empty(self.past_size(n_tokens), np.uint8)
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_past_get(pointer, n_tokens, data.nbytes, buffer))
        return data

    def past_set(self, n_tokens: int, data: Bytes) -> None:
        """Let the self-attention cache hold these tokens, and no others."""
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_past_set(pointer, n_tokens, data.nbytes, buffer))

    def clear(self) -> None:
        """Forget tokens and pictures."""
        with self.handle as pointer:
            self.native.lib.mllama_clear(pointer)

    @contextmanager
    def tap(self, callback: Tap) -> Iterator[None]:
        """Inside the block callback(name, None) is asked for every intermediate tensor whether its values are
        wanted, and if so callback(name, values) gets them: float32, slowest dimension first, valid during the
        call.
        """
        ffi, lib = self.native.ffi, self.native.lib

        def on_tensor(name: Any, ne: Any, data: Any, _: Any) -> bool:
            text = self.native.text(name)
            if data == ffi.NULL:
                return bool(callback(text, None))
            shape = [ne[i] for i in range(4)]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            n = int(np.prod(shape, dtype=np.int64))
            values = np.frombuffer(ffi.buffer(data, n * 4), np.float32)
            callback(text, values.reshape(shape[::-1]))
            return False

        c_callback = ffi.callback("mllama_tap_callback", on_tensor, onerror=self._callbacks.on_error)
        with self.handle as pointer:
            lib.mllama_set_tap(pointer, c_callback, ffi.NULL)
            try:
                yield
            finally:
                lib.mllama_set_tap(pointer, ffi.NULL, ffi.NULL)

    def _floats(self, array: Floats) -> Any:
        """float * to a C-contiguous array, which must outlive it."""
        return self.native.ffi.cast("float *", array.ctypes.data)


def _raise(native: Native, callbacks: Callbacks, status: int) -> None:
    """What a callback raised first, for that is why the status is what it is."""
    error = native.error(status) if status != library.OK else None
    callbacks.raise_pending()
    if error is not None:
        raise error
