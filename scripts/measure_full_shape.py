#!/usr/bin/env python3
"""Memory, load time and interruption at the full shape of the 11B model, on a file of zeros.

    python scripts/measure_full_shape.py --dir DIR

The file has every tensor of the 11B model at its true size (text Q4_K and Q6_K, vision BF16) and no data: it
is sparse, so it takes little disk. Zeros cost the same to multiply as weights do: times and memory are real.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import report
from full_shape import mllama_keys, text_tensors, vision_tensors, write_gguf

from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import LocalModel
from mllama_gguf.errors import Aborted


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and interruption at the 11B shape")
    parser.add_argument("--dir", type=report.folder, required=True, help="where the sparse file goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        measure(Path(folder) / "full-shape.gguf")


def measure(path: Path) -> None:
    """Write the file and print the figures."""
    write_gguf(path, "mllama", mllama_keys(), [*text_tensors(), *vision_tensors()])
    size = path.stat().st_size

    stop_at = float("inf")
    callbacks = Callbacks(load(), None, lambda: time.monotonic() > stop_at)
    process = psutil.Process()
    start = time.monotonic()
    model = LocalModel(path, None, callbacks)
    seconds = time.monotonic() - start
    own = process.memory_full_info().uss
    print(f"file {size / 2**30:.2f} GiB; loaded in {seconds:.2f} s; own memory {own / 2**20:.0f} MiB")
    context = model.open_context(callbacks, n_ctx=2048)

    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_full_info().uss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    pixels = np.zeros((4, 3, 560, 560), np.float32)
    states = [np.zeros((4, 1601, 4096), np.float32)]
    tokens = list(range(512))
    for name, work, after in (
        ("encode", lambda: context.encode(pixels, 6), (1.0, 5.0, 20.0, 45.0)),
        ("fill", lambda: context.image_fill(states), (0.5, 3.0)),
        ("prompt", lambda: context.decode(tokens, -1, 0), (0.5, 2.0, 6.0)),
    ):
        for seconds in after:
            stop_at = time.monotonic() + seconds
            try:
                work()
                print(f"{name}: done before it was to be stopped after {seconds} s")
            except Aborted:
                print(f"{name}: stopped {time.monotonic() - stop_at:.2f} s after the wish, at {seconds} s")
    done.set()
    watcher.join()
    print(f"peak memory of the process's own {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
