"""How many CPUs and threads there are to compute with."""

from __future__ import annotations

import os

# ggml's threads wait for each other by spinning, after every operation. With less work than this for each,
# that costs more than it saves; beside another busy process, a hundred times more.
WEIGHTS_PER_THREAD = 32 * 1024 * 1024  # bytes


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads(n_bytes: int) -> int:
    """CPU threads for a model with weights of so many bytes."""
    return min(usable_cpus(), 1 + n_bytes // WEIGHTS_PER_THREAD)
