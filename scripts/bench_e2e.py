#!/usr/bin/env python3
"""One whole caption: load, encode, prompt, first token, tokens per second, peak memory.

    python scripts/bench_e2e.py [--model NAME|PATH] [--mmproj PATH] [--tiles 1,4] [--json FILE]
    python scripts/bench_e2e.py --full --dir DIR

Needs the extra ``bench``. The model is the bundled one, another that `mllama caption -m` knows, or with
--full random weights of the 11B shape, vision included (full_shape.py; 8 GB on DIR's disk).

Every round is a new process. It opens the model, captions a drawn image of each number of tiles, and asks a
second question about it, for which the image is not encoded again. The figures are medians of the rounds. The
image cache on disk is off. The file's pages are already in memory, unless they do not fit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import full_shape
import numpy as np
import report
from PIL import Image

from mllama_gguf import Mllama
from mllama_gguf.store.resolve import resolve
from mllama_gguf.tune.process import run_point

SIZES = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2)}  # tiles: width and height in tiles
QUESTIONS = ("Describe this image.", "What colour is it?")
HOURS = 3600.0


def image_of(tiles: int, tile_size: int) -> Image.Image:
    """Coloured noise that is cut into so many tiles."""
    width, height = (side * tile_size for side in SIZES[tiles])
    noise = np.random.default_rng(tiles).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height))


def ask(model: Mllama, image: Image.Image, question: str, max_tokens: int) -> dict[str, float]:
    """Times of one reply, in seconds."""
    start = time.perf_counter()
    first, reply = 0.0, model.reply(image=image, prompt=question, max_tokens=max_tokens)
    for _ in reply:
        first = first or time.perf_counter() - start
    stats = reply.stats
    return {
        "encode": stats.seconds["encode"],
        "prompt": stats.seconds["prompt"],
        "first_token": first or time.perf_counter() - start,  # a reply without text
        "tokens_per_second": stats.tokens_per_second["decode"] or 0.0,
        "tokens": stats.completion_tokens,
    }


def measure(
    model: str, mmproj: str | None, tiles: list[int], max_tokens: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """One round, in this process."""
    result: dict[str, Any] = {}

    def work() -> None:
        start = time.perf_counter()
        with Mllama.from_pretrained(model, mmproj, image_cache=False, **settings) as opened:
            result["load"] = time.perf_counter() - start
            # What is read for the first time is slow once.
            ask(opened, image_of(1, opened.hparams.image_size), "Warm up.", 2)
            for n in tiles:
                opened.reset()
                image = image_of(n, opened.hparams.image_size)
                for which, question in zip(("first", "second"), QUESTIONS, strict=True):
                    result[f"{which} {n}"] = ask(opened, image, question, max_tokens)

    result["peak_own_bytes"] = report.peak_memory(work)
    result["peak_resident_bytes"] = report.peak_resident()
    return result


def median(rounds: list[Any]) -> Any:
    """Of every number in these equal dictionaries."""
    if isinstance(rounds[0], dict):
        return {name: median([one[name] for one in rounds]) for name in rounds[0]}
    return statistics.median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="A caption from loading to its last token")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmproj")
    parser.add_argument("--full", action="store_true", help="random weights of the 11B shape")
    parser.add_argument("--dir", type=report.folder, help="where they go (default: a temporary folder)")
    parser.add_argument("--tiles", default="1,4", help="of the images, as in 1,2,4")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=report.json_path, help="write the figures there too")
    args = parser.parse_args()
    tiles = [int(n) if n.isdigit() else 0 for n in args.tiles.split(",")]
    if not set(tiles) <= SIZES.keys() or args.max_tokens < 1 or args.rounds < 1:
        parser.error("--tiles are of 1 to 4; --max-tokens and --rounds at least 1")

    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        name, mmproj = args.model, args.mmproj
        if args.full:
            name, mmproj = str(Path(folder) / "full.gguf"), None
            full_shape.write_mllama(Path(name), vision=True)
        files = resolve(name, mmproj)
        request = {
            "model": name, "mmproj": mmproj, "tiles": tiles, "max_tokens": args.max_tokens,
            "settings": {"n_threads": args.threads},
        }  # fmt: skip
        rounds = [run_point("bench_e2e:measure", request, HOURS) for _ in range(args.rounds)]
        size = sum(path.stat().st_size for path in files.paths)
    m = median(rounds)
    what = "random 11B" if args.full else args.model
    columns = ("question", "tiles", "encode, s", "prompt, s", "first token, s", "tokens/s", "tokens")
    rows = []
    for n in tiles:
        for which in ("first", "second"):
            f = m[f"{which} {n}"]
            seconds = (f"{f[name]:.3f}" for name in ("encode", "prompt", "first_token"))
            rate, count = f"{f['tokens_per_second']:.2f}", f"{f['tokens']:.0f}"
            rows.append((which, n, *seconds, rate, count))
    threads = args.threads or f"{os.cpu_count()} or fewer"
    report.show(f"{what}, {size / 1e9:.2f} GB, threads: {threads}, medians of {args.rounds}", columns, rows)
    print(
        f"loaded in {m['load']:.2f} s; peak memory of its own {m['peak_own_bytes'] / 1e6:.0f} MB, "
        f"with the file's pages {m['peak_resident_bytes'] / 1e6:.0f} MB"
    )
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "dir")}
    report.write_json(
        args.json,
        {"about": report.about(**settings), "file_bytes": size, "median": m, "rounds": rounds},
    )


if __name__ == "__main__":
    main()
