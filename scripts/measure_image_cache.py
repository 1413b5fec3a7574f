#!/usr/bin/env python3
"""Time to the first token of a reply about an image, at the shape of the 11B model: for the first question,
and for a second one in the same process and in another.

    python scripts/measure_image_cache.py --dir DIR [--tiles 1|2|4] [--threads N] [--rounds N]

DIR needs 8 GB for the model, which is kept for the next run, and 1 GB for the cache, which is not. The
weights are random (text Q4_K and Q6_K, vision BF16), so the replies mean nothing; the prompts are as long as
those of the published model. The time is from the call to the first token. The model is loaded, its files are
hashed (once, 5 s), and the image is in memory. "other process" finds all pages of the cache's
files in memory, "from disk" none of them: those are dropped before (which not every file system does). The
first question is asked once. The others are asked once a round; the table shows the median.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import full_shape
import numpy as np
import report

from mllama_gguf import Mllama
from mllama_gguf.cache.disk import DIRECTORY_VARIABLE, ImageCache

QUESTIONS = ("describe this image", "what is to the left of it")
SIZES = {1: (560, 560), 2: (560, 1120), 4: (1120, 1120)}  # tiles: height, width


def ask(model: Path, tiles: int, n_threads: int | None, questions: tuple[str, ...]) -> list[dict[str, Any]]:
    """In this process: what each question took up to its first token, in seconds, and the reply."""
    image = np.random.default_rng(1).integers(0, 256, (*SIZES[tiles], 3), np.uint8)
    found = []
    with Mllama(model, n_threads=n_threads) as opened:
        # the weights' pages, and ggml's own threads
        opened.reply([{"role": "user", "content": "the"}], max_tokens=1).read()
        opened.reset()
        shared, slots = opened._shared, opened._conversation.session.slots
        shared.keys.image_kv(shared.keys.states(shared.images.prepare(image)))  # hash the weights
        fill, fill_seconds = slots._fill, 0.0

        def timed_fill(*args: Any) -> Any:
            nonlocal fill_seconds
            began = time.perf_counter()
            slot = fill(*args)
            fill_seconds += time.perf_counter() - began
            return slot

        slots._fill = timed_fill  # type: ignore[method-assign]
        for question in questions:
            fill_seconds = 0.0
            start = time.perf_counter()
            reply = opened.reply(image=image, prompt=question, max_tokens=2)
            pieces = [next(reply)]
            seconds = time.perf_counter() - start
            pieces += reply
            stats = reply.stats
            found.append(
                {
                    "total": seconds,
                    "encode": stats.seconds["encode"],
                    "fill": fill_seconds,
                    "prompt": stats.seconds["prompt"] - fill_seconds,
                    "tokens": stats.prompt_tokens,
                    "cached": stats.cached_tokens,
                    "reply": pieces,
                }
            )
    return found


def elsewhere(model: Path, args: argparse.Namespace, *questions: str) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        __file__,
        "--dir",
        str(args.dir),
        "--tiles",
        str(args.tiles),
        "--ask",
        *questions,
    ]
    if args.threads:
        command += ["--threads", str(args.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def drop_pages(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first token, with and without the image cache")
    parser.add_argument("--dir", type=report.folder, required=True, help="where the model and the cache go")
    parser.add_argument("--tiles", type=int, choices=SIZES, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ask", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.dir / "full-shape-random.gguf"
    if args.ask:
        print(json.dumps(ask(model, args.tiles, args.threads, tuple(args.ask))))
        return
    if not model.exists():
        with tempfile.TemporaryDirectory(dir=args.dir) as made:
            full_shape.write_mllama(Path(made) / model.name, vision=True)
            os.rename(Path(made) / model.name, model)
    with tempfile.TemporaryDirectory(prefix="images-", dir=args.dir) as directory:
        os.environ[DIRECTORY_VARIABLE] = directory
        measure(model, args, ImageCache().directory)


def measure(model: Path, args: argparse.Namespace, images: Path) -> None:
    """Print the table. images: the folder of the cache, not there yet."""
    # In between the first one again: what two questions begin with is computed once.
    first, *others = elsewhere(model, args, *QUESTIONS * args.rounds)
    again = others[::2]
    sizes = {path.suffix: path.stat().st_size for path in images.iterdir()}
    other, disk, same = [], [], []
    for _ in range(args.rounds):
        other += elsewhere(model, args, QUESTIONS[1])
        drop_pages(images)
        disk += elsewhere(model, args, QUESTIONS[1])
        same += elsewhere(model, args, QUESTIONS[0])
    assert all(row["reply"] == first["reply"] for row in same)
    assert all(row["reply"] == again[0]["reply"] for row in again + other + disk)
    states, image_kv, prefix_kv = (sizes[f".{kind}"] / 1e6 for kind in ("states", "image_kv", "prefix_kv"))
    kept = f"states {states:.0f} MB, image_kv {image_kv:.0f}, prefix_kv {prefix_kv:.1f}"
    print(f"{args.tiles} tiles; {kept}; seconds:")
    print(f"{'':24}   total image  encode    fill  prompt (tokens)  first / total")
    for name, rows in (
        ("first", [first]), ("same process", again), ("other process", other),
        ("from disk", disk), ("other process, as first", same),
    ):  # fmt: skip
        row = sorted(rows, key=lambda row: row["total"])[len(rows) // 2]
        row["picture"] = row["total"] - row["encode"] - row["fill"] - row["prompt"]
        tokens = f"({row['tokens'] - row['cached']})"
        columns = "".join(f"{row[key]:8.2f}" for key in ("total", "picture", "encode", "fill", "prompt"))
        print(f"{name:24}{columns} {tokens:9}{first['total'] / row['total']:14.1f}")


if __name__ == "__main__":
    main()
