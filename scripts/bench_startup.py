#!/usr/bin/env python3
"""How long the command line and the import take to start, for one or more source trees in turns.

    python scripts/bench_startup.py                      # this tree
    python scripts/bench_startup.py OTHER_TREE .         # two, say before and after a change

Modules are compiled before, as those of an installed package are. No built library is needed. Milliseconds:
median, least and most of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import mllama_gguf": ("-c", "import mllama_gguf"),
    "mllama --help": ("-m", "mllama_gguf", "--help"),
    "mllama caption --help": ("-m", "mllama_gguf", "caption", "--help"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    trees = [tree.resolve() for tree in arguments.trees]
    times: dict[tuple[str, Path], list[float]] = {}
    with tempfile.TemporaryDirectory() as compiled:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = compiled
        for turn in range(-1, arguments.rounds):  # the first one compiles
            for name, words in COMMANDS.items():
                for tree in trees if turn % 2 else reversed(trees):
                    begin = time.perf_counter()
                    subprocess.run(
                        [sys.executable, *words],
                        cwd="/",
                        env={**env, "PYTHONPATH": str(tree)},
                        check=True,
                        stdout=subprocess.DEVNULL,
                    )
                    if turn >= 0:
                        times.setdefault((name, tree), []).append((time.perf_counter() - begin) * 1000)
    print("| command | tree | median | least | most |\n| --- | --- | --- | --- | --- |")
    for (name, tree), taken in times.items():
        print(f"| `{name}` | {tree} | {statistics.median(taken):.0f} | {min(taken):.0f} | {max(taken):.0f} |")
    print(f"\nload of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
