"""Points that crash, for the tests of tuning and comparing; each runs in a process of its own."""

from __future__ import annotations

import os
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
