#!/usr/bin/env python3
"""Single tokens and prompts with two builds of libmllama, at the shape of the 11B model.

    python scripts/bench_builds.py OLD.so NEW.so --dir DIR [--layers N] [--threads N] [--rounds N]

The weights are random, Q4_K_M (full_shape.py). Each build runs in a process of its own. A round is a prompt
and 40 tokens with each; the two compute prompt after prompt and token after token in turns, so that what
disturbs the machine disturbs both. The table has the medians; the median of the quotients of two that were
neighbours in time; its standard error; and how far the middle half of the quotients is apart. Both builds
must have the C API of this checkout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import full_shape
import numpy as np
import report
from contestant import Contestant, TextModel

WORDS = 128000
N_TOKENS = 40  # of a round
N_PROMPT = 128


def prompt(build: TextModel, tokens: list[int]) -> float:
    """Seconds of a prompt."""
    build.context.truncate(0)
    return decode(build, tokens)


def decode(build: TextModel, tokens: list[int]) -> float:
    """Seconds of these tokens, after what is there."""
    start = time.perf_counter()
    build.context.decode(tokens, -1, 0, "last")
    return time.perf_counter() - start


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
        builds = [
            Contestant(TextModel, "MLLAMA_LIBRARY", library, str(path), args.threads)
            for library in args.libraries
        ]
        prompts: list[list[float]] = [[], []]
        times: list[list[float]] = [[], []]
        random = np.random.default_rng(0)
        for round in range(args.rounds + 1):
            words = random.integers(0, WORDS, N_PROMPT + N_TOKENS).tolist()
            for n in range(N_TOKENS + 1):
                for i in (0, 1) if (round + n) % 2 else (1, 0):
                    if n == 0:
                        took = builds[i].run(prompt, words[:N_PROMPT])
                    else:
                        took = builds[i].run(decode, words[N_PROMPT + n - 1 : N_PROMPT + n])
                    if round:  # the first reads the file
                        (times if n else prompts)[i].append(took)
            if round:
                print(f"round {round} of {args.rounds}", file=sys.stderr)
        for build in builds:
            build.close()
    rows = []
    for name, (old, new) in (("token", times), (f"prompt of {N_PROMPT}", prompts)):
        ratios = np.divide(new, old)
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        error = 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5  # of a median, if they are bell-shaped
        rows.append(
            (
                name,
                f"{1000 * statistics.median(old):.2f} ms",
                f"{1000 * statistics.median(new):.2f} ms",
                f"{middle:.4f} \u00b1 {error:.4f}",
                f"{low:.4f} to {high:.4f}",
            )
        )
    report.show(
        f"{args.layers} layers, {args.threads} threads",
        ("", "old", "new", "new / old", "half of the rounds"),
        rows,
    )


if __name__ == "__main__":
    main()
