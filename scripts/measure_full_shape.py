#!/usr/bin/env python3
"""Memory, load time and interruption at the full shape of the 11B model, on a file of zeros.

    python scripts/measure_full_shape.py --dir DIR

The file has every tensor of the 11B model at its true size (text Q4_K and Q6_K, vision BF16) and no data: it
is sparse, so it takes little disk. Zeros cost the same to multiply as weights do: times and memory are real.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import psutil

from mllama_gguf._native import Callbacks, load
from mllama_gguf.errors import Aborted
from mllama_gguf.runtime import NativeContext, NativeModel

Q4, Q6, BF16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q6_K", "BF16", "F32"))
CROSS = (3, 8, 13, 18, 23, 28, 33, 38)
TEXT = {
    "block_count": 40, "context_length": 131072, "embedding_length": 4096, "feed_forward_length": 14336,
    "attention.head_count": 32, "attention.head_count_kv": 8, "vocab_size": 128256,
    "rope.dimension_count": 128,
}  # fmt: skip
VISION = {
    "block_count": 32, "global.block_count": 8, "embedding_length": 1280, "feed_forward_length": 5120,
    "attention.head_count": 16, "image_size": 560, "patch_size": 14, "max_num_tiles": 4, "num_channels": 3,
}  # fmt: skip


def tensors() -> list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]]:
    """Name, shape (slowest first) and type of every tensor."""
    d, ff, kv = 4096, 14336, 1024
    out = [("token_embd.weight", (128264, d), Q4), ("output_norm.weight", (d,), F32)]
    out += [("output.weight", (128256, d), Q6)]
    for i in range(40):
        names = ("cross_attn_q_proj", "cross_attn_k_proj", "cross_attn_v_proj", "cross_attn_o_proj")
        q, k, v, o = names if i in CROSS else ("attn_q", "attn_k", "attn_v", "attn_output")
        out += [(f"blk.{i}.{n}.weight", s, t) for n, s, t in (
            ("attn_norm", (d,), F32), (q, (d, d), Q4), (k, (kv, d), Q4), (v, (kv, d), Q6), (o, (d, d), Q4),
            ("ffn_norm", (d,), F32), ("ffn_gate", (ff, d), Q4), ("ffn_up", (ff, d), Q4),
            ("ffn_down", (d, ff), Q6),
        )]  # fmt: skip
        if i in CROSS:
            out += [(f"blk.{i}.cross_attn_{n}_norm.weight", (128,), F32) for n in "qk"]
            out += [(f"blk.{i}.cross_attn_{n}_gate", (1,), F32) for n in ("attn", "mlp")]
    w = 1280
    out += [("v.class_embd", (w,), F32), ("v.patch_embd.weight", (w, 3, 14, 14), BF16)]
    out += [("v.position_embd.weight", (1601, w), F32)]
    out += [("v.tile_position_embd.weight", (9, 4 * 1601 * w), BF16)]
    out += [(f"v.{n}_tile_position_embd.weight", (9, 4 * w), F32) for n in ("pre", "post")]
    out += [(f"v.{n}.gate", (1,), F32) for n in (
        "position_embd", "tile_position_embd", "pre_tile_position_embd", "post_tile_position_embd",
    )]  # fmt: skip
    out += [(f"v.{n}_ln.{part}", (w,), F32) for n in ("pre", "post") for part in ("weight", "bias")]
    for prefix, count in (("v.blk", 32), ("v.global.blk", 8)):
        for i in range(count):
            norms = ("attn_norm.weight", "attn_norm.bias", "ffn_norm.weight", "ffn_norm.bias")
            out += [(f"{prefix}.{i}.{n}", (w,), F32) for n in norms]
            out += [(f"{prefix}.{i}.attn_{n}.weight", (w, w), BF16) for n in ("q", "k", "v", "output")]
            out += [(f"{prefix}.{i}.ffn_up.weight", (5120, w), BF16)]
            out += [(f"{prefix}.{i}.ffn_up.bias", (5120,), F32)]
            out += [(f"{prefix}.{i}.ffn_down.weight", (w, 5120), BF16)]
            out += [(f"{prefix}.{i}.ffn_down.bias", (w,), F32)]
            if count == 8:
                out += [(f"{prefix}.{i}.{n}_gate", (1,), F32) for n in ("attn", "ffn")]
    return [*out, ("mm.0.weight", (4096, 6 * w), BF16), ("mm.0.bias", (4096,), F32)]


def write_sparse(path: Path, add_keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None) -> None:
    writer = gguf.GGUFWriter(path, "mllama")
    for key, value in TEXT.items():
        writer.add_uint32(f"mllama.{key}", value)
    writer.add_array("mllama.attention.cross_attention_layers", list(CROSS))
    for key, value in VISION.items():
        writer.add_uint32(f"mllama.vision.{key}", value)
    writer.add_array("mllama.vision.intermediate_layers_indices", [3, 7, 15, 23, 30])
    size = 0
    for name, shape, kind in tensors():
        n_bytes = int(np.prod(shape)) // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        size += -(-n_bytes // 32) * 32
    add_keys(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        start = -(-path.stat().st_size // 32) * 32
        file.truncate(start + size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and interruption at the 11B shape")
    parser.add_argument("--dir", type=Path, required=True, help="where the sparse file goes")
    args = parser.parse_args()
    path = args.dir / "full-shape.gguf"
    write_sparse(path)
    size = path.stat().st_size

    stop_at = float("inf")
    callbacks = Callbacks(load(), None, lambda: time.monotonic() > stop_at)
    process = psutil.Process()
    start = time.monotonic()
    model = NativeModel(path, None, callbacks)
    seconds = time.monotonic() - start
    own = process.memory_full_info().uss
    print(f"file {size / 2**30:.2f} GiB; loaded in {seconds:.2f} s; own memory {own / 2**20:.0f} MiB")
    context = NativeContext(model, callbacks, n_ctx=2048)

    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_full_info().uss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    pixels = np.zeros((4, 3, 560, 560), np.float32)
    states = [np.zeros((4, 1601, 4096), np.float32)]
    tokens = list(range(512))
    for name, work, after in (
        ("encode", lambda: context.encode(pixels, 6), (1.0, 5.0, 20.0, 45.0)),
        ("fill", lambda: context.image_fill(states), (0.5, 3.0)),
        ("prompt", lambda: context.decode(tokens, -1, 0), (0.5, 2.0, 6.0)),
    ):
        for seconds in after:
            stop_at = time.monotonic() + seconds
            try:
                work()
                print(f"{name}: done before it was to be stopped after {seconds} s")
            except Aborted:
                print(f"{name}: stopped {time.monotonic() - stop_at:.2f} s after the wish, at {seconds} s")
    done.set()
    watcher.join()
    print(f"peak memory of the process's own {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
