"""What crashes, for the tests of tuning, comparing and benchmarks; each runs in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from mllama_gguf.tune import compare
from mllama_gguf.tune import search as tune


def measure(**request: Any) -> dict[str, Any]:
    """Two layers end the process, four hang; every call leaves a line in calls.txt beside the image."""
    layers = request["settings"]["n_gpu_layers"]
    with (Path(request["image"]).parent / "calls.txt").open("a") as file:
        file.write(f"{layers}\n")
    if layers == 2:
        os.abort()
    if layers == 4:
        time.sleep(60)
    request["settings"]["n_gpu_layers"] = 0  # there need not be a device
    return tune.measure_caption(**request)


def compute(**request: Any) -> dict[str, Any]:
    """One layer more ends the process, two change the first vision value and the caption."""
    layers = request["settings"].pop("n_gpu_layers")
    if layers == 1:
        os.abort()
    answer = compare.compute(**request)
    if layers == 2:
        answer["vision"][0] += 1.0
        answer["caption"] += "!"
    return answer


class Rival:
    """Another program of a benchmark, in a process of its own; see scripts/contestant.py."""

    def __init__(self, dies: str) -> None:
        """dies: when and how, or ""."""
        self._dies = dies
        if dies == "at once":
            os.kill(os.getpid(), signal.SIGILL)
        if dies == "in words":
            raise ValueError("no such model")

    def add(self, a: int, b: int) -> int:
        if self._dies == "later":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._dies == "by exit":
            os._exit(3)
        return a + b


def add(rival: Rival, a: int, b: int) -> tuple[int, int]:
    """The sum, and the process that made it."""
    return rival.add(a, b), os.getpid()
