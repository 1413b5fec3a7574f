"""The child process of `supervisor`: takes calls from its parent, and is gone as soon as the parent is."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

from . import library, local
from .callbacks import Callbacks
from .context import LocalContext
from .local import LocalModel
from .measure import measure
from .process import Target
from .types import Device, Floats, HParams, Memory, ModelFacts

ALIVE_SECONDS = 1.0  # between two signs of life while the CPU computes
PARENT_SECONDS = 1.0  # between two looks whether the parent lives


class Child:
    """The parent's objects, and the talk with it."""

    def __init__(self, connection: Connection[Any, Any], parent: int) -> None:
        self._connection = connection
        self._parent = parent
        self._sending = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._tap_answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._aborted = False
        self._last_error = ""  # that was logged
        self._callbacks: Forward
        self._objects: dict[Target, Any] = {"": self}

    def serve(self) -> None:
        """Never returns."""
        threading.Thread(target=self._receive, daemon=True).start()
        while True:
            target, name, args, settings, tapped = self._calls.get()
            try:
                with self._objects[target].tap(self._tap) if tapped else nullcontext():
                    member = getattr(self._objects[target], name)
                    value = member(*args, **settings) if callable(member) else member
                    if isinstance(value, Iterator):
                        value = list(value)
                self.send("done", value)
            except Exception as e:
                self.send("error", e if _can_be_sent(e) else RuntimeError(f"{type(e).__name__}: {e}"))

    def _receive(self) -> None:
        try:
            while True:
                # The parent's end may live on in a process that it forked.
                while not self._connection.poll(PARENT_SECONDS):
                    if os.getppid() != self._parent:
                        os._exit(1)
                kind, *rest = self._connection.recv()
                if kind == "call":
                    self._aborted = False
                    self._calls.put(tuple(rest))
                elif kind == "tap":
                    self._tap_answers.put(rest[0])
                else:
                    self._aborted = True
        except (EOFError, OSError):
            pass
        except BaseException as e:  # a request that cannot be read here: of a class of the caller's own
            self.send("dying", f"the child process cannot read a request: {type(e).__name__}: {e}")
        finally:
            os._exit(1)  # without this thread nothing looks whether the parent lives

    def send(self, *message: Any) -> None:
        """From any thread."""
        with self._sending:
            self._connection.send(message)

    def aborted(self) -> bool:
        """Whether the parent wants the running call to stop."""
        return self._aborted

    def _tap(self, name: str, values: Floats | None) -> bool:
        self.send("tap", name, values)
        return values is None and self._tap_answers.get()

    # ---- what the parent calls -----------------------------------------------------------------------------

    def start(self, workers: Sequence[str], log_level: int) -> None:
        """Load the library and add the workers' devices."""
        log = logging.getLogger("mllama_gguf")
        log.addHandler(_Forwarded(self))
        log.setLevel(min(log_level, logging.ERROR))
        log.propagate = False
        native = library.load()
        self._callbacks = Forward(native, self)

        @native.ffi.callback("mllama_fatal_callback")  # type: ignore[untyped-decorator]
        def on_fatal(words: Any) -> None:
            self._die(native.text(words))

        self._on_fatal = on_fatal
        native.lib.mllama_fatal_set(on_fatal)
        for worker in workers:
            native.check(native.lib.mllama_rpc_add(worker.encode()))

    def _die(self, words: str) -> None:
        """Pass on ggml's last words, without the place in its source, and what it logged before."""
        words = words.split(": ", 1)[-1].strip()
        self.send("dying", f"{words} ({self._last_error})" if self._last_error else words)
        os._exit(1)

    def note_error(self, words: str) -> None:
        """Keep what was logged as an error."""
        self._last_error = words

    def devices(self, **settings: Any) -> list[Device]:
        """As `local.devices`."""
        return local.devices(**settings)

    def measure(self, *args: Any, **settings: Any) -> tuple[Memory, HParams]:
        """As `measure.measure`."""
        return measure(*args, callbacks=self._callbacks, **settings)

    def open_model(self, *args: Any, **settings: Any) -> None:
        """As `local.open_model`."""
        self._objects["model"] = local.open_model(*args, callbacks=self._callbacks, **settings)

    def facts(self) -> ModelFacts:
        """The facts about the model."""
        model: LocalModel = self._objects["model"]
        return ModelFacts(model.hparams, model.layout, model.repairs, model.size)

    def open_context(self, number: int, **settings: Any) -> None:
        """As `LocalModel.open_context`. number: what the parent calls it by."""
        model: LocalModel = self._objects["model"]
        self._objects[number] = model.open_context(self._callbacks, **settings)

    def close_context(self, number: int) -> None:
        """Free a context, if there is one of that number."""
        context: LocalContext | None = self._objects.pop(number, None)
        if context is not None:
            context.close()


class Forward(Callbacks):
    """Progress to the parent, abort from it."""

    def __init__(self, native: library.Native, child: Child) -> None:
        super().__init__(native)
        self._child = child
        self._spoke = 0.0

    def on_progress(self, phase: int, done: int, total: int, _: Any = None) -> None:
        self._child.send("progress", phase, done, total)

    def on_abort(self, _: Any = None) -> bool:
        if time.monotonic() - self._spoke > ALIVE_SECONDS:
            self._spoke = time.monotonic()
            self._child.send("alive")
        return self._child.aborted()


class _Forwarded(logging.Handler):
    """Log records to the parent."""

    def __init__(self, child: Child) -> None:
        super().__init__()
        self._child = child

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._child.note_error(record.getMessage())
        self._child.send("log", record.name, record.levelno, record.getMessage())


def _can_be_sent(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def main(fd: int, parent: int) -> None:
    """Serve the parent, process `parent`, over the socket `fd`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    Child(Connection(fd), parent).serve()
