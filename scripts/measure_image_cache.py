#!/usr/bin/env python3
"""Time to the first token of a reply about a picture, at the shape of the 11B model: the first time, in
another process, and in the same one.

    python scripts/measure_image_cache.py --dir DIR [--tiles 1|2|4] [--threads N]

DIR needs 8 GB for the model, which is kept for the next run, and 1 GB for the cache, which is not. The
weights are random (text Q4_K and Q6_K, vision BF16), so the replies mean nothing; the prompts are as long as
those of the published model. Measured is from the call to the first token, with a model that is loaded and a
picture in memory. "other process" finds all pages of the cache's files in memory, "from disk" none of them:
those are dropped before (which not every file system does).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from measure_full_shape import BF16, F32, Q4, Q6, write_sparse  # noqa: E402

from mllama_gguf import Mllama  # noqa: E402
from mllama_gguf.gguf_file import read_gguf  # noqa: E402
from mllama_gguf.image_cache import DIRECTORY_VARIABLE  # noqa: E402

QUESTIONS = ("describe this image", "what is to the left of it")
SIZES = {1: (560, 560), 2: (560, 1120), 4: (1120, 1120)}  # tiles: height, width
N_BLOCKS = 4099  # of the pattern that fills a matrix: prime, so that rows differ


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    arch = replace(tiny.ARCHS["gqa"], vocab_size=128256)
    files = tiny.make_tokenizer(arch)
    model = files["tokenizer.json"]["model"]
    tokens = [*model["vocab"], *tiny.SPECIAL_TOKENS, tiny.IMAGE_TOKEN]
    tokens += [f"[PAD{i}]" for i in range(128264 - len(tokens))]
    normal, control = 1, 3
    special = range(arch.special(tiny.SPECIAL_TOKENS[0]), arch.image_token + 1)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "llama-bpe")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array(
        "tokenizer.ggml.token_type", [control if i in special else normal for i in range(len(tokens))]
    )
    writer.add_array("tokenizer.ggml.merges", [" ".join(pair) for pair in model["merges"]])
    writer.add_uint32("tokenizer.ggml.bos_token_id", arch.special("<|begin_of_text|>"))
    writer.add_uint32("tokenizer.ggml.eos_token_id", arch.special("<|eot_id|>"))
    writer.add_string("tokenizer.chat_template", tiny.CHAT_TEMPLATE)


def pattern(kind: gguf.GGMLQuantizationType) -> bytes:
    """Blocks of a type whose values are random, about 0.02 large."""
    rng = np.random.default_rng(kind)
    if kind == BF16:
        values = (rng.standard_normal(N_BLOCKS * 64, np.float32) * 0.02).view(np.uint32)
        return (values >> 16).astype(np.uint16).tobytes()
    blocks = rng.integers(0, 256, (N_BLOCKS, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    if kind == Q4:
        blocks[:, :4] = np.array([1e-4, 7.5e-4], np.float16).view(np.uint8)  # of the scales, of the minima
    elif kind == Q6:
        blocks[:, -2:] = np.array([2e-5], np.float16).view(np.uint8)
    return blocks.tobytes()


def write_model(path: Path) -> None:
    partial = path.with_suffix(".partial")
    write_sparse(partial, add_tokenizer)
    patterns = {kind: pattern(kind) for kind in (Q4, Q6, BF16)}
    file = read_gguf(partial)
    with partial.open("r+b") as out:
        for tensor in file.tensors:
            out.seek(file.data_offsets[0] + tensor.offset)
            if tensor.type == F32:
                value = 0.0 if tensor.name.endswith("bias") else 0.5 if "gate" in tensor.name else 1.0
                out.write(np.full(tensor.n_values, value, np.float32).tobytes())
            elif "tile_position_embd" not in tensor.name:  # zeros there, as for unused tiles
                data, rest = patterns[gguf.GGMLQuantizationType(tensor.type)], tensor.n_bytes
                while rest:
                    rest -= out.write(data[:rest])
    partial.rename(path)


def ask(model: Path, tiles: int, n_threads: int | None, questions: tuple[str, ...]) -> list[dict[str, Any]]:
    """In this process: what each question took up to its first token, in seconds, and the reply."""
    picture = np.random.default_rng(1).integers(0, 256, (*SIZES[tiles], 3), np.uint8)
    found = []
    with Mllama(model, n_threads=n_threads) as opened:
        # the weights' pages, and ggml's own threads
        opened.create_chat_completion([{"role": "user", "content": "the"}], max_tokens=1)
        opened.reset()
        fill, filling = opened._session._fill, 0.0

        def timed_fill(group: Any) -> int:
            nonlocal filling
            began = time.perf_counter()
            slot = fill(group)
            filling += time.perf_counter() - began
            return slot

        opened._session._fill = timed_fill  # type: ignore[method-assign]
        for question in questions:
            filling = 0.0
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            start = time.perf_counter()
            chunks = opened.create_chat_completion(
                [{"role": "user", "content": content}], max_tokens=2, stream=True
            )
            next(chunks)  # the role
            pieces = [next(chunks)]
            seconds = time.perf_counter() - start
            *more, last = chunks
            figures = last["timings"]["seconds"]
            found.append(
                {
                    "total": seconds,
                    "encode": figures["encode"],
                    "fill": filling,
                    "prompt": figures["prompt"] - filling,
                    "tokens": last["usage"]["prompt_tokens"],
                    "cached": last["usage"]["prompt_tokens_details"]["cached_tokens"],
                    "reply": [chunk["choices"][0]["delta"]["content"] for chunk in pieces + more],
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
    cache = {DIRECTORY_VARIABLE: str(args.dir / "images")}
    done = subprocess.run(command, env={**os.environ, **cache}, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def drop_pages(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first token, with and without the image cache")
    parser.add_argument("--dir", type=Path, required=True, help="where the model and the cache go")
    parser.add_argument("--tiles", type=int, choices=SIZES, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ask", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.dir / "full-shape-random.gguf"
    if args.ask:
        print(json.dumps(ask(model, args.tiles, args.threads, tuple(args.ask))))
        return
    if not model.exists():
        write_model(model)
    images = args.dir / "images"
    shutil.rmtree(images, ignore_errors=True)
    first, again = elsewhere(model, args, *QUESTIONS)
    sizes = sorted(path.stat().st_size for path in images.iterdir())
    (other,) = elsewhere(model, args, QUESTIONS[1])
    drop_pages(images)
    (disk,) = elsewhere(model, args, QUESTIONS[1])
    (same,) = elsewhere(model, args, QUESTIONS[0])
    print(f"{args.tiles} tiles; states {sizes[-2] / 1e6:.0f} MB, filling {sizes[-1] / 1e6:.0f} MB; seconds:")
    print(f"{'':24}   total picture  encode    fill  prompt (tokens)  first / total  without prompt")
    for name, row in (
        ("first", first), ("same process", again), ("other process", other),
        ("from disk", disk), ("other process, as first", same),
    ):  # fmt: skip
        row["picture"] = row["total"] - row["encode"] - row["fill"] - row["prompt"]
        tokens = f"({row['tokens'] - row['cached']})"
        columns = "".join(f"{row[key]:8.2f}" for key in ("total", "picture", "encode", "fill", "prompt"))
        ratios = (first["total"] / row["total"],
                  (first["total"] - first["prompt"]) / (row["total"] - row["prompt"]))  # fmt: skip
        print(f"{name:24}{columns} {tokens:9}{ratios[0]:14.1f}{ratios[1]:16.1f}")
    assert first["reply"] == same["reply"] and again["reply"] == other["reply"] == disk["reply"]
    shutil.rmtree(images)


if __name__ == "__main__":
    main()
