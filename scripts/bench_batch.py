#!/usr/bin/env python3
"""Batch captions against the same calls in a plain loop, with and without encoding ahead: images a minute,
and how busy the model is.

    python scripts/bench_batch.py [--images 200] [--model NAME|PATH] [--mmproj PATH] [--repeat 3]
                                  [--set web] [--encode-ahead auto|on|off|both] [--json FILE]
    python scripts/bench_batch.py --parallel 4 [--set small]      # several captions together, see below
    python scripts/bench_batch.py --parallel 4 --set small --layers 5 --tokens 12 --dir DIR --repeat 1

Draws images of the sizes that cameras and web pages have, as JPEG and PNG. Captions them with one process,
and with two that share them. Loading the model is not counted. The best of --repeat counts,
because other work on the machine can only slow it down.

--parallel N compares `caption --out` with `caption --out --parallel N`, one process each. The images of the
set "small" are one tile. --layers N: random weights of the shape of the 11B model, its first N layers of text
and six of the 40 of its encoder; --tokens: of every caption.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import full_shape
import numpy as np
import report
from PIL import Image, ImageDraw, ImageFilter

from mllama_gguf import Mllama
from mllama_gguf.batch.captions import CaptionOptions
from mllama_gguf.batch.failures import ErrorLog
from mllama_gguf.batch.outputs import RecordFile
from mllama_gguf.batch.run import caption_images

SETS = {
    "small": ((448, 448), (500, 400), (560, 560)),
    "web": ((640, 480), (800, 600), (1024, 768)),
    "camera": ((2048, 1536), (3000, 2000), (4000, 3000)),
}
AHEAD = {"off": (False,), "on": (True,), "auto": (None,), "both": (False, True)}
NAMES = {False: "without", True: "encoding ahead", None: "as it chooses"}
INK = ((214, 36, 44), (40, 90, 200), (240, 190, 30), (60, 160, 70), (30, 30, 36))


def draw(path: Path, seed: int, size: tuple[int, int]) -> None:
    """A few shapes on a soft, noisy ground, as compressible as a photograph."""
    chance = np.random.default_rng(seed)
    noise = chance.integers(150, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    image = Image.fromarray(noise).resize(size).filter(ImageFilter.GaussianBlur(2))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = (int(chance.integers(0, side)) for side in size)
        r = int(chance.integers(size[1] // 12, size[1] // 4))
        ink = INK[int(chance.integers(len(INK)))]
        (pen.ellipse if chance.random() < 0.5 else pen.rectangle)([x - r, y - r, x + r, y + r], fill=ink)
    image.save(path, **({"quality": 90} if path.suffix == ".jpg" else {"compress_level": 3}))


def draw_set(folder: Path, name: str, count: int) -> list[str]:
    """The paths of so many images of a set."""
    sizes = SETS[name]
    paths = []
    for i in range(count):
        path = folder / f"{i}{'.png' if i % 4 == 3 and name == 'web' else '.jpg'}"
        draw(path, i, sizes[i % len(sizes)])
        paths.append(str(path))
    return paths


def plain(open_model: Any, images: Sequence[str], out: str) -> dict[str, float]:
    """What one would write at first."""
    with open_model() as model, open(out, "w") as file:
        start = time.perf_counter()
        for image in images:
            file.write(json.dumps({"image": image, "caption": model.caption(image)}) + "\n")
        return {"start": start, "end": time.perf_counter()}


def batch(
    ahead: bool | None,
    open_model: Any,
    images: Sequence[str],
    out: str,
    *,
    parallel: int = 1,
    tokens: int | None = None,
) -> dict[str, float]:
    """The same by `caption_images`."""
    output = RecordFile(Path(out))
    with open_model() as model:
        errors = ErrorLog(Path(out).with_name("errors.jsonl"))
        start = time.perf_counter()
        summary = caption_images(
            images, output, lambda: model, CaptionOptions(max_tokens=tokens), errors=errors,
            encode_ahead=ahead, parallel=parallel,
        )  # fmt: skip
        end = time.perf_counter()
    output.close()
    assert summary.captioned == len(images)
    return {"start": start, "end": end, "busy": summary.utilisation, "wait": summary.seconds["wait"]}


def measure(work: Any, open_model: Any, images: list[str], processes: int, folder: Path) -> dict[str, float]:
    outs = [tempfile.mktemp(suffix=".jsonl", dir=folder) for _ in range(processes)]
    shares = [images[i::processes] for i in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        found = list(pool.map(partial(work, open_model), shares, outs))
    seconds = max(r["end"] for r in found) - min(r["start"] for r in found)
    busy = min(r.get("busy", 0.0) for r in found)
    return {"rate": len(images) / seconds * 60, "busy": busy}


def compare_parallel(args: argparse.Namespace) -> None:
    """One caption after the other, and N together, in turns."""
    name = args.set or "small"
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        folder = Path(root)
        model = args.model
        if args.layers:
            model = str(folder / "mllama.gguf")
            few = full_shape.FEW_VISION_LAYERS
            full_shape.write_mllama(Path(model), args.layers, vision=True, vision_layers=few)
        open_model = partial(Mllama.from_pretrained, model, args.mmproj, image_cache=False)
        images = draw_set(folder, name, args.images)
        rates: dict[int, list[float]] = {1: [], args.parallel: []}
        for turn in range(args.repeat):
            for parallel in list(rates) if turn % 2 == 0 else list(rates)[::-1]:
                work = partial(batch, None, parallel=parallel, tokens=args.tokens)
                rates[parallel].append(measure(work, open_model, images, 1, folder)["rate"])
                print(f"{parallel} together: {rates[parallel][-1]:.1f} a minute", file=sys.stderr)
    one, many = (statistics.median(rates[n]) for n in (1, args.parallel))
    report.show(
        f"{args.model if not args.layers else f'{args.layers} layers'}, {args.images} images, {name}",
        ("together", "a minute", "ratio"),
        ((1, f"{one:.1f}", "1"), (args.parallel, f"{many:.1f}", f"{many / one:.2f}")),
    )
    settings = {key: getattr(args, key) for key in ("model", "layers", "images", "repeat", "tokens", "set")}
    rows = [{"together": n, "per_minute": statistics.median(rates[n])} for n in rates]
    report.write_json(args.json, {"about": report.about(**settings), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmproj")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--set", choices=SETS, help="only these images")
    parser.add_argument("--encode-ahead", choices=AHEAD, default="both")
    parser.add_argument("--parallel", type=int, help="compare one caption after the other with N together")
    parser.add_argument("--layers", type=int, help="with --parallel: the shape of the 11B model")
    parser.add_argument("--dir", type=report.folder, help="where the file of --layers is made")
    parser.add_argument("--tokens", type=int, help="with --parallel: most tokens of a caption")
    parser.add_argument("--json", type=report.json_path, help="write the figures there too")
    args = parser.parse_args()
    if args.parallel:
        compare_parallel(args)
        return
    # The image cache would answer the second round.
    open_model = partial(Mllama.from_pretrained, args.model, args.mmproj, image_cache=False)
    modes = AHEAD[args.encode_ahead]
    rows: list[dict[str, Any]] = []
    for name in SETS:
        if name != args.set and (args.set or name == "small"):
            continue
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            images = draw_set(folder, name, args.images)
            for processes in (1, 2):
                # In turn, so that both meet the same machine.
                loops: list[float] = []
                batches: dict[bool | None, list[dict[str, float]]] = {ahead: [] for ahead in modes}
                for _ in range(args.repeat):
                    loops.append(measure(plain, open_model, images, processes, folder)["rate"])
                    for ahead in modes:
                        work = partial(batch, ahead)
                        batches[ahead].append(measure(work, open_model, images, processes, folder))
                loop = max(loops)
                for ahead in modes:
                    best = max(batches[ahead], key=lambda r: r["rate"])
                    rows.append({
                        "images": name, "processes": processes, "loop_per_minute": loop,
                        "encode_ahead": ahead, "batch_per_minute": best["rate"],
                        "ratio": best["rate"] / loop, "busy": best["busy"],
                    })  # fmt: skip
    report.show(
        f"{args.model}, {args.images} images, {os.cpu_count()} CPUs; images a minute",
        ("images", "processes", "plain loop", "batch", "a minute", "ratio", "model busy"),
        (
            (r["images"], r["processes"], f"{r['loop_per_minute']:.0f}", NAMES[r["encode_ahead"]],
             f"{r['batch_per_minute']:.0f}", f"{r['ratio']:.2f}", f"{r['busy']:.1%}")
            for r in rows
        ),
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in ("model", "mmproj", "images", "repeat", "encode_ahead")}
    report.write_json(args.json, {"about": report.about(**settings), "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
