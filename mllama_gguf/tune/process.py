"""One measurement in a process of its own, so that its crash is a result and not the end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ..errors import MllamaError
from ..words import signal_name


class PointFailed(MllamaError):
    """The process crashed, ran out of memory or time, or its function raised; the words say which."""


def run_point(function: str, request: Mapping[str, Any], timeout: float) -> Any:
    """What a function, "module:name", returns when called with these arguments in a new process.

    Arguments and result go through JSON. timeout: seconds. Raises PointFailed; at Ctrl-C the process is ended
    too.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from mllama_gguf.tune.process import main; "
        f"main({function!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(json.dumps(request), timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise PointFailed(f"not done after {timeout:g} s") from None
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        raise PointFailed(f"killed by {signal_name(-process.returncode)}{_last_words(err)}")
    try:
        reply = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        raise PointFailed(f"ended with exit code {process.returncode}{_last_words(err)}") from None
    if "error" in reply:
        raise PointFailed(reply["error"])
    return reply["result"]


def _last_words(err: str) -> str:
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def main(function: str) -> None:
    """The new process."""
    module, _, name = function.partition(":")
    request = json.load(sys.stdin)
    try:
        reply = {"result": getattr(import_module(module), name)(**request)}
    except (MllamaError, MemoryError) as e:
        reply = {"error": str(e) or type(e).__name__}
    print(json.dumps(reply))
