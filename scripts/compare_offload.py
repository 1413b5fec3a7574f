#!/usr/bin/env python3
"""The results of every number of offloaded layers for one image: the first values of the encoder, the
likeliest next tokens and the caption. Differences from the first row are marked.

    python scripts/compare_offload.py IMAGE -m MODEL [--rpc HOST:PORT,...] [--layers 0,1,2] [--json FILE]

Exits with 1 if anything differs or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mllama_gguf.backend.plan import make_plan
from mllama_gguf.errors import MllamaError
from mllama_gguf.files import Kind, cannot_write, check_output, write_whole
from mllama_gguf.store.resolve import resolve
from mllama_gguf.tune.compare import N_TOP, N_VISION, Answer, compare

MARK = "bold red"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether offloaded layers compute the same")
    parser.add_argument("image", type=Path)
    parser.add_argument("-m", "--model", default="demo", help="GGUF file, or a bundled model's name")
    parser.add_argument("--mmproj")
    parser.add_argument("-p", "--prompt", default="Describe this image.")
    parser.add_argument("-n", "--max-tokens", type=int, default=32)
    parser.add_argument("--layers", help="as in 0,8,41; default: every number")
    parser.add_argument("--vision-device", default="auto")
    parser.add_argument("--rpc", default="", help="host:port of workers, with commas in between")
    parser.add_argument("-c", "--n-ctx", type=int, default=2048)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", help="write the figures there too, to a new file or that of an earlier run")
    args = parser.parse_args()
    if args.json is not None:
        inputs = [path for path in (args.image, args.model, args.mmproj) if path]
        try:
            check_output(args.json, Kind("file of this script", is_rows), inputs=inputs, overwrite=True)
        except MllamaError as e:
            parser.error(str(e))
    return args


def is_rows(file: BinaryIO) -> bool:
    """Whether a file holds what --json writes."""
    rows = json.load(file)
    return isinstance(rows, list) and all(isinstance(row, dict) and "differs" in row for row in rows)


def table(answers: list[Answer]) -> Table:
    """A row an answer; what differs from the first is marked."""
    out = Table(title="differences from the first row are marked", title_justify="left", show_lines=True)
    for name in ("layers", f"first {N_VISION} vision values", f"top {N_TOP} next tokens", "caption"):
        out.add_column(name)
    for answer in answers:
        marked = answer.differences(answers[0])
        if answer.error:
            out.add_row(str(answer.n_gpu_layers), "", "", Text(answer.error, MARK))
            continue
        vision, top = Text(), Text()
        for i, value in enumerate(answer.vision):
            vision.append(f"{value:.5f} ", MARK if f"vision {i}" in marked else "")
        for i, (text, logit) in enumerate(answer.top):
            top.append(f"{text!r} {logit:.4f}\n", MARK if f"top {i}" in marked else "")
        top.rstrip()
        caption = Text(answer.caption, MARK if "caption" in marked else "")
        out.add_row(str(answer.n_gpu_layers), vision, top, caption)
    return out


def main() -> int:
    args = parse()
    settings = {"n_ctx": args.n_ctx, "vision_device": args.vision_device}
    if args.threads:
        settings["n_threads"] = args.threads
    if args.rpc:
        settings["rpc_servers"] = args.rpc.split(",")
    files = resolve(args.model, args.mmproj)
    settings |= files.parameters
    allowed = files.parameters.get("allow_quantized_vision", False)
    if args.layers:
        layers = [int(n) for n in args.layers.split(",")]
    else:
        plan = make_plan(
            files.text, files.mmproj, n_gpu_layers=0, n_ctx=args.n_ctx, allow_quantized_vision=allowed
        )
        layers = list(range(plan.n_layer + 2))
    request = {
        "model": os.fspath(files.text.resolve()),
        "mmproj": None if files.mmproj is None else os.fspath(files.mmproj.resolve()),
        "image": os.fspath(args.image.resolve()),
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "settings": settings,
    }
    answers = compare(layers, request)
    rows = [{**asdict(a), "differs": sorted(a.differences(answers[0]))} for a in answers]
    if args.json:
        try:
            write_whole(args.json, json.dumps(rows, indent=1) + "\n")
        except OSError as e:
            print(f"Error: {cannot_write(args.json, e)}", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 140).print(table(answers))
    return int(any(row["differs"] or row["error"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
