"""The C API's context as a Python class: numpy in, numpy out, errors as exceptions.

One method for one C function and no decisions; those are in `decode`. `base.Context` says what each method
does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MllamaError, ModelError
from ..handles import Handle, OneProcess
from ..settings import KvType
from . import library
from .base import CHUNK, Item, Logits
from .callbacks import Callbacks
from .library import Native
from .types import Bytes, DeviceMemory, Floats, HParams, Memory, Tap

KV_TYPES: dict[KvType, int] = {"f32": 0, "f16": 1, "q8_0": 8}


class LocalContext(OneProcess):
    """`mllama_context`, as a `Context`. Not thread-safe."""

    epoch = 0  # the caches are never lost

    def __init__(
        self,
        native: Native,
        model: Handle,
        hparams: HParams,
        callbacks: Callbacks,
        *,
        n_ctx: int,
        n_batch: int,
        n_threads: int,
        type_k: KvType,
        type_v: KvType,
        flash_attn: bool,
        exact: bool,
        offload_kqv: bool,
        cpu_kernel: str,
    ) -> None:
        """For `LocalModel.open_context`. model: the C object, with these hparams."""
        self.native = native
        self.hparams = hparams
        self._callbacks = callbacks
        ffi, lib = self.native.ffi, self.native.lib
        params = ffi.new("mllama_context_params *", lib.mllama_context_default_params())
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_threads = n_threads
        params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        params.flash_attn = flash_attn
        params.exact = exact
        params.offload_kqv = offload_kqv
        c_kernel = ffi.new("char[]", cpu_kernel.encode()) if cpu_kernel else ffi.NULL  # read during the call
        params.cpu_kernel = c_kernel
        params.progress, params.abort = callbacks.c_progress, callbacks.c_abort
        out = ffi.new("mllama_context **")
        with model as pointer:
            status = lib.mllama_context_new(pointer, params, out)
            if status == library.OK:
                self.handle = Handle("this model", out[0], lib.mllama_context_free, needs=model)
        callbacks.check(status)

    @property
    def n_ctx(self) -> int:
        """As `Context.n_ctx`."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_n_ctx(pointer))

    def close(self) -> None:
        """As `Context.close`."""
        self.handle.close()

    @property
    def n_past(self) -> int:
        """As `Context.n_past`."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_n_past(pointer))

    def memory(self) -> Memory:
        """As `Context.memory`."""
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
        """As `Context.reserve`."""
        tiles = self.native.ffi.new("int32_t[]", list(n_tiles) or 1)
        with self.handle as pointer:
            status = self.native.lib.mllama_reserve(pointer, len(n_tiles), tiles)
            self._callbacks.check(status)

    def reserve_many(self, n_sequences: int, n_ctx: int, n_tiles: Sequence[int]) -> None:
        """Measure n_sequences sequences of n_ctx tokens, each with a group of images with these tiles, and
        the steps that they compute together. Only for a model opened with no_alloc. Raises RequestError."""
        tiles = self.native.ffi.new("int32_t[]", list(n_tiles) or 1)
        with self.handle as pointer:
            status = self.native.lib.mllama_reserve_many(
                pointer, n_sequences, n_ctx, CHUNK, len(n_tiles), tiles
            )
            self._callbacks.check(status)

    def encode(self, pixels: Floats, aspect_ratio_id: int) -> Floats:
        """As `Context.encode`."""
        h = self.hparams
        n_tiles = len(pixels)
        pixels = np.ascontiguousarray(pixels, np.float32)
        states = np.empty((n_tiles, h.n_positions, h.n_embd), np.float32)
        with self.handle as pointer:
            status = self.native.lib.mllama_encode(
                pointer, self._floats(pixels), n_tiles, aspect_ratio_id, self._floats(states)
            )
            self._callbacks.check(status)
        return states

    def image_fill(self, states: Sequence[Floats | int]) -> int:
        """As `Context.image_fill`."""
        ffi = self.native.ffi
        arrays = [None if isinstance(s, int) else np.ascontiguousarray(s, np.float32) for s in states]
        pointers = ffi.new("float *[]", [ffi.NULL if a is None else self._floats(a) for a in arrays])
        n_tiles = ffi.new("int32_t[]", [s if isinstance(s, int) else len(s) for s in states])
        slot = ffi.new("int32_t *")
        with self.handle as pointer:
            status = self.native.lib.mllama_image_fill(pointer, len(arrays), pointers, n_tiles, slot)
            try:
                self._callbacks.check(status)
            except BaseException:
                if status == library.OK:  # a callback failed: nobody will get the slot
                    self.image_free(slot[0])
                raise
        return int(slot[0])

    def image_mapped_size(self, n_tiles: int) -> int:
        """As `Context.image_mapped_size`."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_image_mapped_size(pointer, n_tiles))

    def image_map(self, n_tiles: int, path: Path, offset: int) -> int:
        """As `Context.image_map`."""
        slot = self.native.ffi.new("int32_t *")
        with self.handle as pointer:
            self.native.check(
                self.native.lib.mllama_image_map(pointer, n_tiles, os.fsencode(path), offset, slot)
            )
        return int(slot[0])

    def image_free(self, slot: int) -> None:
        """As `Context.image_free`."""
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_image_free(pointer, slot))

    def image_size(self, slot: int, image: int) -> int:
        """As `Context.image_size`."""
        n_bytes = self.native.ffi.new("uint64_t *")
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_image_size(pointer, slot, image, n_bytes))
        return int(n_bytes[0])

    def image_get(self, slot: int, image: int, offset: int, n_bytes: int) -> Bytes:
        """As `Context.image_get`."""
        data = np.empty(n_bytes, np.uint8)
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_image_get(pointer, slot, image, offset, n_bytes, buffer))
        return data

    def image_set(self, slot: int, image: int, offset: int, data: Bytes) -> None:
        """As `Context.image_set`."""
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
        logits: Logits = "last",
    ) -> Floats:
        """As `Context.decode`."""
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
            self._callbacks.check(status)
        return out

    def truncate(self, n_past: int) -> None:
        """As `Context.truncate`."""
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_truncate(pointer, n_past))

    def prefix_kv_size(self, n_tokens: int) -> int:
        """As `Context.prefix_kv_size`."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_prefix_kv_size(pointer, n_tokens))

    def prefix_kv_get(self, n_tokens: int) -> Bytes:
        """As `Context.prefix_kv_get`."""
        data = np.empty(self.prefix_kv_size(n_tokens), np.uint8)
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_prefix_kv_get(pointer, n_tokens, data.nbytes, buffer))
        return data

    def prefix_kv_set(self, n_tokens: int, data: Bytes) -> None:
        """As `Context.prefix_kv_set`."""
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_prefix_kv_set(pointer, n_tokens, data.nbytes, buffer))

    def clear(self) -> None:
        """As `Context.clear`."""
        with self.handle as pointer:
            self.native.lib.mllama_clear(pointer)

    def sequence_new(self, n_ctx: int) -> int:
        """As `SharedContext.sequence_new`."""
        number = self.native.ffi.new("int32_t *")
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_sequence_new(pointer, n_ctx, number))
        return int(number[0])

    def sequence_free(self, sequence: int) -> None:
        """As `SharedContext.sequence_free`."""
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_sequence_free(pointer, sequence))

    def sequence_n_past(self, sequence: int) -> int:
        """As `SharedContext.sequence_n_past`."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_sequence_n_past(pointer, sequence))

    def sequence_truncate(self, sequence: int, n_past: int) -> None:
        """As `SharedContext.sequence_truncate`."""
        with self.handle as pointer:
            self.native.check(self.native.lib.mllama_sequence_truncate(pointer, sequence, n_past))

    def sequence_prefix_kv_get(self, sequence: int, n_tokens: int) -> Bytes:
        """As `SharedContext.sequence_prefix_kv_get`."""
        data = np.empty(self.prefix_kv_size(n_tokens), np.uint8)
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(
                self.native.lib.mllama_sequence_prefix_kv_get(
                    pointer, sequence, n_tokens, data.nbytes, buffer
                )
            )
        return data

    def sequence_prefix_kv_set(self, sequence: int, n_tokens: int, data: Bytes) -> None:
        """As `SharedContext.sequence_prefix_kv_set`."""
        buffer = self.native.ffi.from_buffer(data)
        with self.handle as pointer:
            self.native.check(
                self.native.lib.mllama_sequence_prefix_kv_set(
                    pointer, sequence, n_tokens, data.nbytes, buffer
                )
            )

    def decode_many(self, items: Sequence[Item]) -> list[Floats | MllamaError]:
        """As `SharedContext.decode_many`."""
        ffi, vocab_size = self.native.ffi, self.hparams.vocab_size
        c_items = ffi.new("mllama_item[]", len(items))
        kept, outs = [], []
        for c, item in zip(c_items, items, strict=True):
            rows = {"none": 0, "last": 1, "all": len(item.tokens)}[item.logits]
            outs.append(out := np.empty((rows, vocab_size), np.float32))
            kept.append(tokens := ffi.new("int32_t[]", list(item.tokens)))
            c.sequence, c.tokens, c.n_tokens = item.sequence, tokens, len(item.tokens)
            c.slot, c.n_visible = item.slot, item.n_visible
            c.logits_mode = {"none": 0, "last": 1, "all": 2}[item.logits]
            c.logits, c.logits_capacity = (self._floats(out) if rows else ffi.NULL), out.size
        with self.handle as pointer:
            self._callbacks.check(self.native.lib.mllama_decode_many(pointer, len(items), c_items))
        words = self.native.last_error()
        return [
            out if c.status == library.OK else ModelError(words) for c, out in zip(c_items, outs, strict=True)
        ]

    @contextmanager
    def tap(self, callback: Tap) -> Iterator[None]:
        """As `Context.tap`."""
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
        """As `Context.on_tensor`."""
        return self.native.ffi.cast("float *", array.ctypes.data)
