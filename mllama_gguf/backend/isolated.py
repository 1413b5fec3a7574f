"""A model and its contexts in a child process, with the same methods as those in this process.

`base` says what each method does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import BackendError, MllamaError
from ..handles import OneProcess, finalize
from ..settings import KvType
from .base import Item, Logits
from .callbacks import Callbacks
from .library import load
from .supervisor import CONNECT_SECONDS, LOST, Supervisor
from .types import Bytes, Device, Floats, HParams, Memory, ModelFacts, Tap, TensorInfo

T = TypeVar("T")

EPOCH = 1000  # numbers of sequences in one epoch, more than there are


class IsolatedModel(OneProcess):
    """A `Model` in a child process."""

    is_local = False

    def __init__(
        self,
        supervisor: Supervisor,
        text_path: str | os.PathLike[str],
        mmproj_path: str | os.PathLike[str] | None,
        callbacks: Callbacks,
        **settings: Any,
    ) -> None:
        """paths, settings: those of `local.open_model`. A later process opens the same files, wherever this
        process is then. Raises what that raises, BackendError when the child dies."""
        self._supervisor = supervisor
        self._callbacks = callbacks
        paths = [None if path is None else os.path.abspath(path) for path in (text_path, mmproj_path)]
        self._facts: ModelFacts = supervisor.open_model(callbacks, *paths, **settings)

    @property
    def hparams(self) -> HParams:
        """As `Model.hparams`."""
        return self._facts.hparams

    @property
    def layout(self) -> str:
        """As `Model.layout`."""
        self.check_process()
        return self._facts.layout

    @property
    def repairs(self) -> tuple[str, ...]:
        """As `Model.repairs`."""
        self.check_process()
        return self._facts.repairs

    @property
    def size(self) -> int:
        """As `Model.size`."""
        return self._facts.size

    def devices(self) -> list[Device]:
        """As `Model.devices`: those of the workers too."""
        found: list[Device] = self._supervisor.call(self._callbacks, "model", "devices")
        return found

    def tensors(self) -> Iterable[TensorInfo]:
        """As `Model.tensors`."""
        found: list[TensorInfo] = self._supervisor.call(self._callbacks, "model", "tensors")
        return found

    def open_context(
        self,
        callbacks: Callbacks,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_threads: int = 0,
        type_k: KvType = "f16",
        type_v: KvType = "f16",
        flash_attn: bool = True,
        offload_kqv: bool = True,
        cpu_kernel: str = "",
    ) -> IsolatedContext:
        """As `Model.open_context`."""
        return IsolatedContext(
            self._supervisor,
            self.hparams,
            callbacks,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_threads=n_threads,
            type_k=type_k,
            type_v=type_v,
            flash_attn=flash_attn,
            offload_kqv=offload_kqv,
            cpu_kernel=cpu_kernel,
        )

    def close(self) -> None:
        """End the child process, and all contexts with it. Twice is fine."""
        self._supervisor.close()


class IsolatedContext(OneProcess):
    """A `Context` in a child process. Not thread-safe."""

    def __init__(
        self, supervisor: Supervisor, hparams: HParams, callbacks: Callbacks, **settings: Any
    ) -> None:
        """For `IsolatedModel.open_context`. settings: those of a context."""
        self.hparams = hparams
        self._supervisor = supervisor
        self._callbacks = callbacks
        self._tap: Tap | None = None
        self._number, self._n_ctx = supervisor.open_context(callbacks, **settings)
        self._closing = finalize(self, supervisor.close_context, self._number)
        self._closing.atexit = False  # the whole child ends then

    @property
    def n_ctx(self) -> int:
        """As `Context.n_ctx`."""
        return self._n_ctx

    @property
    def n_past(self) -> int:
        """As `Context.n_past`. Starts a lost process again."""
        return self._call(int, "n_past")

    @property
    def epoch(self) -> int:
        """As `Context.epoch`."""
        return self._supervisor.epoch

    def memory(self) -> Memory:
        """As `Context.memory`."""
        return self._call(Memory, "memory")

    def reserve(self, n_tiles: Sequence[int]) -> None:
        """As `Context.reserve`."""
        self._call(type(None), "reserve", n_tiles)

    def encode(self, pixels: Floats, aspect_ratio_id: int) -> Floats:
        """As `Context.encode`."""
        return self._call(np.ndarray, "encode", pixels, aspect_ratio_id)

    def image_fill(self, states: Sequence[Floats | int]) -> int:
        """As `Context.image_fill`."""
        return self._call(int, "image_fill", states)

    def image_mapped_size(self, n_tiles: int) -> int:
        """As `Context.image_mapped_size`."""
        return self._call(int, "image_mapped_size", n_tiles)

    def image_map(self, n_tiles: int, path: Path, offset: int) -> int:
        """As `Context.image_map`."""
        return self._call(int, "image_map", n_tiles, path, offset)

    def image_free(self, slot: int) -> None:
        """As `Context.image_free`."""
        self._call(type(None), "image_free", slot)

    def image_size(self, slot: int, image: int) -> int:
        """As `Context.image_size`."""
        return self._call(int, "image_size", slot, image)

    def image_get(self, slot: int, image: int, offset: int, n_bytes: int) -> Bytes:
        """As `Context.image_get`."""
        return self._call(np.ndarray, "image_get", slot, image, offset, n_bytes)

    def image_set(self, slot: int, image: int, offset: int, data: Bytes) -> None:
        """As `Context.image_set`."""
        self._call(type(None), "image_set", slot, image, offset, data)

    def decode(self, tokens: Sequence[int], slot: int, n_visible: int, logits: Logits = "last") -> Floats:
        """As `Context.decode`."""
        return self._call(np.ndarray, "decode", tokens, slot, n_visible, logits)

    def truncate(self, n_past: int) -> None:
        """As `Context.truncate`."""
        self._call(type(None), "truncate", n_past)

    def prefix_kv_size(self, n_tokens: int) -> int:
        """As `Context.prefix_kv_size`."""
        return self._call(int, "prefix_kv_size", n_tokens)

    def prefix_kv_get(self, n_tokens: int) -> Bytes:
        """As `Context.prefix_kv_get`."""
        return self._call(np.ndarray, "prefix_kv_get", n_tokens)

    def prefix_kv_set(self, n_tokens: int, data: Bytes) -> None:
        """As `Context.prefix_kv_set`."""
        self._call(type(None), "prefix_kv_set", n_tokens, data)

    def clear(self) -> None:
        """As `Context.clear`."""
        self._call(type(None), "clear")

    def sequence_new(self, n_ctx: int) -> int:
        """As `SharedContext.sequence_new`. The number tells the epoch too: another process may have given
        the same number to another sequence."""
        epoch = self.epoch
        return epoch * EPOCH + self._call(int, "sequence_new", n_ctx, epoch=epoch)

    def sequence_free(self, sequence: int) -> None:
        """As `SharedContext.sequence_free`."""
        self._call_sequence(type(None), "sequence_free", sequence)

    def sequence_n_past(self, sequence: int) -> int:
        """As `SharedContext.sequence_n_past`."""
        return self._call_sequence(int, "sequence_n_past", sequence)

    def sequence_truncate(self, sequence: int, n_past: int) -> None:
        """As `SharedContext.sequence_truncate`."""
        self._call_sequence(type(None), "sequence_truncate", sequence, n_past)

    def sequence_prefix_kv_get(self, sequence: int, n_tokens: int) -> Bytes:
        """As `SharedContext.sequence_prefix_kv_get`."""
        return self._call_sequence(np.ndarray, "sequence_prefix_kv_get", sequence, n_tokens)

    def sequence_prefix_kv_set(self, sequence: int, n_tokens: int, data: Bytes) -> None:
        """As `SharedContext.sequence_prefix_kv_set`."""
        self._call_sequence(type(None), "sequence_prefix_kv_set", sequence, n_tokens, data)

    def decode_many(self, items: Sequence[Item]) -> list[Floats | MllamaError]:
        """As `SharedContext.decode_many`. A BackendError for those whose sequences are lost."""
        epoch = self.epoch
        results: list[Floats | MllamaError] = [BackendError(LOST) for _ in items]
        there = [i for i, item in enumerate(items) if item.sequence // EPOCH == epoch]
        if there:
            known = [replace(items[i], sequence=items[i].sequence % EPOCH) for i in there]
            for i, result in zip(there, self._call(list, "decode_many", known, epoch=epoch), strict=True):
                results[i] = result
        return results

    @contextmanager
    def tap(self, callback: Tap) -> Iterator[None]:
        """As `Context.tap`."""
        self._tap = callback
        try:
            yield
        finally:
            self._tap = None

    def close(self) -> None:
        """As `Context.close`."""
        self._closing()

    def _call_sequence(self, kind: type[T], name: str, sequence: int, *args: Any) -> T:
        """A call about a sequence, which must belong to the process that is there."""
        return self._call(kind, name, sequence % EPOCH, *args, epoch=sequence // EPOCH)

    def _call(self, kind: type[T], name: str, *args: Any, epoch: int | None = None) -> T:
        """What the child's context returns, which must be of that kind."""
        value = self._supervisor.call(self._callbacks, self._number, name, args, tap=self._tap, epoch=epoch)
        if not isinstance(value, kind):
            raise TypeError(f"{name} of the child returned {type(value).__name__}, not {kind.__name__}")
        return value


def remote_devices(workers: Sequence[str]) -> list[Device]:
    """The devices of this machine and of the workers, each started once. Raises BackendError."""
    supervisor = Supervisor(workers, CONNECT_SECONDS)
    try:
        found: list[Device] = supervisor.call(Callbacks(load()), "", "devices", settings={"start": True})
        return found
    finally:
        supervisor.close()
