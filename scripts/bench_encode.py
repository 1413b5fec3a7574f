#!/usr/bin/env python3
"""Time, error and memory of the vision encoder at the shape of the 11B model, against transformers.

    python scripts/bench_encode.py [--layers N] [--threads N] [--rounds N] [--torch TYPE] [--json FILE]

Needs the extra ``bench``. The weights are random, rounded to BF16, and the rows of the tile
tables that a grid does not use are zero as in the published models. Every round runs every contestant once,
one after the other, with the same number of threads and the same image. The table has the medians of the
rounds. transformers runs in a process of its own; if that dies, the table says so.

--layers N keeps N local layers and one global layer of the 32 and 8; the projector stays whole from five
layers on. The table and the JSON say which fraction of the layers ran.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
from contestant import Contestant, Died

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

from mllama_gguf.backend.callbacks import Callbacks  # noqa: E402
from mllama_gguf.backend.library import load  # noqa: E402
from mllama_gguf.backend.local import LocalModel  # noqa: E402
from mllama_gguf.convert.huggingface import convert  # noqa: E402

TORCH = ("bfloat16", "float32")
IMAGES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # tiles: (rows, columns)


def full_shape(layers: int) -> tiny.Arch:
    """The published encoder with the smallest text model that its projector fits."""
    return tiny.Arch(
        "full", image_size=560, patch_size=14, vision_width=1280, vision_heads=16, vision_ff=5120,
        local_layers=layers, global_layers=8 if layers == 32 else 1,
        intermediate=(3, 7, 15, 23, 30) if layers > 30 else tuple(range(min(5, layers))),
        width=4096, heads=32, kv_heads=8, ff=256, layers=1, cross_layers=(0,), vocab_size=320, dtype="BF16",
    )  # fmt: skip


def write_models(arch: tiny.Arch, folder: Path) -> tuple[Path, dict[str, tuple[Path, Path]]]:
    weights = tiny.unused_tiles_zero(arch, tiny.make_weights(arch))
    checkpoint = tiny.make_checkpoint(arch, folder / "checkpoint", weights=weights)
    files = {}
    for kind in ("bf16", "f16"):
        text, mmproj = convert(checkpoint, folder / f"{kind}.gguf", type=kind)
        files[kind] = (text, mmproj)
    return checkpoint, files


def ours(files: tuple[Path, Path], threads: int) -> Callable[[np.ndarray[Any, Any], int, int], Any]:
    callbacks = Callbacks(load(), None, None)
    model = LocalModel(*files, callbacks)
    context = model.open_context(callbacks, n_ctx=64, n_threads=threads)

    def encode(pixels: np.ndarray[Any, Any], ratio: int, tiles: int) -> np.ndarray[Any, Any]:
        return context.encode(pixels[:tiles], ratio)

    return encode


def theirs(checkpoint: Path, dtype: str, threads: int) -> Callable[[np.ndarray[Any, Any], int, int], Any]:
    import torch
    from transformers import MllamaForConditionalGeneration

    torch.set_num_threads(threads)
    model = MllamaForConditionalGeneration.from_pretrained(
        checkpoint, torch_dtype=getattr(torch, dtype)
    ).eval()
    core = getattr(model, "model", model)  # where releases of transformers keep the two parts
    vision = getattr(core, "vision_model", None) or model.vision_model
    projector = getattr(core, "multi_modal_projector", None) or model.multi_modal_projector

    def encode(pixels: np.ndarray[Any, Any], ratio: int, tiles: int) -> np.ndarray[Any, Any]:
        mask = (torch.arange(4) < tiles).long()[None, None]
        with torch.no_grad():
            out = vision(
                pixel_values=torch.from_numpy(pixels).to(model.dtype)[None, None],
                aspect_ratio_ids=torch.tensor([[ratio]]),
                aspect_ratio_mask=mask,
            )
            states = projector(out.last_hidden_state)
        return states[0, 0, :tiles].float().numpy()

    return encode


def timed(encode: Callable[..., Any], *image: Any) -> tuple[Any, float, float]:
    """States, seconds and the seconds of all CPUs together."""
    start, cpu = time.perf_counter(), time.process_time()
    states = encode(*image)
    return states, time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description="The vision encoder against transformers")
    parser.add_argument(
        "--layers", type=int, default=32, help="local layers (with one global layer when not 32)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=report.folder, help="where the models go (default: a temporary folder)")
    parser.add_argument("--torch", action="append", choices=TORCH, help="compare with this type only")
    parser.add_argument("--json", type=report.json_path, help="write the figures here")
    args = parser.parse_args()
    if not 1 <= args.layers <= 32 or args.rounds < 1:
        parser.error("--layers is 1 to 32 and --rounds at least 1")

    arch = full_shape(args.layers)
    fraction = (arch.local_layers + arch.global_layers) / 40
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        checkpoint, files = write_models(arch, Path(folder))
        encoders = {f"ours {kind}": ours(files[kind], args.threads) for kind in files}
        images = {}
        for tiles, grid in IMAGES.items():
            ratio = arch.grids.index(grid) + 1
            images[tiles] = (tiny.make_pixels(arch, ratio), ratio, tiles)
        memory = {
            tiles: report.peak_memory(lambda p=p: encoders["ours bf16"](*p)) for tiles, p in images.items()
        }
        contestants: dict[str, Callable[..., Any]] = {
            name: partial(timed, encode) for name, encode in encoders.items()
        }
        deaths: dict[str, str] = {}
        for dtype in args.torch or TORCH:
            try:
                there = Contestant(theirs, checkpoint, dtype, args.threads)
                contestants[f"torch {dtype}"] = partial(there.run, timed)
            except Died as e:
                deaths[f"torch {dtype}"] = str(e)
        seconds: dict[tuple[int, str], list[float]] = {}
        user: dict[tuple[int, str], list[float]] = {}
        states: dict[tuple[int, str], Any] = {}
        for _ in range(args.rounds):
            for tiles, image in images.items():
                for name, encode in contestants.items():
                    if name in deaths:
                        continue
                    try:
                        states[tiles, name], wall, cpu = encode(*image)
                    except Died as e:
                        deaths[name] = str(e)
                        continue
                    seconds.setdefault((tiles, name), []).append(wall)
                    user.setdefault((tiles, name), []).append(cpu)

    rows: list[dict[str, Any]] = []
    for tiles in IMAGES:
        exact = states.get((tiles, "torch float32"))
        bf16, f32 = (
            statistics.median(seconds[tiles, f"torch {t}"]) if (tiles, f"torch {t}") in seconds else None
            for t in TORCH
        )
        for name in contestants:
            if name in deaths:
                continue
            t, cpu = statistics.median(seconds[tiles, name]), statistics.median(user[tiles, name])
            error = None
            if exact is not None:
                error = float(np.linalg.norm(states[tiles, name] - exact) / np.linalg.norm(exact))
            rows.append({
                "tiles": tiles, "name": name, "seconds": t, "cpu_seconds": cpu,
                "to_torch_bf16": bf16 and t / bf16, "to_torch_f32": f32 and t / f32, "relative_error": error,
                "all_seconds": seconds[tiles, name],
            })  # fmt: skip
    title = (
        f"{arch.local_layers} local and {arch.global_layers} global layers, {fraction:.0%} of all; "
        f"{args.threads} threads; medians of {args.rounds}"
    )
    columns = ("", "tiles", "seconds", "CPU s", "/ torch BF16", "/ torch F32", "error")
    report.show(title, columns, (
        (r["name"], r["tiles"], f"{r['seconds']:.2f}", f"{r['cpu_seconds']:.2f}",
         *("" if r[what] is None else format(r[what], form)
           for what, form in (("to_torch_bf16", ".2f"), ("to_torch_f32", ".2f"), ("relative_error", ".1e"))))
        for r in rows
    ))  # fmt: skip
    for name, how in deaths.items():
        print(f"{name}: {how}")
    for tiles, n_bytes in memory.items():
        print(f"{tiles} tiles: memory beyond the weights at most {n_bytes / 1e6:.0f} MB")
    about = report.about(
        threads=args.threads,
        rounds=args.rounds,
        layers=[arch.local_layers, arch.global_layers],
        fraction=fraction,
    )
    report.write_json(args.json, {"about": about, "rows": rows, "deaths": deaths, "memory_bytes": memory})


if __name__ == "__main__":
    main()
