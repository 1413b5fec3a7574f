#!/usr/bin/env python3
"""Single tokens and prompts with two builds of libmllama, at the shape of the 11B model.

    python scripts/bench_builds.py OLD.so NEW.so --dir DIR [--layers N] [--threads N] [--rounds N]

The weights are random, Q4_K_M (full_shape.py). Each build runs in a process of its own, and all rounds run
both, with the two in turn first. The table has the medians, and the quotient of the two in a round: its
median, and how far the middle half of the rounds is apart. Both builds must have the C API of this checkout.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import full_shape
import numpy as np
import report
from contestant import Contestant

from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.context import LocalContext

WORDS = 128000
N_TOKENS = 40  # of a round
N_PROMPT = 128


class Build:
    """A text model, with one build."""

    def __init__(self, library: str, path: str, threads: int) -> None:
        os.environ["MLLAMA_LIBRARY"] = library
        from mllama_gguf.backend.library import load
        from mllama_gguf.backend.local import open_model

        callbacks = Callbacks(load())
        model = open_model(path, None, callbacks=callbacks)
        self.context: LocalContext = model.open_context(callbacks, n_ctx=1024, n_threads=threads)


def measure(build: Build) -> tuple[float, float]:
    """Seconds of one token, the median, and of a prompt."""
    context = build.context
    tokens = np.random.default_rng(0).integers(0, WORDS, N_PROMPT + N_TOKENS).tolist()
    context.truncate(0)
    start = time.perf_counter()
    context.decode(tokens[:N_PROMPT], -1, 0, "last")
    prompt = time.perf_counter() - start
    times = []
    for token in tokens[N_PROMPT:]:
        start = time.perf_counter()
        context.decode([token], -1, 0, "last")
        times.append(time.perf_counter() - start)
    return statistics.median(times), prompt


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs=2, metavar="LIBRARY")
    parser.add_argument("--dir", type=report.folder, required=True, help="a folder with room for the model")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = Path(folder) / "mllama.gguf"
        full_shape.write_mllama(path, args.layers, vision=False)
        builds = [Contestant(Build, library, str(path), args.threads) for library in args.libraries]
        times: list[list[tuple[float, float]]] = [[], []]
        for round in range(args.rounds + 1):
            for i in (0, 1) if round % 2 else (1, 0):
                measured = builds[i].run(measure)
                if round:  # the first reads the file
                    times[i].append(measured)
        for build in builds:
            build.close()
    rows = []
    for number, name in enumerate(("token", f"prompt of {N_PROMPT}")):
        old, new = ([row[number] for row in of] for of in times)
        ratios = sorted(b / a for a, b in zip(old, new, strict=True))
        quarter = len(ratios) // 4
        rows.append(
            (
                name,
                f"{1000 * statistics.median(old):.2f} ms",
                f"{1000 * statistics.median(new):.2f} ms",
                f"{statistics.median(ratios):.4f}",
                f"{ratios[quarter]:.4f} to {ratios[-1 - quarter]:.4f}",
            )
        )
    report.show(
        f"{args.layers} layers, {args.threads} threads",
        ("", "old", "new", "new / old", "half of the rounds"),
        rows,
    )


if __name__ == "__main__":
    main()
