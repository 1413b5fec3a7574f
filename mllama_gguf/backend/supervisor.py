"""A child process that computes, started again after a loss.

ggml ends the process when an RPC worker vanishes or answers badly, and so does its CUDA code when a device
fails. Here that process is a child, and its end is one BackendError; the next call starts another.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..errors import BackendError, BusyError, MllamaError
from ..handles import OneProcess, finalize
from ..waiting import acquire
from .callbacks import Callbacks
from .process import Process, ProcessLost, Target
from .rpc import probe
from .types import Tap

LOST = "the caches were lost with the process that had them; begin again"
CONNECT_SECONDS = 30.0  # for a worker to answer its first message


class Supervisor(OneProcess):
    """Opens a model and contexts in a child process, and again in a new one after a loss. Safe from several
    threads: the child computes one call at a time, the others wait.

    epoch: counts the processes; another number means that all caches are gone
    """

    def __init__(self, workers: Sequence[str], rpc_timeout: float) -> None:
        """workers: "host:port" of each; rpc_timeout: seconds without a sign of life that are too many."""
        self.epoch = 0
        self._workers = tuple(workers)
        # Without workers nothing can hang: a computation may take as long as it takes.
        self._timeout = rpc_timeout if workers else None
        self._model: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._contexts: dict[int, dict[str, Any]] = {}  # the settings of those that are open, by number
        self._unused: deque[int] = deque()  # numbers of contexts that nobody uses any more
        self._n_contexts = 0  # so far
        self._process: Process | None = None
        self._kill: Callable[[], Any] = bool  # ends it
        self._closed = False
        self._lock = threading.Lock()  # of all this
        self._owner = 0  # the thread that has the lock

    def open_model(self, callbacks: Callbacks, *args: Any, **settings: Any) -> Any:
        """As `local.open_model`; its facts, see `Child.open_model`. Once only."""
        self._model = args, settings
        try:
            return self.call(callbacks, "", "facts")
        except BaseException:
            self.close()
            raise

    def open_context(self, callbacks: Callbacks, **settings: Any) -> tuple[int, int]:
        """As `Model.open_context`: the context's number, to be called by, and its n_ctx."""
        with self._alone(callbacks):
            self._n_contexts += 1
            number = self._n_contexts
            self._contexts[number] = settings
        try:
            return number, self.call(callbacks, number, "n_ctx")
        except BaseException:
            self.close_context(number)
            raise

    def close_context(self, number: int) -> None:
        """Let the child free a context, now or before its next call."""
        if self.is_inherited:
            return
        self._unused.append(number)
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._owner = threading.get_ident()
            # If the child is lost, the context is too; the next call says so.
            with suppress(MllamaError):
                self._close_unused()
        finally:
            self._owner = 0
            self._lock.release()

    def call(
        self,
        callbacks: Callbacks,
        target: Target,
        name: str,
        args: tuple[Any, ...] = (),
        settings: dict[str, Any] | None = None,
        tap: Tap | None = None,
        epoch: int | None = None,
    ) -> Any:
        """What the child's object `target` ("model", the number of a context, "": the child itself) returns.

        callbacks: those of the caller
        epoch:     that the arguments are of; None: of any

        Raises what it raises, BackendError when the child dies, Aborted, and what the callbacks raise.
        """
        with self._alone(callbacks):
            process = self._start(callbacks)
            if epoch is not None and epoch != self.epoch:
                raise BackendError(LOST)
            self._close_unused()
            if isinstance(target, int) and target not in process.contexts:
                self._open_context(process, callbacks, target)
            return self._ask(process, callbacks, target, name, args, settings or {}, tap)

    def close(self) -> None:
        """End the child; twice is fine."""
        self._closed = True
        self._end()

    @contextmanager
    def _alone(self, callbacks: Callbacks) -> Iterator[None]:
        """The only thread that talks with the child."""
        self.check_process()
        if self._owner == threading.get_ident():
            raise BusyError("this model is computing; its callbacks cannot use it")
        acquire(self._lock, callbacks.on_abort, "the computation was stopped before it began")
        try:
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = 0
            self._lock.release()

    def _start(self, callbacks: Callbacks) -> Process:
        """The process, with the model."""
        if self._closed:
            raise MllamaError("this model is closed")
        if self._process is not None:
            return self._process
        self.epoch += 1
        process = self._process = Process()
        self._kill = finalize(self, process.kill)
        try:
            if self._closed:  # by another thread, meanwhile
                raise MllamaError("this model is closed")
            level = logging.getLogger("mllama_gguf").getEffectiveLevel()
            self._ask(process, callbacks, "", "start", (self._workers, level), {})
            if self._model is not None:
                self._ask(process, callbacks, "", "open_model", *self._model)
        except BaseException:
            self._end()
            raise
        return process

    def _open_context(self, process: Process, callbacks: Callbacks, number: int) -> None:
        if number not in self._contexts:
            raise MllamaError("this model is closed")
        try:
            self._ask(process, callbacks, "", "open_context", (number,), self._contexts[number])
        except BaseException:
            if process.alive:
                with suppress(MllamaError):
                    self._ask(process, None, "", "close_context", (number,), {})
            raise
        process.contexts.add(number)

    def _close_unused(self) -> None:
        while self._unused:
            number = self._unused.popleft()
            self._contexts.pop(number, None)
            process = self._process
            if process is not None and number in process.contexts:
                process.contexts.remove(number)
                self._ask(process, None, "", "close_context", (number,), {})

    def _ask(
        self,
        process: Process,
        callbacks: Callbacks | None,
        target: Target,
        name: str,
        args: tuple[Any, ...],
        settings: dict[str, Any],
        tap: Tap | None = None,
    ) -> Any:
        timeout = self._timeout
        if timeout is not None and name == "start":
            timeout = min(timeout, CONNECT_SECONDS)
        try:
            return process.ask((target, name, args, settings), callbacks, tap, timeout)
        except ProcessLost as e:
            self._end()
            if self._closed:
                raise MllamaError("this model is closed") from None
            self._raise_lost(str(e))
        except BaseException:
            if not process.alive:
                self._end()
            raise

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and not self.is_inherited:
            self._kill()  # and the finalizer lets go of the process

    def _raise_lost(self, words: str) -> NoReturn:
        """Name the worker. ggml's words do not always, so those that they do not name are asked."""
        named = [worker for worker in self._workers if worker in words]
        found = {worker: probe(worker) for worker in named or self._workers}
        # All of them if each is well by now.
        guilty = {worker: state for worker, state in found.items() if state} or found
        where = ", ".join(f"{worker} ({state})" if state else worker for worker, state in guilty.items())
        if where:
            words = f"worker{'s' if len(guilty) > 1 else ''} {where}: {words}"
        raise BackendError(f"{words}; the next call starts a new process") from None
