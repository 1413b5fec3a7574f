#!/usr/bin/env python3
"""What an image costs with at most one, two, three and four tiles.

    python scripts/measure_tiles.py [-m MODEL] [--image FILE] [--threads N] [--rounds N]

The rounds take the numbers of tiles in turns; the table has the medians. Nothing is read from a cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mllama_gguf import Mllama  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument(
        "--image", default=str(ROOT / "examples" / "wide.png"), help="one that fills all tiles"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=16)
    arguments = parser.parse_args()

    with Mllama.from_pretrained(
        arguments.model, n_threads=arguments.threads, n_ctx=512, image_cache=False
    ) as model:
        limits = range(1, model.max_tiles + 1)
        found: dict[int, list[tuple[float, float, float]]] = {n: [] for n in limits}
        captions = {}
        for _ in range(arguments.rounds + 1):
            for n in limits:
                model.reset()
                reply = model.reply(image=arguments.image, max_tiles=n, max_tokens=arguments.max_tokens)
                captions[n] = reply.read()
                seconds = reply.stats.seconds
                found[n].append((seconds["encode"], seconds["prompt"], seconds["decode"]))
        print("| most tiles | encode, ms | prompt, ms | reply, ms | together / all tiles | caption |")
        print("| ---: | ---: | ---: | ---: | ---: | --- |")
        medians = {
            n: [statistics.median(row[i] for row in rows[1:]) * 1000 for i in range(3)]
            for n, rows in found.items()
        }
        everything = sum(medians[max(limits)])
        for n, row in medians.items():
            cells = " | ".join(f"{ms:.1f}" for ms in row)
            print(f"| {n} | {cells} | {sum(row) / everything:.2f} | {captions[n]} |")


if __name__ == "__main__":
    main()
