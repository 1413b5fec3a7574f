#!/usr/bin/env python3
"""Decoding and prompts at the shape of the 11B model, against llama.cpp and the memory's read bandwidth.

    python scripts/bench_decode.py --dir DIR [--layers N] [--threads N] [--rounds N] [--json FILE]

Needs the extra ``bench`` and 11 GB on DIR's disk and in memory. The weights are random, Q4_K_M
(full_shape.py).

Equal bytes per token. A token that sees no image skips the cross-attention layers, so the 11B model is then
a Llama of its 32 other layers. llama.cpp runs a file of exactly these layers: the same tensors, the same
types (of the 40 layers' mix), the same bytes. So not only the bytes are equal but the whole computation, and
the logits after a few prompts are compared (not the replies: rows of the random output repeat, so that the
two likeliest tokens may be equally likely to the bit). With an image there is nothing to compare with; the
table gives the bytes that such a token reads, cross-attention cache included, and the bandwidth that makes.

llama.cpp runs in a process of its own. If that dies, as with its AMX products on some builds, the table says
so, and it runs again without its faster layouts.

Both have the same threads, n_batch and flash attention, and map the file (--no-mmap: ours copies it); the
caches' types are each one's default.
Every round runs everything once, with the two in turn first; the figures are medians of the rounds, and a
round's tokens per second the median of its tokens'.
--layers N keeps the first N of the 40 layers.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import full_shape
import numpy as np
import numpy.typing as npt
import report
from contestant import Contestant, first_that_lives

from mllama_gguf import Mllama
from mllama_gguf.backend.library import load as load_native

TOKENS = 128000  # those below are words
N_CTX = 2048
N_BATCH = 512
TILES = (1, 4)
TURNS = 4
BANDWIDTH_BYTES = 1 << 30

PROMPTS = 8  # whose logits are compared

Prompt = list[int]
Floats = npt.NDArray[np.float32]


class Ours:
    """Our text model, below the chat."""

    def __init__(self, path: Path, threads: int, repack: bool, use_mmap: bool) -> None:
        self.model = Mllama(
            path,
            n_ctx=N_CTX,
            n_batch=N_BATCH,
            n_threads=threads,
            repack=repack,
            use_mmap=use_mmap,
            image_cache=False,
        )
        self.context: Any = self.model._conversation.context
        self.slot, self.n_visible = -1, 0

    def clear(self) -> None:
        self.context.truncate(0)

    def logits(self, tokens: Prompt) -> Floats:
        """Logits of the next token: float32 [vocab_size]."""
        logits: Floats = self.context.decode(tokens, self.slot, self.n_visible)[0]
        return logits

    def decode(self, tokens: Prompt) -> int:
        """The likeliest token after these."""
        return int(self.logits(tokens).argmax())

    def fill(self, tiles: int) -> tuple[int, float]:
        """A slot with an image of `tiles` tiles, and the seconds that filling its cache took."""
        h = self.model.hparams
        states = np.random.default_rng(tiles).standard_normal((tiles, h.n_positions, h.n_embd), np.float32)
        start = time.perf_counter()
        slot = self.context.image_fill([states])
        return slot, time.perf_counter() - start

    @contextmanager
    def seen(self, slot: int) -> Iterator[None]:
        """Text sees the image of that slot."""
        self.slot, self.n_visible = slot, 1
        try:
            yield
        finally:
            self.slot, self.n_visible = -1, 0


class LlamaCpp:
    """llama.cpp by its C interface."""

    def __init__(self, path: Path, threads: int, repack: bool) -> None:
        from llama_cpp import llama_cpp as llama

        load_native()  # its log goes where ours goes
        self._llama = llama
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = repack
        self._model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}")
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = N_CTX, N_BATCH, N_BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama.llama_init_from_model(self._model, settings)
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def logits(self, tokens: Prompt) -> Floats:
        """Logits of the next token: float32 [vocab_size], valid until the next call."""
        llama = self._llama
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(self._context, llama.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        logits = llama.llama_get_logits_ith(self._context, -1)
        floats = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(floats, (self._n_vocab,))

    def decode(self, tokens: Prompt) -> int:
        """The likeliest token after these."""
        return int(self.logits(tokens).argmax())


def time_prompt(who: Ours | LlamaCpp, prompt: Prompt) -> float:
    """Tokens per second."""
    who.clear()
    start = time.perf_counter()
    who.decode(prompt)
    return len(prompt) / (time.perf_counter() - start)


def time_tokens(who: Ours | LlamaCpp, prompt: Prompt, n: int) -> float:
    """Tokens per second by the median of n tokens after a prompt. The first, which may build a graph, is not
    timed."""
    who.clear()
    token = who.decode([who.decode(prompt)])
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        token = who.decode([token])
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


def time_images(ours: Ours, prompt: Prompt, n: int) -> dict[str, float]:
    """Seconds to fill the cache for images of few and many tiles, its bytes, and tokens per second that see
    them, n of each, in turns: what is compared is nearer than what a machine's memory does from one second
    to the next."""
    figures: dict[str, float] = {}
    slots: dict[int, int] = {}
    rates: dict[int, list[float]] = {tiles: [] for tiles in TILES}
    for tiles in TILES:
        slots[tiles], figures[f"fill {tiles}"] = ours.fill(tiles)
        figures[f"cache {tiles}"] = ours.context.image_size(slots[tiles], 0)
    for turn in range(TURNS):
        for tiles in TILES if turn % 2 == 0 else TILES[::-1]:
            with ours.seen(slots[tiles]):
                rates[tiles].append(time_tokens(ours, prompt, -(-n // TURNS)))
    for tiles, slot in slots.items():
        ours.context.image_free(slot)
        figures[f"decode {tiles}"] = statistics.median(rates[tiles])
    return figures


def logits_of(who: Ours | LlamaCpp, prompt: Prompt) -> Floats:
    """The logits after a prompt that nothing precedes."""
    who.clear()
    return who.logits(prompt).copy()


def decode(who: Ours | LlamaCpp, prompt: Prompt) -> int:
    """The likeliest token after a prompt and whatever precedes it."""
    return who.decode(prompt)


def compare(ours: Ours, theirs: Contestant) -> dict[str, float]:
    """How much the logits after some prompts differ (relative L2, median), and how often they have the same
    largest."""
    chance = np.random.default_rng(1)
    errors, same = [], 0
    for _ in range(PROMPTS):
        prompt = chance.integers(0, TOKENS, 16).tolist()
        a = logits_of(ours, prompt)
        b = theirs.run(logits_of, prompt)[: a.size]
        a = a[: b.size]
        errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
        same += int(b[a.argmax()] >= b.max())
    return {"relative_error": statistics.median(errors), "same_largest": same, "prompts": PROMPTS}


# ---- the chat's own share ----------------------------------------------------------------------------------

CHATS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 1, "stop": ["never", "in this text"]},
    "grammar": {"grammar": 'root ::= [^"]+'},
}


class TimedLibrary:
    """The C library, with the seconds that its decoding takes."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def mllama_decode(self, *args: Any) -> int:
        start = time.perf_counter()
        status = int(self._lib.mllama_decode(*args))
        self.seconds.append(time.perf_counter() - start)
        return status


def time_chat(ours: Ours, n: int, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a token that the chat takes, and those of them outside C; medians of one reply."""
    native = ours.context.native
    lib = TimedLibrary(native.lib)
    ours.context.native = replace(native, lib=lib)
    ours.model.reset()
    try:
        marks = []
        messages = [{"role": "user", "content": "Tell me a tale."}]
        for _ in ours.model.reply(messages, max_tokens=n, **options):
            marks.append((time.perf_counter(), len(lib.seconds)))
    finally:
        ours.context.native = native
    # Between two pieces there is one token, or more where one showed no text.
    whole, outside = [], []
    for (start, first), (end, last) in pairwise(marks):
        if last > first:
            whole.append((end - start) / (last - first))
            outside.append(whole[-1] - sum(lib.seconds[first:last]) / (last - first))
    return statistics.median(whole), statistics.median(outside)


# ---- bytes -------------------------------------------------------------------------------------------------


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read together from memory: the sum of a large array, best of
    three."""
    parts = np.array_split(np.ones(BANDWIDTH_BYTES // 8, np.uint64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - start))
    return best


def bytes_per_token(text: list[full_shape.Tensor], tiles: int, cache: int) -> int:
    """What a token reads of the weights, and of the cross-attention cache where it sees tiles. Its own part
    of the self-attention cache is left out."""
    total = 0
    for tensor in text:
        name = tensor[0]
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        if name == "token_embd.weight" or name.endswith(
            ("cross_attn_k_proj.weight", "cross_attn_v_proj.weight")
        ):
            continue  # one row; only filling reads these
        if layer in full_shape.CROSS and not tiles:
            continue
        total += full_shape.n_bytes(tensor)
    return total + (cache if tiles else 0)


# ---- the benchmark -----------------------------------------------------------------------------------------


class Loaded:
    """Somebody whose loading was timed."""

    def __init__(self, make: Callable[..., Ours | LlamaCpp], *args: Any) -> None:
        before, start = report.anonymous_memory(), time.perf_counter()
        self.who = make(*args)
        seconds = time.perf_counter() - start
        self.load = {"seconds": seconds, "own_bytes": report.anonymous_memory() - before}


# What `Contestant` runs in the process of llama.cpp: it knows functions of a module only.


def load_of(loaded: Loaded) -> dict[str, float]:
    return loaded.load


def run_there(loaded: Loaded, work: Callable[..., Any], *args: Any) -> Any:
    return work(loaded.who, *args)


class There(Contestant):
    """llama.cpp, loaded, in its process."""

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        return super().run(run_there, work, *args)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    text = full_shape.write_mllama(folder / "mllama.gguf", args.layers, vision=False)
    full_shape.write_llama(folder / "llama.gguf", text)
    ours = Loaded(Ours, folder / "mllama.gguf", args.threads, args.repack, args.mmap)

    def measure_both(extra_bufts: bool) -> dict[str, Any]:
        with There(Loaded, LlamaCpp, folder / "llama.gguf", args.threads, extra_bufts) as theirs:
            return measure(args, text, ours, theirs)

    names = {True: "llama.cpp, use_extra_bufts=True", False: "llama.cpp, use_extra_bufts=False"}
    result, deaths = first_that_lives([True, False] if args.llama_repack else [False], measure_both)
    if result is None:
        result = measure(args, text, ours, None)
    return {**result, "deaths": {names[extra_bufts]: how for extra_bufts, how in deaths}}


def measure(
    args: argparse.Namespace, text: list[full_shape.Tensor], ours: Loaded, theirs: There | None
) -> dict[str, Any]:
    """All rounds. theirs: None if llama.cpp does not live here. Raises Died."""
    assert isinstance(ours.who, Ours)
    mine = ours.who
    both: dict[str, Callable[..., Any]] = {"ours": lambda work, *more: work(mine, *more)}
    if theirs is not None:
        both["llama.cpp"] = theirs.run
    chance = np.random.default_rng(0)
    prompt, short = (chance.integers(0, TOKENS, n).tolist() for n in (args.prompt, args.context))
    for run_with in both.values():  # reads the pages in
        run_with(decode, short)
    comparison = None if theirs is None else compare(mine, theirs)
    load = {"ours": ours.load}
    if theirs is not None:
        load["llama.cpp"] = Contestant.run(theirs, load_of)

    rounds: list[dict[str, Any]] = []
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr, flush=True)
        figures: dict[str, Any] = {"bandwidth": read_bandwidth(args.threads)}
        for name in list(both) if i % 2 == 0 else list(both)[::-1]:
            figures[f"decode {name}"] = both[name](time_tokens, short, args.tokens)
        figures |= time_images(mine, short, args.tokens)
        for kind, options in CHATS.items():
            figures[f"token {kind}"], figures[f"outside {kind}"] = time_chat(mine, args.tokens, options)
        if args.prompt:
            for name in list(both) if i % 2 == 0 else list(both)[::-1]:
                figures[f"prompt {name}"] = both[name](time_prompt, prompt)
        rounds.append(figures)
    median = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    caches = {tiles: int(median[f"cache {tiles}"]) for tiles in TILES}
    return {
        "load": load,
        "bytes_per_token": {
            tiles: bytes_per_token(text, tiles, caches.get(tiles, 0)) for tiles in (0, *TILES)
        },
        "logits": comparison,
        "median": median,
        "rounds": rounds,
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    m, per_token = result["median"], result["bytes_per_token"]
    mine, theirs = result["load"]["ours"], result["load"].get("llama.cpp")
    both = [("decode, tokens/s", m["decode ours"], m.get("decode llama.cpp"), ">= 0.95")]
    if args.prompt:
        what = f"prompt of {args.prompt}, tokens/s"
        both.append((what, m["prompt ours"], m.get("prompt llama.cpp"), ">= 0.95"))
    both.append(("load, s", mine["seconds"], theirs and theirs["seconds"], ""))
    both.append(("own memory, GB", mine["own_bytes"] / 1e9, theirs and theirs["own_bytes"] / 1e9, ""))
    rows = [
        (what, f"{a:.2f}", "" if b is None else f"{b:.2f}", "" if b is None else f"{a / b:.3f}", target)
        for what, a, b, target in both
    ]
    rows += [(who, "", how, "", "") for who, how in result["deaths"].items()]
    title = f"{args.layers} layers, {args.threads} threads, medians of {args.rounds}"
    report.show(f"Without an image; {title}", ("", "ours", "llama.cpp", "ratio", "target"), rows)
    c = result["logits"]
    if c:
        print(
            f"logits differ from llama.cpp's by {c['relative_error']:.1%}, the same largest after "
            f"{c['same_largest']} of {c['prompts']} prompts"
        )
    print(f"read bandwidth {m['bandwidth'] / 1e9:.1f} GB/s")

    rows = []
    for tiles in (0, *TILES):
        rate = m[f"decode {tiles or 'ours'}"]
        rows.append((
            tiles, f"{rate:.2f}", f"{per_token[tiles] / 1e9:.2f}", f"{rate * per_token[tiles] / 1e9:.1f}",
            f"{rate * per_token[tiles] / m['bandwidth']:.0%}", f"{m[f'fill {tiles}']:.2f}" if tiles else "",
        ))  # fmt: skip
    columns = ("tiles", "tokens/s", "GB a token", "GB/s", "of bandwidth", "fill, s")
    report.show("What an image costs", columns, rows)
    one, four = TILES
    print(
        f"time of fill, one tile / four: {m[f'fill {one}'] / m[f'fill {four}']:.3f} (target <= 0.3); "
        f"of a token, four tiles / one: {m[f'decode {one}'] / m[f'decode {four}']:.3f} (target <= 1.06)"
    )
    rows = [
        (kind, f"{m[f'token {kind}'] * 1e3:.1f}", f"{m[f'outside {kind}'] * 1e3:.2f}",
         f"{m[f'outside {kind}'] / m[f'token {kind}']:.2%}")
        for kind in CHATS
    ]  # fmt: skip
    columns = ("chat", "ms a token", "ms outside C", "share")
    report.show("Python and sampling (target < 3 %)", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding at the 11B shape against llama.cpp")
    parser.add_argument("--dir", type=report.folder, help="where the files go (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=full_shape.N_LAYER)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a round")
    parser.add_argument("--context", type=int, default=64, help="tokens before them")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt; 0: none")
    parser.add_argument("--repack", action="store_true", help="as `mllama caption --repack`")
    parser.add_argument("--mmap", action=argparse.BooleanOptionalAction, default=True, help="map our file")
    parser.add_argument(
        "--llama-repack", action=argparse.BooleanOptionalAction, default=True,
        help="llama.cpp copies weights to its faster layout, as it does by itself",
    )  # fmt: skip
    parser.add_argument("--json", type=report.json_path, help="write the figures there too")
    args = parser.parse_args()
    if not 4 <= args.layers <= full_shape.N_LAYER or args.rounds < 1 or not 0 <= args.prompt < N_CTX:
        parser.error(f"--layers is 4 to 40, --rounds at least 1, --prompt 0 to {N_CTX - 1}")
    if not args.context >= 1 or not 1 <= args.tokens <= N_CTX - args.context - 2:
        parser.error(f"--context and --tokens must fit {N_CTX} tokens")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        result = run(args, Path(folder))
    show(result, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "dir")}
    report.write_json(args.json, {"about": report.about(**settings), **result})


if __name__ == "__main__":
    main()
