#!/usr/bin/env python3
"""Time, error and memory of the vision encoder at the shape of the 11B model, against transformers.

    python scripts/bench_encode.py [--layers N] [--threads N] [--rounds N] [--json FILE]

Needs the extras ``bench`` and ``parity``. The weights are random, rounded to BF16, and the rows of the tile
tables that a grid does not use are zero as in the published models. Every round runs every contestant once,
one after the other with the same number of threads and the same picture; the table has the medians of the
rounds.

--layers N keeps N local layers and one global layer of the 32 and 8; the projector stays whole from five
layers on. The table and the JSON say which fraction of the layers ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

from mllama_gguf._native import Callbacks, load  # noqa: E402
from mllama_gguf.convert import convert  # noqa: E402
from mllama_gguf.runtime import NativeContext, NativeModel  # noqa: E402

PICTURES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # tiles: (rows, columns)


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


def anonymous_memory() -> int:
    """Bytes of this process's own memory, without mapped files (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def peak_memory(work: Callable[[], Any]) -> int:
    """The most anonymous memory that the work adds, bytes; looked at every 20 ms."""
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak


def ours(files: tuple[Path, Path], threads: int) -> Callable[[np.ndarray[Any, Any], int, int], Any]:
    callbacks = Callbacks(load(), None, None)
    model = NativeModel(*files, callbacks)
    context = NativeContext(model, callbacks, n_ctx=64, n_threads=threads)

    def encode(pixels: np.ndarray[Any, Any], ratio: int, tiles: int) -> np.ndarray[Any, Any]:
        assert model.pointer  # the context needs the model, and does not hold it
        return context.encode(pixels[:tiles], ratio)

    return encode


def theirs(checkpoint: Path, dtype: str) -> Callable[[np.ndarray[Any, Any], int, int], Any]:
    import torch
    from transformers import MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(
        checkpoint, torch_dtype=getattr(torch, dtype)
    ).eval()

    def encode(pixels: np.ndarray[Any, Any], ratio: int, tiles: int) -> np.ndarray[Any, Any]:
        mask = (torch.arange(4) < tiles).long()[None, None]
        with torch.no_grad():
            out = model.vision_model(
                pixel_values=torch.from_numpy(pixels).to(model.dtype)[None, None],
                aspect_ratio_ids=torch.tensor([[ratio]]),
                aspect_ratio_mask=mask,
            )
            states = model.model.multi_modal_projector(out.last_hidden_state)
        return states[0, 0, :tiles].float().numpy()

    return encode


def commit() -> str:
    out = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return out.stdout.strip()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The vision encoder against transformers")
    parser.add_argument(
        "--layers", type=int, default=32, help="local layers (with one global layer when not 32)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the models go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if not 1 <= args.layers <= 32 or args.rounds < 1:
        parser.error("--layers is 1 to 32 and --rounds at least 1")

    arch = full_shape(args.layers)
    fraction = (arch.local_layers + arch.global_layers) / 40
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        checkpoint, files = write_models(arch, Path(folder))
        contestants = {f"ours {kind}": ours(files[kind], args.threads) for kind in files}
        pictures = {}
        for tiles, grid in PICTURES.items():
            ratio = arch.grids.index(grid) + 1
            pictures[tiles] = (tiny.make_pixels(arch, ratio), ratio, tiles)
        # before torch is there: its heap would hide ours
        memory = {
            tiles: peak_memory(lambda p=p: contestants["ours bf16"](*p)) for tiles, p in pictures.items()
        }

        import torch
        import transformers

        torch.set_num_threads(args.threads)
        contestants["torch bfloat16"] = theirs(checkpoint, "bfloat16")
        contestants["torch float32"] = theirs(checkpoint, "float32")
        seconds: dict[tuple[int, str], list[float]] = {}
        user: dict[tuple[int, str], list[float]] = {}
        states: dict[tuple[int, str], Any] = {}
        for _ in range(args.rounds):
            for tiles, picture in pictures.items():
                for name, encode in contestants.items():
                    start, cpu = time.perf_counter(), time.process_time()
                    states[tiles, name] = encode(*picture)
                    seconds.setdefault((tiles, name), []).append(time.perf_counter() - start)
                    user.setdefault((tiles, name), []).append(time.process_time() - cpu)

    print(f"{arch.local_layers} local and {arch.global_layers} global layers, {fraction:.0%} of all; "
          f"{args.threads} threads; medians of {args.rounds}")  # fmt: skip
    print(
        f"{'tiles':>5}  {'':15}{'seconds':>9}{'CPU s':>9}{'/ torch BF16':>14}{'/ torch F32':>13}{'error':>10}"
    )
    rows = []
    for tiles in PICTURES:
        exact = states[tiles, "torch float32"]
        bf16, f32 = (statistics.median(seconds[tiles, f"torch {t}"]) for t in ("bfloat16", "float32"))
        for name in contestants:
            t, cpu = statistics.median(seconds[tiles, name]), statistics.median(user[tiles, name])
            error = float(np.linalg.norm(states[tiles, name] - exact) / np.linalg.norm(exact))
            rows.append({
                "tiles": tiles, "name": name, "seconds": t, "cpu_seconds": cpu, "to_torch_bf16": t / bf16,
                "to_torch_f32": t / f32, "relative_error": error, "all_seconds": seconds[tiles, name],
            })  # fmt: skip
            print(f"{tiles:5}  {name:15}{t:9.2f}{cpu:9.2f}{t / bf16:14.2f}{t / f32:13.2f}{error:10.1e}")
        print(f"{tiles:5}  memory beyond the weights at most {memory[tiles] / 1e6:.0f} MB")
    if args.json:
        native = load()
        about = {
            "cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads, "rounds": args.rounds,
            "layers": [arch.local_layers, arch.global_layers], "fraction": fraction, "commit": commit(),
            "kernel": native.text(native.lib.mllama_cpu_kernel()), "python": platform.python_version(),
            "ggml": native.text(native.lib.mllama_ggml_version_loaded()), "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip
        result = {"about": about, "rows": rows, "memory_bytes": memory}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
