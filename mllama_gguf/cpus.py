"""How many CPUs and threads there are to compute with."""

from __future__ import annotations

import os
from typing import SupportsIndex

from .errors import RequestError
from .reading import read_text
from .words import brief, one_line

MAX_THREADS = 512  # as many as ggml takes: GGML_MAX_N_THREADS
# ggml's threads wait for each other by spinning, after every operation. With less work than this for each,
# that costs more than it saves; beside another busy process, a hundred times more.
WEIGHTS_PER_THREAD = 32 * 1024 * 1024  # bytes


def usable_cpus() -> int:
    """How many CPUs this process may use, of those that ggml can use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


def processor_name() -> str:
    """The processor as the system calls it."""
    import platform  # not for every start of the command line

    try:
        lines = read_text("/proc/cpuinfo").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    named = (line.split(":", 1)[1] for line in lines if line.startswith("model name"))
    return one_line(next(named, platform.processor() or platform.machine()))


def check_threads(number: object, name: str = "n_threads") -> None:
    """Raise RequestError for a number of threads that cannot compute."""
    if (
        isinstance(number, bool)
        or not isinstance(number, SupportsIndex)
        or not 1 <= int(number) <= MAX_THREADS
    ):
        raise RequestError(f"{name} must be a whole number from 1 to {MAX_THREADS}, not {brief(number)}")


def default_threads(n_bytes: int) -> int:
    """CPU threads for a model with weights of n_bytes bytes."""
    return min(usable_cpus(), 1 + n_bytes // WEIGHTS_PER_THREAD)
