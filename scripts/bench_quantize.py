#!/usr/bin/env python3
"""Time and memory of quantizing at the shape of the 11B model, and the ratio to llama.cpp's own quantizer.

    python scripts/bench_quantize.py --dir DIR [--layers 40] [--full-only | --ratio-only]
                                     [--json FILE]

Two parts, on random weights (blocks of bell-shaped values, repeated), Q4_K_M by default:

ratio  One set of bf16 tensors of the 11B text (fewer layers: --ratio-layers, no cross-attention, which
       llama.cpp does not know) in two files that differ in their keys alone, architecture llama and mllama.
       llama.cpp's quantizer and ours alternate, each in its own process with the same number of threads.
       The tensors of both outputs must be equal to the byte.
full   A checkpoint of the whole 11B shape, vision included, as sharded safetensors of about 21 GB, straight
       to quantized text and bf16 vision: wall time and the process's peak resident memory. --layers makes it
       smaller.

The files go to DIR and are deleted at the end. Times hold the reading and writing of the files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_shape
import gguf
import numpy as np
import report
import tiny  # full_shape knows where it is
from contestant import Died, how_it_ended

from mllama_gguf.convert.huggingface import convert
from mllama_gguf.convert.quantize import TARGETS, quantize
from mllama_gguf.convert.values import f32_to_bf16

BLOCK = 32 << 20  # values


def random_bf16(n: int = BLOCK) -> bytes:
    values = np.random.default_rng(0).standard_normal(n, dtype=np.float32) * np.float32(0.02)
    return f32_to_bf16(values).tobytes()


# ---- ratio -------------------------------------------------------------------------------------------------


def write_text(path: Path, arch: str, n_layer: int, block: bytes) -> int:
    """A bf16 text file; returns how many values its matrices hold."""
    tensors = full_shape.text_tensors("bf16", n_layer=n_layer, cross=(), extra_rows=0)

    def data(tensor: full_shape.Tensor) -> bytes:
        return block if tensor[2] == "BF16" else np.ones(tensor[1], np.float32).tobytes()

    full_shape.write_gguf(path, arch, full_shape.text_keys(arch, n_layer), tensors, data)
    return sum(int(np.prod(shape)) for _, shape, kind in tensors if kind == "BF16")


def llama_cpp_quantize(source: str, out: str, target: str, threads: int) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, TARGETS[target].file_type
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), params) != 0:
        raise SystemExit("llama.cpp failed")


def child(args: argparse.Namespace) -> None:
    """Runs in its own process; prints seconds and peak memory."""
    work: dict[str, Callable[[], object]] = {
        "llama.cpp": lambda: llama_cpp_quantize(args.source, args.out, args.type, args.threads),
        "ours": lambda: quantize(args.source, args.out, args.type, n_threads=args.threads),
        "convert": lambda: convert(args.source, args.out, type=args.type, n_threads=args.threads),
    }
    start = time.monotonic()
    work[args.child]()
    seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": report.peak_resident()}))


def timed(what: str, source: Path, out: Path, args: argparse.Namespace) -> dict[str, float]:
    """What `child` prints. Raises Died."""
    command = [sys.executable, __file__, "--dir", str(args.dir), "--type", args.type]
    command += ["--threads", str(args.threads), "--child", what, "--source", str(source), "--out", str(out)]
    out.unlink(missing_ok=True)  # to replace a file waits for the disk, and llama.cpp does not
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode != 0:
        raise Died(how_it_ended(done.returncode))
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two files hold the same tensors, to the byte."""
    first, second = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (a, b))
    return first.keys() == second.keys() and all(
        t.tensor_type == second[name].tensor_type and np.array_equal(t.data, second[name].data)
        for name, t in first.items()
    )


def ratio(args: argparse.Namespace) -> dict[str, Any]:
    block = random_bf16()
    sources = {"llama.cpp": args.dir / "llama.gguf", "ours": args.dir / "mllama.gguf"}
    outs = {name: path.with_suffix(".out.gguf") for name, path in sources.items()}
    try:
        for name, arch in (("llama.cpp", "llama"), ("ours", "mllama")):
            n_values = write_text(sources[name], arch, args.ratio_layers, block)
        runs: dict[str, list[dict[str, float]]] = {"llama.cpp": [], "ours": []}
        deaths: dict[str, str] = {}
        for _ in range(args.runs):
            for name in runs:
                try:
                    runs[name].append(timed(name, sources[name], outs[name], args))
                except Died as e:
                    if name == "ours":
                        raise
                    deaths[name] = str(e)
        billions = n_values / 1e9
        median = {
            name: {what: statistics.median(r[what] for r in results) for what in ("seconds", "cpu", "peak")}
            for name, results in runs.items()
            if name not in deaths
        }
        rows = [
            (name, f"{m['seconds']:.1f}", f"{m['seconds'] / billions:.2f}", f"{m['cpu']:.1f}",
             f"{m['peak'] / 1e9:.2f}", ", ".join(f"{r['seconds']:.1f}" for r in runs[name]))
            for name, m in median.items()
        ]  # fmt: skip
        rows += [(name, how, "", "", "", "") for name, how in deaths.items()]
        report.show(
            f"{args.type}, {args.ratio_layers} layers, {billions:.2f} G values, {args.threads} threads",
            ("medians", "seconds", "ns a value", "CPU s", "peak GB", "each"),
            rows,
        )
        if deaths:
            return {"values": n_values, "runs": runs, "median": median, "deaths": deaths}
        ratios = {w: median["ours"][w] / median["llama.cpp"][w] for w in ("seconds", "cpu")}
        same = same_tensors(*outs.values())
        print(
            f"ours / llama.cpp: seconds {ratios['seconds']:.3f}, CPU {ratios['cpu']:.3f}; "
            f"same types and bytes: {'yes' if same else 'NO'}"
        )
        return {"values": n_values, "runs": runs, "median": median, "ratios": ratios, "same": same}
    finally:
        for path in (*sources.values(), *outs.values()):
            path.unlink(missing_ok=True)


# ---- full --------------------------------------------------------------------------------------------------


class Shapes:
    """Stands for the random numbers of tests/tiny.py: arrays of the right shape that take no memory."""

    def __init__(self, *key: object) -> None:
        pass

    def noise(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return np.broadcast_to(np.float32(0), shape)

    def uniform(self, *shape: int) -> np.ndarray:
        return np.zeros(shape)


def write_checkpoint(directory: Path, n_layer: int, block: bytes) -> int:
    """The 11B model (or its first layers) as bf16 safetensors in shards; returns its bytes."""
    cross = tuple(i for i in full_shape.CROSS if i < n_layer)
    arch = tiny.Arch(
        "full", image_size=560, patch_size=14, vision_width=1280, vision_heads=16, vision_ff=5120,
        local_layers=32, global_layers=8, intermediate=(3, 7, 15, 23, 30), width=full_shape.D, heads=32,
        kv_heads=8, ff=full_shape.FF, layers=n_layer, cross_layers=cross, vocab_size=full_shape.VOCAB,
        dtype="BF16",
    )  # fmt: skip
    tiny.Stream = Shapes  # type: ignore[misc, assignment]
    weights = tiny.make_weights(arch)
    tiny.make_checkpoint(arch, directory, weights={})
    (directory / "model.safetensors").unlink()
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, value in weights.items():
        if size > 4e9:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * value.size
        total += 2 * value.size
    weight_map = {}
    for i, names in enumerate(shards):
        path = directory / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name in names:
            end = offset + 2 * weights[name].size
            shape = list(weights[name].shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                full_shape.fill(f, 2 * weights[name].size, block)
    tiny.write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return total


def full(args: argparse.Namespace) -> dict[str, Any]:
    directory, out = args.dir / "checkpoint", args.dir / "full.gguf"
    try:
        size = write_checkpoint(directory, args.layers, random_bf16())
        result = timed("convert", directory, out, args)
        written = [out, out.with_name("full-mmproj.gguf")]
        sizes = [path.stat().st_size for path in written]
        report.show(
            f"Checkpoint to {args.type}, {args.layers} layers, {args.threads} threads",
            ("", "checkpoint GB", "written GB", "seconds", "CPU s", "peak GB"),
            [("ours", f"{size / 1e9:.1f}", " + ".join(f"{n / 1e9:.2f}" for n in sizes),
              f"{result['seconds']:.0f}", f"{result['cpu']:.0f}", f"{result['peak'] / 1e9:.2f}")],
        )  # fmt: skip
        return {"checkpoint_bytes": size, "written_bytes": sizes, **result}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        for path in args.dir.glob("full*.gguf"):
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of quantizing at the 11B shape")
    parser.add_argument("--dir", type=report.folder, required=True, help="where the files go; 30 GB for all")
    parser.add_argument("--type", choices=TARGETS, default="q4_k_m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=40, help="layers of the checkpoint")
    parser.add_argument("--ratio-layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--full-only", action="store_true")
    parser.add_argument("--ratio-only", action="store_true")
    parser.add_argument("--json", type=report.json_path, help="write the figures there too")
    for hidden in ("--child", "--source", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-quantize-", dir=args.dir) as work:
        args.dir = Path(work)  # what else is in the folder is not ours
        if not args.full_only:
            result["ratio"] = ratio(args)
        if not args.ratio_only:
            result["full"] = full(args)
    settings = {name: getattr(args, name) for name in ("type", "threads", "layers", "ratio_layers", "runs")}
    report.write_json(args.json, {"about": report.about(**settings), **result})


if __name__ == "__main__":
    main()
