"""Real workers on loopback. Without RPC in llama-cpp-python these tests fail, on purpose."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from helpers import elsewhere


class Worker:
    """`mllama worker` as a process, on a free port of its own for life."""

    def __init__(self, *command: str) -> None:
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            self.port: int = trial.getsockname()[1]
        self.name = f"127.0.0.1:{self.port}"
        self._command = command
        self.start()

    def start(self) -> None:
        """Start it, again if it is dead, and wait until it listens."""
        command = self._command or ("-m", "mllama_gguf", "worker", "-t", "1", "--port")
        # No pipes: nobody reads them.
        self.process = subprocess.Popen(
            [sys.executable, *command, str(self.port)], stdout=subprocess.DEVNULL, **elsewhere()
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, "the worker ended at once"
                assert time.monotonic() < deadline, "the worker does not listen"
                time.sleep(0.02)

    def kill(self) -> None:
        """As a machine that loses power."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """As a machine that hangs."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def workers() -> Iterator[tuple[str, str]]:
    """Two workers that nobody kills, as host:port."""
    pair = Worker(), Worker()
    yield pair[0].name, pair[1].name
    for worker in pair:
        worker.kill()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    """Workers to do harm to."""
    made: list[Worker] = []

    def make(*command: str) -> Worker:
        made.append(Worker(*command))
        return made[-1]

    yield make
    for worker in made:
        worker.kill()
