"""How many CPUs and threads there are to compute with."""

from __future__ import annotations

import os
from typing import SupportsIndex

from .errors import RequestError
from .words import brief

MAX_THREADS = 512  # as many as ggml takes: GGML_MAX_N_THREADS
# ggml's threads wait for each other by spinning, after every operation. With less work than this for each,
# that costs more than it saves; beside another busy process, a hundred times more.
WEIGHTS_PER_THREAD = 32 * 1024 * 1024  # bytes


def usable_cpus() -> int:
    """How many CPUs this process may use, of those that ggml can use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


def check_threads(number: object, name: str = "n_threads") -> None:
    """Raise RequestError unless so many threads can compute."""
    if (
        isinstance(number, bool)
        or not isinstance(number, SupportsIndex)
        or not 1 <= int(number) <= MAX_THREADS
    ):
        raise RequestError(f"{name} must be a whole number from 1 to {MAX_THREADS}, not {brief(number)}")


def default_threads(n_bytes: int) -> int:
    """CPU threads for a model with weights of so many bytes."""
    return min(usable_cpus(), 1 + n_bytes // WEIGHTS_PER_THREAD)
