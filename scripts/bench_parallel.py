#!/usr/bin/env python3
"""Several conversations that compute together, against the same ones, one after the other.

    python scripts/bench_parallel.py --dir DIR [--layers N] [--threads N] [--rounds N] [--json FILE]

The text model has the shape of the 11B model, with random weights, Q4_K_M (full_shape.py); --layers N keeps
the first N of its 40 layers. Each conversation appends --tokens tokens to a prompt of --context tokens:
without an image, with an image of its own (one tile, four tiles), or all of them about one image of four
tiles.

Three ways, in turns; the figures are medians of the rounds, in tokens a second of all conversations:

    alone      one conversation after the other, each with a context's own decode
    steps      decode_many: one call for a token of each
    threads    a thread for each conversation and the scheduler

Without an image also llama.cpp's batched decoding of a model with the same bytes a token: its file lacks the
cross-attention layers, which such conversations skip.

A newcomer: the time until a prompt of --context tokens has its first logits, while the others decode,
relative to the time it takes alone. Newcomers come at different moments of a step, evenly spread.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import full_shape
import numpy as np
import report

from mllama_gguf import LoadedModel, ModelError
from mllama_gguf.backend.base import Item
from mllama_gguf.backend.library import load as load_native
from mllama_gguf.decode.scheduler import Scheduler

KINDS = {"no image": 0, "one tile each": 1, "four tiles each": 4, "one image for all": -4}
COUNTS = (4, 8)
N_CTX = 1024
NEWCOMERS = 5  # in a round
WATCHED = 0.5  # seconds, of the others before a newcomer comes


class Bench:
    """The model, a scheduler, and the slots of images."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = LoadedModel(path, n_ctx=N_CTX, n_threads=threads, image_cache=False)
        self.scheduler: Scheduler = self.model.scheduler(n_threads=threads)
        self.context = self.scheduler.context
        self._slots: dict[tuple[int, int], int] = {}
        self.numbers = [self.context.sequence_new(N_CTX) for _ in range(max(COUNTS))]

    def slots(self, kind: int, n: int) -> list[int]:
        """The slot of each of n conversations; -1: no image."""
        if kind == 0:
            return [-1] * n
        return [self._slot(abs(kind), i if kind > 0 else 0) for i in range(n)]

    def _slot(self, tiles: int, which: int) -> int:
        if (tiles, which) not in self._slots:
            h = self.model.hparams
            shape = (tiles, h.n_positions, h.n_embd)
            states = np.random.default_rng(which).standard_normal(shape, np.float32)
            self._slots[tiles, which] = self.context.image_fill([states])
        return self._slots[tiles, which]

    def prepare(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Every conversation holds its prompt."""
        for number, slot, prompt in zip(self.numbers, slots, prompts, strict=False):
            self.context.sequence_truncate(number, 0)
            self.step([(number, slot, prompt)])

    def rewind(self, n: int) -> None:
        """Every conversation holds its first n tokens."""
        for number in self.numbers:
            if self.context.sequence_n_past(number) > n:
                self.context.sequence_truncate(number, n)

    def step(self, items: Sequence[tuple[int, int, list[int]]]) -> list[int]:
        """The likeliest next token of each."""
        results = self.context.decode_many(
            [Item(n, tokens, slot, int(slot >= 0)) for n, slot, tokens in items]
        )
        tokens = []
        for rows in results:
            assert not isinstance(rows, ModelError)
            tokens.append(int(rows[-1].argmax()))
        return tokens

    def alone(self, slots: Sequence[int], n_tokens: int) -> float:
        """Tokens a second, one conversation after the other."""
        start = time.perf_counter()
        for number, slot in zip(self.numbers, slots, strict=False):
            token = 5
            for _ in range(n_tokens):
                (token,) = self.step([(number, slot, [token])])
        return len(slots) * n_tokens / (time.perf_counter() - start)

    def steps(self, slots: Sequence[int], n_tokens: int) -> float:
        """Tokens a second, one call for a token of each."""
        start = time.perf_counter()
        tokens = [5] * len(slots)
        for _ in range(n_tokens):
            tokens = self.step([(n, s, [t]) for n, s, t in zip(self.numbers, slots, tokens, strict=False)])
        return len(slots) * n_tokens / (time.perf_counter() - start)

    def threads(self, slots: Sequence[int], n_tokens: int) -> float:
        """Tokens a second, a thread for each."""

        def talk(number: int, slot: int) -> None:
            token = 5
            for _ in range(n_tokens):
                rows = self.scheduler.decode(number, [token], slot, int(slot >= 0), "last", bool)
                token = int(rows[-1].argmax())

        talks = [
            threading.Thread(target=talk, args=(n, s)) for n, s in zip(self.numbers, slots, strict=False)
        ]
        start = time.perf_counter()
        for one in talks:
            one.start()
        for one in talks:
            one.join()
        return len(slots) * n_tokens / (time.perf_counter() - start)

    def newcomer(self, prompt: list[int], n_others: int, moment: float) -> float:
        """Seconds until the first logits of a prompt, while others decode.

        moment: when it comes, 0 to 1: from the beginning to the end of a step of the others"""
        end = threading.Event()

        def talk(number: int) -> None:
            token = 5
            while not end.is_set():
                rows = self.scheduler.decode(number, [token], -1, 0, "last", bool)
                token = int(rows[-1].argmax())
                if self.context.sequence_n_past(number) > N_CTX - 2:
                    return

        talks = [threading.Thread(target=talk, args=(n,)) for n in self.numbers[1 : 1 + n_others]]
        for one in talks:
            one.start()
        if talks:
            n_steps = self.scheduler.n_steps
            time.sleep(WATCHED)
            step = WATCHED / max(self.scheduler.n_steps - n_steps, 1)
            self._empty_first()  # ends as a step begins
            time.sleep(moment * step)
        else:
            self.context.sequence_truncate(self.numbers[0], 0)
        start = time.perf_counter()
        self.scheduler.decode(self.numbers[0], prompt, -1, 0, "last", bool)
        seconds = time.perf_counter() - start
        end.set()
        for one in talks:
            one.join()
        return seconds

    def _empty_first(self) -> None:
        with self.scheduler.exclusive(bool) as context:
            context.sequence_truncate(self.numbers[0], 0)


class LlamaCpp:
    """llama.cpp's batched decoding, by its C interface: a sequence for each conversation."""

    def __init__(self, path: Path, threads: int, prompts: Sequence[list[int]]) -> None:
        from llama_cpp import llama_cpp as llama

        load_native()  # its log goes where ours goes
        self._llama = llama
        self._n_prompt = len(prompts[0])
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}")
        settings = llama.llama_context_default_params()
        settings.n_seq_max = len(prompts)
        settings.n_ctx = N_CTX * len(prompts)
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama.llama_init_from_model(self._model, settings)
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(max(len(prompts), self._n_prompt), 0, 1)
        for sequence, prompt in enumerate(prompts):
            self._decode([(sequence, i, token) for i, token in enumerate(prompt)], n_last=1)

    def steps(self, n: int, n_tokens: int) -> float:
        """Tokens a second of the first n conversations."""
        memory = self._llama.llama_get_memory(self._context)
        for sequence in range(n):
            self._llama.llama_memory_seq_rm(memory, sequence, self._n_prompt, -1)
        tokens = [5] * n
        start = time.perf_counter()
        for i in range(n_tokens):
            tokens = self._decode([(s, self._n_prompt + i, token) for s, token in enumerate(tokens)])
        return n * n_tokens / (time.perf_counter() - start)

    def _decode(self, columns: Sequence[tuple[int, int, int]], n_last: int | None = None) -> list[int]:
        """The likeliest token after each (sequence, position, token), or after the last ones."""
        batch, first = self._batch, 0 if n_last is None else len(columns) - n_last
        batch.n_tokens = len(columns)
        for i, (sequence, position, token) in enumerate(columns):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, int(i >= first)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if self._llama.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama_decode failed")
        found = []
        for i in range(first, len(columns)):
            logits = self._llama.llama_get_logits_ith(self._context, i)
            floats = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
            found.append(int(np.ctypeslib.as_array(floats, (self._n_vocab,)).argmax()))
        return found


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path, llama_path = folder / "mllama.gguf", folder / "llama.gguf"
    text = full_shape.write_mllama(path, args.layers, vision=False)
    full_shape.write_llama(llama_path, text)
    bench = Bench(path, args.threads)
    chance = np.random.default_rng(0)
    prompts = [chance.integers(0, 128000, args.context).tolist() for _ in bench.numbers]
    llama = LlamaCpp(llama_path, args.threads, prompts)
    rounds: list[dict[str, float]] = []
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr, flush=True)
        figures: dict[str, float] = {}
        for name, kind in KINDS.items():
            bench.prepare(bench.slots(kind, len(bench.numbers)), prompts)
            for n in COUNTS:
                slots = bench.slots(kind, n)
                ways = [("alone", bench.alone), ("steps", bench.steps), ("threads", bench.threads)]
                if kind == 0:
                    ways.append(("llama.cpp", lambda s, n_tokens: llama.steps(len(s), n_tokens)))
                for way, measure in ways if i % 2 == 0 else ways[::-1]:
                    bench.rewind(args.context)
                    figures[f"{name}, {n}: {way}"] = measure(slots, args.tokens)
        bench.prepare(bench.slots(0, len(bench.numbers)), prompts)
        for words, n in (("newcomer alone", 0), ("newcomer among 7", len(bench.numbers) - 1)):
            seconds = []
            for which in range(NEWCOMERS):
                bench.rewind(args.context)
                seconds.append(bench.newcomer(prompts[0], n, (which + 0.5) / NEWCOMERS))
            figures[words] = statistics.median(seconds)
        rounds.append(figures)
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {"median": median, "rounds": rounds}


def show(result: dict[str, Any]) -> None:
    m = result["median"]
    rows = []
    for name in KINDS:
        for n in COUNTS:
            alone, steps, threads = (m[f"{name}, {n}: {way}"] for way in ("alone", "steps", "threads"))
            ratios = (f"{steps / alone:.2f}", f"{threads / alone:.2f}")
            rows.append((f"{name}, {n}", f"{alone:.1f}", f"{steps:.1f}", f"{threads:.1f}", *ratios))
    columns = ("conversations", "alone", "steps", "threads", "steps/alone", "threads/alone")
    report.show("Tokens a second of all conversations", columns, rows)
    name = next(iter(KINDS))
    for n in COUNTS:
        steps, other = m[f"{name}, {n}: steps"], m[f"{name}, {n}: llama.cpp"]
        print(f"{n} without an image: llama.cpp {other:.1f} a second, steps/llama.cpp {steps / other:.2f}")
    alone, among = m["newcomer alone"], m["newcomer among 7"]
    print(f"first logits of a newcomer: {alone:.3f} s alone, {among:.3f} s among seven, {among / alone:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--dir", metavar="DIR", type=report.folder, help="where the model files go (default: /tmp)"
    )
    parser.add_argument("--layers", type=int, default=full_shape.N_LAYER, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="appended to each conversation")
    parser.add_argument("--context", type=int, default=30, metavar="N", help="tokens of a prompt")
    parser.add_argument("--json", type=report.json_path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        result = run(args, Path(folder))
    show(result)
    report.write_json(args.json, {"about": report.about(**vars(args)), **result})


if __name__ == "__main__":
    main()
