#!/usr/bin/env python3
"""Speed and memory at the shape of the 11B model on a GPU: Q4_K_M text, BF16 vision, random weights.

    python scripts/gpu/full_shape.py [--layers N] [--model FILE] [--dir DIR]

The text is also timed in llama.cpp on the same GPU, as a Llama of its layers without cross-attention. Figures
are medians, one line of JSON for each. Exit code 77: no GPU here has the memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from full_shape import N_LAYER, write_llama, write_mllama

from mllama_gguf.backend.base import Item
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.context import LocalContext
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import devices, open_model
from mllama_gguf.backend.plan import make_plan

NEEDED = 12 * 2**30
PROMPT, TOKENS, N_CTX = 512, 64, 4096
SEQUENCES = (1, 4, 8)


def tell(what: str, **values: Any) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def median(work: Callable[[], Any], count: int, *, prepare: Callable[[], Any] = lambda: None) -> float:
    """Seconds of one call of work, after one that is not timed: kernels are made the first time."""
    seconds = []
    for _ in range(count + 1):
        prepare()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and memory at the 11B shape on a GPU")
    parser.add_argument("--layers", type=int, default=N_LAYER, help="only the first layers of the text")
    parser.add_argument("--model", type=Path, help="measure this file, and nothing else")
    parser.add_argument("--dir", type=Path, help="where 14 GB of files go")
    args = parser.parse_args()
    gpus = [d for d in devices(start=True) if d.type in ("gpu", "igpu") and d.error is None]
    whole = args.model is None and args.layers == N_LAYER
    if not gpus or (whole and max(d.memory_free for d in gpus) < NEEDED):
        print("no GPU with 12 GiB of free memory")
        return 77
    if args.model is not None:
        measure(args.model, gpus[0].description)
        return 0
    memory = Path("/dev/shm")
    in_memory = args.dir is None and memory.is_dir() and shutil.disk_usage(memory).free > 2 * NEEDED
    with tempfile.TemporaryDirectory(dir=memory if in_memory else args.dir) as folder:
        ours, theirs = Path(folder) / "mllama.gguf", Path(folder) / "llama.gguf"
        text = write_mllama(ours, args.layers, vision=True)
        measure(ours, gpus[0].description)
        ours.unlink()
        write_llama(theirs, text)
        measure_llama_cpp(theirs)
    return 0


def measure(path: Path, card: str) -> None:
    (planned,) = make_plan(path, n_ctx=N_CTX, n_gpu_layers=-1).settings
    callbacks = Callbacks(load())
    start = time.perf_counter()
    model = open_model(path, None, callbacks=callbacks, n_gpu_layers=-1)
    tell("load", seconds=time.perf_counter() - start, card=card, bytes=model.size)
    h = model.hparams
    context = model.open_context(callbacks, n_ctx=min(N_CTX, h.n_ctx_train))
    random = np.random.default_rng(0)
    for tiles in sorted({1, h.max_tiles}):
        pixels = random.standard_normal((tiles, 3, h.image_size, h.image_size), np.float32)
        aspect_ratio = 1 if tiles == 1 else h.n_aspect_ratios
        tell("encode", tiles=tiles, seconds=median(lambda p=pixels, a=aspect_ratio: context.encode(p, a), 5))
    states = random.standard_normal((h.max_tiles, h.n_positions, h.n_embd), np.float32)
    seconds = median(lambda: context.image_free(context.image_fill([states])), 3)
    tell("fill", tiles=h.max_tiles, seconds=seconds)
    slot = context.image_fill([states])
    n_prompt = min(PROMPT, context.n_ctx // 2)
    prompt = random.integers(1, h.vocab_size - 256, n_prompt).tolist()
    for visible in (0, 1):
        where = (slot, 1) if visible else (-1, 0)
        tiles = h.max_tiles * visible
        seconds = median(lambda w=where: context.decode(prompt, *w), 3, prepare=lambda: context.truncate(0))
        tell("prompt", tiles=tiles, tokens=n_prompt, seconds=seconds, tokens_per_second=n_prompt / seconds)
        steps = min(TOKENS, context.n_ctx - n_prompt - 1)
        seconds = median(lambda w=where: context.decode([1], *w), steps - 1)
        tell("decode", tiles=tiles, seconds=seconds, tokens_per_second=1 / seconds)
    several(context)
    context.reserve([h.max_tiles])  # the largest graphs, as in the plan
    for plan, real in zip(planned.devices, context.memory().devices, strict=True):
        ratio = real.peak / max(1, plan.peak)
        tell("memory", device=real.device, planned=plan.peak, real=real.peak, ratio=ratio)
    context.close()
    model.close()


def several(context: LocalContext) -> None:
    """Tokens of several sequences that compute together."""
    numbers = [context.sequence_new(256) for _ in range(max(SEQUENCES))]
    for n in SEQUENCES:
        items = [Item(number, [1], -1, 0) for number in numbers[:n]]
        seconds = median(lambda i=items: context.decode_many(i), TOKENS // 2)
        tell("together", sequences=n, tokens_per_second=n / seconds)
    for number in numbers:
        context.sequence_free(number)


def measure_llama_cpp(path: Path) -> None:
    """The same prompt and tokens by llama.cpp's C interface, which shares ggml's list of devices with us."""
    from llama_cpp import llama_cpp as llama

    options = llama.llama_model_default_params()
    options.n_gpu_layers = 999
    model = llama.llama_model_load_from_file(os.fsencode(path), options)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = N_CTX, PROMPT, PROMPT
    settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = model and llama.llama_init_from_model(model, settings)
    if not context:
        tell("llama.cpp", error="it does not load the file")
        return
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def decode(tokens: list[int]) -> Any:
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        logits = ctypes.cast(llama.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (n_vocab,)).argmax()  # which waits for the GPU

    def clear() -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)

    prompt = np.random.default_rng(0).integers(1, n_vocab - 256, PROMPT).tolist()
    seconds = median(lambda: decode(prompt), 3, prepare=clear)
    tell("llama.cpp prompt", tokens=PROMPT, seconds=seconds, tokens_per_second=PROMPT / seconds)
    seconds = median(lambda: decode([1]), TOKENS - 1)
    tell("llama.cpp decode", seconds=seconds, tokens_per_second=1 / seconds)
    llama.llama_free(context)
    llama.llama_model_free(model)


if __name__ == "__main__":
    sys.exit(main())
