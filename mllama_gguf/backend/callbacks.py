"""What C calls while it computes: progress and abort."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

from ..handles import is_ending
from .library import OK, Native

# "load", "encode" or "prompt", how much is done, and of how much
Progress: TypeAlias = Callable[[str, int, int], None]


class Callbacks:
    """What C calls while it works on behalf of one object: progress and abort.

    An exception in a callback, KeyboardInterrupt above all, cannot pass through C. It is kept, the
    computation is stopped, and `check` raises it once the C function has returned.
    """

    def __init__(
        self,
        native: Native,
        progress: Progress | None = None,
        abort: Callable[[], bool] | None = None,
    ) -> None:
        self._native = native
        self._progress = progress
        self._abort = abort
        self._pending: BaseException | None = None
        # C reports the progress of one run of the prompt; the caller gets that of the whole prompt.
        self.prompt_offset = 0
        self.prompt_total = 0  # 0: no progress for the prompt (single tokens of a reply)
        make = native.ffi.callback
        self.c_progress = make("mllama_progress_callback", self.on_progress, onerror=self.on_error)
        self.c_abort = make("mllama_abort_callback", self._in_c, error=True, onerror=self.on_error)

    def on_progress(self, phase: int, done: int, total: int, _: Any = None) -> None:
        """Progress as C tells it: mllama_phase, how much, of how much."""
        if self._progress is None or self._pending is not None:
            return
        if phase == 2:
            if not self.prompt_total:
                return
            done, total = done + self.prompt_offset, self.prompt_total
        self._progress(("load", "encode", "prompt")[phase], done, total)

    def on_abort(self, _: Any = None) -> bool:
        """Whether the computation is to stop."""
        # Running Python at all is what lets a pending Ctrl-C strike, here, inside the callback.
        return self._pending is not None or (self._abort is not None and bool(self._abort()))

    def _in_c(self, _: Any = None) -> bool:
        return is_ending() or self.on_abort()

    def on_error(self, _: type[BaseException], error: BaseException, __: TracebackType) -> None:
        """Remember an exception for `check`; the first one counts. In the form of cffi's onerror."""
        if self._pending is None:
            self._pending = error

    def check(self, status: int) -> None:
        """Raise the exception for the status of a C function that could call back. What a callback raised
        comes first, because it is the reason for the status."""
        error = self._native.error(status) if status != OK else None
        pending, self._pending = self._pending, None
        if pending is not None:
            raise pending
        if error is not None:
            raise error
