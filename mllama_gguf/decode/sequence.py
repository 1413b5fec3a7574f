"""One conversation's part of a context that several share, with the face of a context of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress

from ..backend.base import Logits
from ..backend.types import Bytes, Floats, HParams, Memory, Tap
from ..errors import MllamaError, RequestError
from .exclusive import Exclusive, Stop
from .scheduler import Scheduler


class SequenceContext(Exclusive):
    """A sequence of a scheduler's context, as a `Context`. One thread at a time; other sequences
    compute meanwhile."""

    def __init__(self, scheduler: Scheduler, n_ctx: int, stop: Stop) -> None:
        """n_ctx: most tokens; stop: whether to stop what computes for this sequence. Raises BackendError."""
        super().__init__(scheduler, stop)
        self._scheduler = scheduler
        self.n_ctx = n_ctx
        with self._use() as context:
            self.hparams: HParams = context.hparams
            _ = context.n_past  # starts a lost process again
            self.epoch = context.epoch
            self._number = context.sequence_new(n_ctx)

    @property
    def n_past(self) -> int:
        """As `Context.n_past`. Starts a lost process again."""
        if self._scheduler.is_local:  # only this thread changes it
            return self._scheduler.context.sequence_n_past(self._number)
        with self._use() as context:
            _ = context.n_past
            if context.epoch != self.epoch:
                self.epoch = context.epoch
                self._number = context.sequence_new(self.n_ctx)
            return context.sequence_n_past(self._number)

    def memory(self) -> Memory:
        """Bytes that all sequences together use."""
        return self._scheduler.memory()

    def reserve(self, n_tiles: Sequence[int]) -> None:
        """As `Context.reserve`, for all sequences together."""
        with self._use() as context:
            context.reserve(n_tiles)

    def encode(self, pixels: Floats, aspect_ratio_id: int) -> Floats:
        """As `Context.encode`."""
        return self._scheduler.encode(pixels, aspect_ratio_id, self._stop)

    def decode(self, tokens: Sequence[int], slot: int, n_visible: int, logits: Logits = "last") -> Floats:
        """As `Context.decode`."""
        return self._scheduler.decode(self._number, tokens, slot, n_visible, logits, self._stop)

    def truncate(self, n_past: int) -> None:
        """As `Context.truncate`."""
        with self._use() as context:
            context.sequence_truncate(self._number, n_past)

    def prefix_kv_size(self, n_tokens: int) -> int:
        """As `Context.prefix_kv_size`."""
        with self._use() as context:
            return context.prefix_kv_size(n_tokens)

    def prefix_kv_get(self, n_tokens: int) -> Bytes:
        """As `Context.prefix_kv_get`."""
        with self._use() as context:
            return context.sequence_prefix_kv_get(self._number, n_tokens)

    def prefix_kv_set(self, n_tokens: int, data: Bytes) -> None:
        """As `Context.prefix_kv_set`."""
        with self._use() as context:
            context.sequence_prefix_kv_set(self._number, n_tokens, data)

    def clear(self) -> None:
        """Forget the tokens. The images are of all sequences, and stay."""
        self.truncate(0)

    def tap(self, callback: Tap) -> AbstractContextManager[None]:
        """Not possible."""
        raise RequestError("tensors of conversations that compute together cannot be shown; open one alone")

    def close(self) -> None:
        """Give the sequence back. Twice is fine."""
        number, self._number = self._number, 0
        if number:
            with suppress(MllamaError), self._scheduler.exclusive(bool) as context:
                if context.epoch == self.epoch:
                    context.sequence_free(number)
