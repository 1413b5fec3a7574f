"""One child process that computes (`child`), seen from its parent.

The two talk in pickles over a socket pair, which is safe between a parent and its own child.
To the child: ("call", target, name, args, kwargs, tapped), ("abort",), ("tap", wanted). The target is ""
for the child itself, "model", or the number of a context. From the child: ("done", value), ("error",
exception), ("progress", phase, done, total), ("tap", name, values or None), ("log", logger, level, words),
("alive",), ("dying", words).
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import Aborted
from ..waiting import POLL_SECONDS
from ..words import signal_name
from .base import RELEASES
from .callbacks import Callbacks
from .types import Tap

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

GRACE_SECONDS = 1.0  # for the child to obey an abort, before it is killed

Target: TypeAlias = "str | int"


class ProcessLost(Exception):
    """The child is gone, or was killed; the words say why. Never leaves the backend."""


class Process:
    """One child. Its end of the socket pair is its only tie to life: it ends when ours is closed.

    contexts: the numbers of those that were opened in it
    """

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
        self.contexts: set[int] = set()
        # Only the thread reads, so that a Ctrl-C cannot leave half a message behind.
        threading.Thread(target=_receive, args=(self._connection, self._inbox), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._child.poll() is None

    def kill(self) -> None:
        """End it immediately. Its connections close with it, and the workers free what it had there."""
        self._child.kill()
        self._child.wait()
        # shutdown, not close: the thread may be reading.
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def ask(
        self, request: tuple[Any, ...], callbacks: Callbacks | None, tap: Tap | None, timeout: float | None
    ) -> Any:
        """One call of the child: see `Supervisor.call`.

        request: target, name, args and kwargs
        callbacks: those of the caller; None: nothing is reported, and nothing stops the call
        timeout: seconds without a sign of life that are too many; None: any silence is fine

        Raises ProcessLost.
        """
        try:
            self._send(("call", *request, tap is not None))
            reply = self._listen(callbacks, tap, timeout)
        except ProcessLost:
            raise
        except BaseException:  # Ctrl-C, or a callback's own error
            reply = self._stop()
            target, name, *_ = request
            if reply and reply[0] == "done" and name in RELEASES:
                # Nobody will get the handle.
                self._send(("call", target, RELEASES[name], (reply[1],), {}, False))
                self._stop()
            raise
        if reply is None:
            raise Aborted("the computation was stopped; its child process was ended: a worker did not stop")
        if reply[0] == "error":
            raise reply[1]
        return reply[1]

    def _listen(
        self, callbacks: Callbacks | None, tap: Tap | None, timeout: float | None
    ) -> tuple[Any, ...] | None:
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
                        if callbacks is not None:
                            callbacks.on_progress(phase, done, total)
                    case ("tap", name, values):
                        wanted = False
                        try:
                            wanted = bool(tap and tap(name, values))
                        finally:
                            if values is None:  # the child waits for the answer
                                self._send(("tap", wanted))
                    case _:
                        self._note(message)
            now = time.monotonic()
            if now - looked >= POLL_SECONDS:
                looked = now
                if callbacks is not None and callbacks.on_abort():
                    return self._stop()
            if timeout is not None and now - heard > timeout:
                self.kill()
                raise ProcessLost(
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
        except (queue.Empty, ProcessLost):
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
                how = signal_name(-code) if code < 0 else f"exit code {code}"
                raise ProcessLost(self._dying or f"the child process ended with {how}")

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._connection.send(message)
        except OSError:  # it is dead: its last words are in the inbox
            while True:
                try:
                    self._note(self._inbox.get(timeout=GRACE_SECONDS))
                except queue.Empty:
                    raise ProcessLost("the child process does not answer") from None
        except BaseException:
            self.kill()  # half a message may be on its way
            raise


def _receive(connection: Connection[Any, Any], inbox: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    """Move messages to the inbox until the child is gone."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(("end",))
