#!/usr/bin/env python3
"""Prompts, image fillings and tokens with several kernels of the CPU, at the shape of the 11B model.

    python scripts/bench_kernels.py KERNEL [KERNEL...] --dir DIR [--layers N] [--type TYPE] [--rounds N]

    python scripts/bench_kernels.py avx512bf16 amx --dir DIR

A kernel is named as in MLLAMA_CPU_KERNEL. The weights are random (full_shape.py). Each kernel runs in a
process of its own, one after the other; every round runs all of them. The table has the medians of the
rounds, and each relative to the first kernel.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_shape
import numpy as np
import report
from contestant import Contestant, TextModel

from mllama_gguf.convert.quantize import TARGETS

WORDS = 128000
N_PROMPT, N_TOKENS, TILES = 512, 12, 4


def measure(model: TextModel) -> dict[str, float]:
    """Seconds of a prompt, of the cache of an image, and of a token."""
    context, h, random = model.context, model.hparams, np.random.default_rng(0)
    prompt = random.integers(0, WORDS, N_PROMPT).tolist()
    states = random.standard_normal((TILES, h.n_positions, h.n_embd), np.float32)

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    context.truncate(0)
    found = {f"prompt of {N_PROMPT}": seconds(lambda: context.decode(prompt, -1, 0, "last"))}
    found["token"] = statistics.median(
        seconds(lambda: context.decode([1], -1, 0, "last")) for _ in range(N_TOKENS)
    )
    slots: list[int] = []
    if h.n_cross_layers > 0:
        found[f"image of {TILES} tiles"] = seconds(lambda: slots.append(context.image_fill([states])))
        context.image_free(slots[0])
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="+", metavar="KERNEL")
    parser.add_argument("--dir", type=report.folder, required=True, help="a folder with room for the model")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--type", choices=sorted(TARGETS), default="q4_k_m", help="of the weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {kernel: [] for kernel in args.kernels}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = Path(folder) / "mllama.gguf"
        full_shape.write_mllama(path, args.layers, vision=False, target=args.type)
        for round in range(1, args.rounds + 1):
            for kernel in args.kernels:
                with Contestant(TextModel, "MLLAMA_CPU_KERNEL", kernel, str(path), args.threads) as model:
                    model.run(measure)  # reads the file
                    found[kernel].append(model.run(measure))
            print(f"round {round} of {args.rounds}", file=sys.stderr)
    medians = {
        kernel: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for kernel, rounds in found.items()
    }
    first = medians[args.kernels[0]]
    report.show(
        f"{args.type}, {args.layers} layers, {args.threads} threads; medians of {args.rounds}",
        ("", *first),
        (
            (kernel, *(f"{1000 * one[name]:.1f} ms ({one[name] / first[name]:.2f})" for name in first))
            for kernel, one in medians.items()
        ),
    )


if __name__ == "__main__":
    main()
