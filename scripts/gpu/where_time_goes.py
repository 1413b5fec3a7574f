#!/usr/bin/env python3
"""Where a GPU's time goes at the shape of the 11B model: kernels and copies, by torch's profiler.

    python scripts/gpu/where_time_goes.py [--layers N] [--model FILE] [--dir DIR]

Needs a torch with CUDA, which only watches. For each phase: seconds as a caller sees them, seconds in which
the GPU works, and what it does. Exit code 77: no torch with CUDA.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import torch
    from torch.profiler import ProfilerActivity, profile
except ImportError as e:
    print(f"no torch: {e}")
    sys.exit(77)

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from full_shape import N_LAYER, write_mllama

from mllama_gguf.backend.base import Item
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import open_model

ROWS = 24


def watch(phase: str, work: Callable[[], Any], times: int = 1) -> None:
    for _ in range(3):  # kernels are made, graphs captured
        work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    seconds = (time.perf_counter() - start) / times
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            work()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    busy = sum(row.device_time_total for row in rows) / times / 1e6
    print(f"\n== {phase}: {seconds * 1e3:.2f} ms, the GPU works for {busy * 1e3:.2f} ms", flush=True)
    for row in rows[:ROWS]:
        each = row.device_time_total / times / 1e3
        print(f"{each:9.3f} ms  {row.count // times:6d} x  {row.key[:120]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Where a GPU's time goes at the 11B shape")
    parser.add_argument("--layers", type=int, default=N_LAYER, help="only the first layers of the text")
    parser.add_argument("--model", type=Path, help="take this file, which full_shape.py wrote")
    parser.add_argument("--dir", type=Path, help="where 8 GB of files go")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 77
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = args.model or Path(folder) / "mllama.gguf"
        if args.model is None:
            write_mllama(path, args.layers, vision=True)
        callbacks = Callbacks(load())
        model = open_model(path, None, callbacks=callbacks, n_gpu_layers=-1)
    h = model.hparams
    context = model.open_context(callbacks, n_ctx=2048)
    random = np.random.default_rng(0)
    for tiles in (1, h.max_tiles):
        pixels = random.standard_normal((tiles, 3, h.image_size, h.image_size), np.float32)
        ratio = 1 if tiles == 1 else h.n_aspect_ratios
        watch(f"encode, {tiles} tiles", lambda p=pixels, r=ratio: context.encode(p, r))
    states = random.standard_normal((h.max_tiles, h.n_positions, h.n_embd), np.float32)
    watch("fill, 4 tiles", lambda: context.image_free(context.image_fill([states])))
    slot = context.image_fill([states])
    prompt = random.integers(1, h.vocab_size - 256, 512).tolist()

    def read() -> None:
        context.truncate(0)
        context.decode(prompt, -1, 0)

    watch("prompt, 512 tokens", read)
    watch("a token", lambda: context.decode([1], -1, 0), 8)
    watch("a token that sees 4 tiles", lambda: context.decode([1], slot, 1), 8)
    numbers = [context.sequence_new(256) for _ in range(8)]
    items = [Item(number, [1], -1, 0) for number in numbers]
    watch("a token of 8 sequences", lambda: context.decode_many(items), 8)
    context.close()
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
