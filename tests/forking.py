"""Many command lines of `mllama` in little time: a process that has imported everything, and forks for each.

A start of Python with numpy takes half a second, a fork some milliseconds. `forks(folder)` starts the
process and puts two programs into folder/bin: `mllama`, and `run-python FILE`. They have the arguments, the
folder, the environment and the three streams of their caller, and obey SIGINT and SIGTERM.
"""

from __future__ import annotations

import atexit
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

_CLIENT = """\
#!{python} -ISE
import json, os, signal, socket, sys

link = socket.socket(socket.AF_UNIX)
link.connect({path!r})
name = os.path.basename(sys.argv[0])
asked = json.dumps(dict(program=name, args=sys.argv[1:], folder=os.getcwd(), env=dict(os.environ))).encode()
socket.send_fds(link, [len(asked).to_bytes(4, "big")], [0, 1, 2])
link.sendall(asked)
pid = int.from_bytes(link.recv(4), "big")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = link.recv(1)
sys.exit(code[0] if code else "the process has crashed")
"""


@contextmanager
def forks(folder: Path) -> Iterator[Path]:
    """The folder with the programs, for PATH, while the process runs."""
    from helpers import python_path

    path, programs = folder / "socket", folder / "bin"
    programs.mkdir()
    for name in ("mllama", "run-python"):
        (programs / name).write_text(_CLIENT.format(python=sys.executable, path=str(path)), "utf-8")
        (programs / name).chmod(0o755)
    env = {**os.environ, "PYTHONPATH": python_path()}
    with subprocess.Popen(
        [sys.executable, __file__, str(path)], cwd=folder, env=env, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield programs
        finally:
            process.terminate()


def _serve(path: str) -> None:
    _import_all()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
        os.write(1, b"ready\n")
        while True:
            link, _ = listener.accept()
            if os.fork() == 0:
                break
            link.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 1
    try:
        code = _run(_begin(link))
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        link.sendall(bytes([code]))
        os._exit(code)


def _import_all() -> None:
    """Everything that a command may import, but the native library: the environment may name another."""
    import mllama_gguf

    for module in pkgutil.walk_packages(mllama_gguf.__path__, "mllama_gguf."):
        if not module.name.endswith(("__main__", ".ray")):
            import_module(module.name)
    for name in ("uvicorn.protocols.http.h11_impl", "uvicorn.lifespan.on", "PIL.JpegImagePlugin", "psutil"):
        import_module(name)


def _begin(link: socket.socket) -> dict[str, Any]:
    """What is asked, in the caller's folder, environment and streams."""
    size, descriptors, _, _ = socket.recv_fds(link, 4, 3)
    words = b""
    while len(words) < int.from_bytes(size, "big"):
        words += link.recv(65536)
    asked: dict[str, Any] = json.loads(words)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["folder"])
    link.sendall(os.getpid().to_bytes(4, "big"))
    return asked


def _run(asked: dict[str, Any]) -> int:
    try:
        if asked["program"] == "mllama":
            from mllama_gguf.__main__ import main

            sys.argv = ["mllama", *asked["args"]]
            main()
        else:
            runpy.run_path(asked["args"][0], run_name="__main__")
    except SystemExit as e:
        return int(e.code or 0)
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
