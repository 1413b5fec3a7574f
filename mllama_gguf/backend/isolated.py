"""A model and its context in a process of their own, behind the same methods as `runtime` has.

ggml ends the process when an RPC worker vanishes or answers badly, and so does its CUDA code when a device
fails. Here that process is a child (`_engine`), and its end is one BackendError; the next call starts
another.

The two talk in pickles over a socket pair, which is safe between a parent and its own child.
To the child: ("call", target, name, args, kwargs, tapped), ("abort",), ("tap", wanted).
From the child: ("done", value), ("error", exception), ("progress", phase, done, total), ("tap", name, values
or None), ("log", logger, level, words), ("alive",), ("dying", words).
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ..errors import Aborted, BackendError, MllamaError, RequestError
from ..handles import OneProcess, finalize
from .callbacks import Callbacks
from .library import load
from .local import NativeContext, NativeModel
from .types import Device, HParams, Memory, Tap

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

POLL_SECONDS = 0.05  # between two looks at the caller's abort callback
GRACE_SECONDS = 1.0  # for the child to obey an abort, before it is killed
CONNECT_SECONDS = 30.0  # for a worker to answer its first message
PROBE_SECONDS = 2.0
MAX_WORKERS = 16


class EngineLost(Exception):
    """The child is gone, or was killed; the words say why. Never leaves this module."""


def parse_workers(servers: str | Sequence[str]) -> tuple[str, ...]:
    """["host:port", ...], or that with commas in between, checked. Raises RequestError."""
    listed = servers.split(",") if isinstance(servers, str) else list(servers)
    workers = tuple(server.strip() for server in listed)
    for worker in workers:
        match = re.fullmatch(r"[^\s:]+:(\d{1,5})", worker)
        if not match or not 1 <= int(match[1]) <= 65535:
            raise RequestError(f"rpc_servers: {worker!r} is not host:port, as in 127.0.0.1:50052")
    if len(set(workers)) < len(workers):
        raise RequestError("rpc_servers: a worker is named twice")
    if len(workers) > MAX_WORKERS:
        raise RequestError(f"rpc_servers: {len(workers)} workers; at most {MAX_WORKERS} are possible")
    return workers


class Engine(OneProcess):
    """Opens a model and a context in a child process, and again in a new one after a loss.

    epoch: counts the processes; another number means that all caches are gone
    """

    def __init__(self, workers: Sequence[str], rpc_timeout: float, callbacks: Callbacks) -> None:
        """workers: "host:port" of each; rpc_timeout: seconds without a sign of life that are too many."""
        if isinstance(rpc_timeout, bool) or not 0 < rpc_timeout < math.inf:
            raise RequestError(f"rpc_timeout must be seconds above 0, not {rpc_timeout!r}")
        self.epoch = 0
        self._workers = tuple(workers)
        # Without workers nothing can hang: a computation may take as long as it takes.
        self._timeout = rpc_timeout if workers else None
        self._callbacks = callbacks
        self._openings: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._process: _Process | None = None
        self._closed = False

    def open_model(self, *args: Any, **settings: Any) -> NativeModel:
        """As `runtime.open_model`, without callbacks."""
        self._openings.append(("open_model", args, settings))
        self._running()
        return cast(NativeModel, IsolatedModel(self))

    def open_context(self, **settings: Any) -> NativeContext:
        """As `NativeContext`, without model and callbacks."""
        self._openings.append(("open_context", (), settings))
        try:
            self.call("", *self._openings[-1])
        except BaseException:
            self._end()
            raise
        return cast(NativeContext, IsolatedContext(self))

    def devices(self) -> list[Device]:
        """All devices of the child, those of the workers too."""
        return cast("list[Device]", self.call("", "devices"))

    def measure(self, *args: Any, **settings: Any) -> tuple[Memory, HParams]:
        """As `measure.measure`, without callbacks."""
        return cast("tuple[Memory, HParams]", self.call("", "measure", args, settings))

    def call(
        self,
        target: str,
        name: str,
        args: tuple[Any, ...] = (),
        settings: dict[str, Any] | None = None,
        tap: Tap | None = None,
    ) -> Any:
        """What the child's object `target` ("model", "context", "": the child itself) returns.

        Raises what it raises, BackendError when it dies, Aborted, and what the callbacks raise.
        """
        process = self._running()
        return self._ask(process, target, name, args, settings or {}, tap)

    def close(self) -> None:
        """End the child; twice is fine."""
        self._closed = True
        self._end()

    def _running(self) -> _Process:
        self.check_process()
        if self._closed:
            raise MllamaError("this engine is closed")
        if self._process is not None:
            return self._process
        self.epoch += 1
        process = self._process = _Process()
        finalize(self, process.kill)
        try:
            level = logging.getLogger("mllama_gguf").getEffectiveLevel()
            self._ask(process, "", "start", (self._workers, level), {})
            for name, args, settings in self._openings:
                self._ask(process, "", name, args, settings)
        except BaseException:
            self._end()
            raise
        return process

    def _ask(
        self,
        process: _Process,
        target: str,
        name: str,
        args: tuple[Any, ...],
        settings: dict[str, Any],
        tap: Tap | None = None,
    ) -> Any:
        timeout = self._timeout
        if timeout is not None and name == "start":
            timeout = min(timeout, CONNECT_SECONDS)
        try:
            return process.ask((target, name, args, settings), self._callbacks, tap, timeout)
        except EngineLost as e:
            self._end()
            self._blame(str(e))
        except BaseException:
            if not process.alive:
                self._end()
            raise

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and not self.is_inherited:
            process.kill()

    def _blame(self, words: str) -> NoReturn:
        """Name the worker. ggml's words do not always, so those that they do not name are asked."""
        named = [worker for worker in self._workers if worker in words]
        found = {worker: probe(worker) for worker in named or self._workers}
        # All of them if each is well by now.
        guilty = {worker: state for worker, state in found.items() if state} or found
        where = ", ".join(f"{worker} ({state})" if state else worker for worker, state in guilty.items())
        if where:
            words = f"worker{'s' if len(guilty) > 1 else ''} {where}: {words}"
        raise BackendError(f"{words}; the next call starts anew") from None


class IsolatedModel(OneProcess):
    """`NativeModel` of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.hparams = engine.call("model", "hparams")

    def close(self) -> None:
        """Free it, and all that belongs to it."""
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        return _forward(self._engine, "model", NativeModel, name)


class IsolatedContext(OneProcess):
    """`NativeContext` of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tap: Tap | None = None
        self.hparams = engine.call("context", "hparams")

    @property
    def epoch(self) -> int:
        """As in `Engine`."""
        return self._engine.epoch

    def close(self) -> None:
        """Free it, and the model."""
        self._engine.close()

    @contextmanager
    def tap(self, callback: Tap) -> Iterator[None]:
        """As `NativeContext.tap`."""
        self._tap = callback
        try:
            yield
        finally:
            self._tap = None

    def __getattr__(self, name: str) -> Any:
        return _forward(self._engine, "context", NativeContext, name, self.__dict__.get("_tap"))


def _forward(engine: Engine, target: str, kind: type, name: str, tap: Tap | None = None) -> Any:
    """A property's value, or a function that calls the method, of the child's object."""
    member = getattr(kind, name)  # AttributeError is the right answer
    if isinstance(member, property):
        return engine.call(target, name)
    return lambda *args, **settings: engine.call(target, name, args, settings, tap)


class _Process:
    """One child. Its end of the socket pair is its only tie to life: it ends when ours is closed."""

    def __init__(self) -> None:
        from multiprocessing.connection import Connection

        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from mllama_gguf.backend.child import main; "
                f"main({fd}, {os.getpid()})"
            )
            self._child = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us, who pass it on
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._dying = ""
        # Only the thread reads, so that a Ctrl-C cannot leave half a message behind.
        threading.Thread(target=_receive, args=(self._connection, self._inbox), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._child.poll() is None

    def kill(self) -> None:
        """End it at once. Its connections close with it, and the workers free what it had there."""
        self._child.kill()
        self._child.wait()
        # shutdown, not close: the thread may be reading.
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def ask(
        self, request: tuple[Any, ...], callbacks: Callbacks, tap: Tap | None, timeout: float | None
    ) -> Any:
        """One call of the child: see `Engine.call`. Raises EngineLost."""
        try:
            self._send(("call", *request, tap is not None))
            reply = self._listen(callbacks, tap, timeout)
        except EngineLost:
            raise
        except BaseException:  # Ctrl-C, or a callback's own error
            reply = self._stop()
            if reply and reply[0] == "done" and request[1] in ("image_fill", "image_map"):
                # Nobody will hear of the slot.
                self._send(("call", "context", "image_free", (reply[1],), {}, False))
                self._stop()
            raise
        if reply is None:
            raise Aborted("the computation was stopped, and its engine ended: a worker did not stop in time")
        if reply[0] == "error":
            raise reply[1]
        return reply[1]

    def _listen(self, callbacks: Callbacks, tap: Tap | None, timeout: float | None) -> tuple[Any, ...] | None:
        """The reply; None when the caller aborted and the child had to be killed for it."""
        heard = looked = time.monotonic()
        while True:
            with suppress(queue.Empty):
                message = self._inbox.get(timeout=POLL_SECONDS)
                heard = time.monotonic()
                match message:
                    case ("done", _) | ("error", _):
                        return message
                    case ("progress", phase, done, total):
                        callbacks.on_progress(phase, done, total)
                    case ("tap", name, values):
                        wanted = bool(tap and tap(name, values))
                        if values is None:
                            self._send(("tap", wanted))
                    case _:
                        self._note(message)
            now = time.monotonic()
            if now - looked >= POLL_SECONDS:
                looked = now
                if callbacks.on_abort():
                    return self._stop()
            if timeout is not None and now - heard > timeout:
                self.kill()
                raise EngineLost(
                    f"no sign of life for {timeout:g} s (a worker serves one client at a time; "
                    "rpc_timeout allows more)"
                )

    def _stop(self) -> tuple[Any, ...] | None:
        """Tell the child to stop; its reply. It is killed, and None returned, if it does not obey."""
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            self._send(("abort",))
            while (left := deadline - time.monotonic()) > 0:
                message = self._inbox.get(timeout=left)
                if message[0] in ("done", "error"):
                    return message
                if message[0] == "tap" and message[2] is None:
                    self._send(("tap", False))
                self._note(message)
        except (queue.Empty, EngineLost):
            pass
        self.kill()
        return None

    def _note(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("log", name, level, words):
                logging.getLogger(name).log(level, "%s", words)
            case ("dying", words):
                self._dying = words
            case ("end",):
                self.kill()
                code = self._child.returncode
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise EngineLost(self._dying or f"the engine's process ended with {how}")

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._connection.send(message)
        except OSError:  # it is dead: its last words are in the inbox
            while True:
                try:
                    self._note(self._inbox.get(timeout=GRACE_SECONDS))
                except queue.Empty:
                    raise EngineLost("the engine's process does not listen") from None
        except BaseException:
            self.kill()  # half a message may be on its way
            raise


def _receive(connection: Connection[Any, Any], inbox: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    """Move messages to the inbox until the child is gone."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(("end",))


HELLO = 14  # RPC_CMD_HELLO; its number and the first bytes of the answer are the same in all versions
CAPS_BYTES = 24


def probe(worker: str) -> str:
    """What is wrong with a worker, in a few words; "" if it answers."""
    host, _, port = worker.rpartition(":")
    request = bytes([HELLO]) + CAPS_BYTES.to_bytes(8, "little") + bytes(CAPS_BYTES)
    try:
        with socket.create_connection((host, int(port)), PROBE_SECONDS) as connection:
            connection.settimeout(PROBE_SECONDS)
            connection.sendall(request)
            return "" if connection.recv(1) else "hangs up"
    except TimeoutError:
        return "does not answer"
    except ConnectionRefusedError:
        return "refuses the connection"
    except OSError as e:
        return e.strerror or str(e)


def remote_devices(workers: Sequence[str]) -> list[Device]:
    """The devices of this machine and of the workers. Raises BackendError."""
    engine = Engine(workers, CONNECT_SECONDS, Callbacks(load()))
    try:
        return engine.devices()
    finally:
        engine.close()
