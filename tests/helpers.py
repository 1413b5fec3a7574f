"""What several tests need."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiny

import mllama_gguf

# Most seconds between a wish to stop and the end. On a quiet machine it is a fraction of a second; what is
# stopped would go on for longer than this.
STOP_SECONDS = 8.0


@dataclass(frozen=True)
class TinyFiles:
    """One architecture of tests/tiny.py as GGUF, F32."""

    arch: tiny.Arch
    text: Path
    mmproj: Path
    one: Path


def noisy_image(seed: int, height: int = 40, width: int = 40) -> npt.NDArray[np.uint8]:
    """A noisy image, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@contextmanager
def without_rights() -> Iterator[None]:
    """In the block, a folder of mode 0 is closed to this thread, also as root: without the capabilities
    CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # the first one: effective
    assert libc.capget(head, sets) == 0
    was = sets[0]
    sets[0] &= ~0b110
    assert libc.capset(head, sets) == 0
    try:
        yield
    finally:
        sets[0] = was
        assert libc.capset(head, sets) == 0


def python_path() -> str:
    """PYTHONPATH for another Python: the package that this one uses, then its own, whose folders may hold
    what the package needs. A relative name is one of this folder."""
    folders = [Path(mllama_gguf.__file__).parents[1]]
    folders += [Path(one).absolute() for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    return os.pathsep.join(dict.fromkeys(map(str, folders)))


def elsewhere(**env: str) -> dict[str, Any]:
    """How to start another Python: outside the source tree, with the package that this one uses."""
    return {"cwd": tempfile.gettempdir(), "env": {**os.environ, "PYTHONPATH": python_path(), **env}}


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of a server that says the same to everybody, whatever they ask."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client, suppress(OSError):
                    client.recv(10_000)
                    client.sendall(answer)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1024):  # closed with unread bytes, the answer would be lost
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def wait_until_open(process: subprocess.Popen[Any], path: Path | str) -> None:
    """Wait until a process has a file mapped into its memory, as a model is. How long its start takes depends
    on the machine and on what else runs there."""
    maps, name = Path(f"/proc/{process.pid}/maps"), f"{Path(path).resolve()}\n"
    if not maps.exists():
        time.sleep(2.5)  # macOS does not tell
        return
    while name not in maps.read_text("utf-8", "replace"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
