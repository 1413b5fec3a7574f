#!/usr/bin/env python3
"""Speed and memory at the shape of the 11B model on a GPU: Q4_K_M text, BF16 vision, weights of zeros.

    python scripts/gpu/full_shape.py [--model FILE] [--dir DIR]

The file is sparse and takes no disk; zeros cost a GPU as much as weights do. One line of JSON for each
measurement. Exit code 77: no GPU here has the memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from full_shape import mllama_keys, text_tensors, vision_tensors, write_gguf

from mllama_gguf.backend.base import Item
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.context import LocalContext
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import devices, open_model
from mllama_gguf.backend.plan import make_plan

NEEDED = 12 * 2**30
TOKENS, N_CTX = 64, 4096


def tell(what: str, **values: Any) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and memory at the 11B shape on a GPU")
    parser.add_argument("--model", type=Path, help="measure this file")
    parser.add_argument("--dir", type=Path, help="where the sparse file goes")
    args = parser.parse_args()
    gpus = [d for d in devices(start=True) if d.type in ("gpu", "igpu") and d.error is None]
    if not gpus or (args.model is None and max(d.memory_free for d in gpus) < NEEDED):
        print("no GPU with 12 GiB of free memory")
        return 77
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = args.model or Path(folder) / "full.gguf"
        if args.model is None:
            write_gguf(path, "mllama", mllama_keys(), [*text_tensors(), *vision_tensors()])
        measure(path, gpus[0].description)
    return 0


def measure(path: Path, card: str) -> None:
    (planned,) = make_plan(path, n_ctx=N_CTX, n_gpu_layers=-1).settings
    callbacks = Callbacks(load())
    start = time.perf_counter()
    model = open_model(path, None, callbacks=callbacks, n_gpu_layers=-1)
    tell("load", seconds=time.perf_counter() - start, card=card, bytes=model.size)
    h = model.hparams
    context = model.open_context(callbacks, n_ctx=min(N_CTX, h.n_ctx_train))
    for tiles in sorted({1, h.max_tiles}):
        pixels = np.zeros((tiles, 3, h.image_size, h.image_size), np.float32)
        context.encode(pixels, 1 if tiles == 1 else h.n_aspect_ratios)  # kernels are made the first time
        seconds = timed(lambda p=pixels, t=tiles: context.encode(p, 1 if t == 1 else h.n_aspect_ratios))
        tell("encode", tiles=tiles, seconds=seconds)
    states = np.zeros((h.max_tiles, h.n_positions, h.n_embd), np.float32)
    tell("fill", tiles=h.max_tiles, seconds=timed(lambda: context.image_fill([states])))
    prompt = min(512, context.n_ctx // 2)
    context.decode([1] * prompt, 0, 1)
    context.truncate(0)
    seconds = timed(lambda: context.decode([1] * prompt, 0, 1))
    tell("prompt", tokens=prompt, seconds=seconds, tokens_per_second=prompt / seconds)
    steps = min(TOKENS, context.n_ctx - prompt - 1)
    context.decode([1], 0, 1)
    seconds = timed(lambda: [context.decode([1], 0, 1) for _ in range(steps - 1)])
    tell("decode", tokens=steps - 1, seconds=seconds, tokens_per_second=(steps - 1) / seconds)
    several(context)
    context.reserve([h.max_tiles])  # the largest graphs, as in the plan
    for plan, real in zip(planned.devices, context.memory().devices, strict=True):
        ratio = real.peak / max(1, plan.peak)
        tell(
            "memory",
            device=real.device,
            planned=plan.peak,
            real=real.peak,
            ratio=ratio,
        )
    context.close()
    model.close()


def several(context: LocalContext) -> None:
    """Tokens of several sequences that compute together."""
    numbers = [context.sequence_new(256) for _ in range(8)]
    for n in (1, 4, 8):
        items = [Item(number, [1], -1, 0) for number in numbers[:n]]
        context.decode_many(items)
        seconds = timed(lambda items=items: [context.decode_many(items) for _ in range(TOKENS // 2)])
        tell("together", sequences=n, tokens_per_second=n * (TOKENS // 2) / seconds)
    for number in numbers:
        context.sequence_free(number)


if __name__ == "__main__":
    sys.exit(main())
