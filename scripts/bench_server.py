#!/usr/bin/env python3
"""What the server costs: tokens a second and the time to the first token, against the direct call.

    python scripts/bench_server.py [--model NAME|PATH] [--clients 1,8] [--tokens N] [--rounds N] [--json FILE]
    python scripts/bench_server.py --layers 5 --dir DIR     # the shape of the 11B model, its first 5 layers

The direct call is `Conversation.reply` in this process, asked for one reply after the other. The server runs
in a process of its own, as `mllama serve`, with the same threads; its clients here read streams of Ollama's
API and of OpenAI's. Every reply has exactly N tokens, greedy, to a new question.

Every round runs all three, in turns. The figures are medians of the rounds. With 8 clients the direct call
answers as many prompts one after the other, for the server computes them in that way too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import full_shape
import report

from mllama_gguf import LoadedModel

# A reply of this form does not end before its tokens do.
FORM = {"type": "object", "properties": {"a": {"type": "string", "minLength": 9000}}, "required": ["a"]}
COLUMNS = ("way", "clients", "tokens/s", "of direct", "first token, ms")
PROMPT = "Question {}: what is in this picture?"


class Direct:
    """The direct call."""

    def __init__(self, model: str, threads: int | None, n_tokens: int) -> None:
        self.model = LoadedModel.from_pretrained(model, n_threads=threads, image_cache=False)
        self.conversation = self.model.conversation()
        self.n_tokens = n_tokens

    def run(self, number: int) -> tuple[float, float]:
        """Seconds to the first text, and in all."""
        start = time.perf_counter()
        reply = self.conversation.reply(
            [{"role": "user", "content": PROMPT.format(number)}],
            max_tokens=self.n_tokens,
            response_format={"type": "json_schema", "json_schema": {"schema": FORM}},
        )
        next(reply)
        first = time.perf_counter() - start
        reply.read()
        assert reply.stats.completion_tokens == self.n_tokens
        return first, time.perf_counter() - start


class Client:
    """A reader of streams, on one connection."""

    def __init__(self, address: tuple[str, int], api: str, n_tokens: int) -> None:
        self.connection = http.client.HTTPConnection(*address)
        self.api = api
        self.n_tokens = n_tokens

    def run(self, number: int) -> tuple[float, float]:
        message = {"role": "user", "content": PROMPT.format(number)}
        body: dict[str, Any] = {"model": "bench", "messages": [message], "stream": True}
        if self.api == "ollama":
            path, body = "/api/chat", body | {"format": FORM}
            # Ollama's own default of 1.1 would be work that the direct call does not have.
            body["options"] = {"temperature": 0, "num_predict": self.n_tokens, "repeat_penalty": 1}
        else:
            path = "/v1/chat/completions"
            form = {"type": "json_schema", "json_schema": {"schema": FORM}}
            body |= {"temperature": 0, "max_tokens": self.n_tokens, "response_format": form}
        data = json.dumps(body)
        start = time.perf_counter()
        self.connection.request("POST", path, data)
        answer = self.connection.getresponse()
        assert answer.status == 200, answer.read()
        first, last = None, b""
        while line := answer.readline():
            if first is None and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - start
            last = line if b"eval_count" in line else last
        assert first is not None
        if self.api == "ollama":
            assert json.loads(last)["eval_count"] == self.n_tokens
        return first, time.perf_counter() - start


@contextmanager
def server(model: str, threads: int | None) -> Iterator[tuple[str, int]]:
    """The address of a server."""
    command = [sys.executable, "-m", "mllama_gguf", "serve", "-m", f"bench={model}", "--port", "0"]
    command += ["--no-cache", *([] if threads is None else ["-t", str(threads)])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        try:
            host, port = line.split()[2].removeprefix("http://").split(":")
            yield host, int(port)
        finally:
            child.terminate()


def measure(
    runs: Callable[[int], list[tuple[float, float]]], start: int, n_tokens: int
) -> tuple[float, float]:
    """Tokens a second of all replies together, and the median time to the first text."""
    began = time.perf_counter()
    found = runs(start)
    seconds = time.perf_counter() - began
    return len(found) * n_tokens / seconds, statistics.median(first for first, _ in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--layers", type=int, help="the shape of the 11B model, its first LAYERS layers")
    parser.add_argument("--dir", type=report.folder, help="where the file of --layers is made")
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--replies", type=int, default=1, help="replies of one client in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=report.json_path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        model = args.model
        if args.layers:
            model = str(Path(folder) / f"{args.layers}.gguf")
            full_shape.write_mllama(Path(model), args.layers, vision=False)
        rows = compare(model, args)
    report.show(f"{args.tokens} tokens a reply, medians of {args.rounds} rounds", COLUMNS, rows)
    settings = {"model": args.model, "layers": args.layers, "tokens": args.tokens, "threads": args.threads}
    report.write_json(
        args.json,
        {"about": report.about(**settings), "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows]},
    )


def compare(model: str, args: Any) -> list[tuple[Any, ...]]:
    direct = Direct(model, args.threads, args.tokens)
    direct.run(0)
    rows: list[tuple[Any, ...]] = []
    number = 1
    with server(model, args.threads) as address:
        for n_clients in map(int, args.clients.split(",")):
            n_replies = args.replies if n_clients == 1 else 1

            def straight(start: int, n: int = n_clients * n_replies) -> list[tuple[float, float]]:
                return [direct.run(start + i) for i in range(n)]

            def by(api: str, n: int = n_clients, each: int = n_replies) -> Any:
                clients = [Client(address, api, args.tokens) for _ in range(n)]
                for client in clients:
                    client.run(0)

                def one(i: int, start: int) -> list[tuple[float, float]]:
                    return [clients[i].run(start + i * each + k) for k in range(each)]

                def together(start: int) -> list[tuple[float, float]]:
                    with ThreadPoolExecutor(n) as pool:
                        return [run for runs in pool.map(one, range(n), [start] * n) for run in runs]

                return together

            ways = {"direct": straight, "Ollama's API": by("ollama"), "OpenAI's API": by("openai")}
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for turn in range(args.rounds):
                names = list(ways) if turn % 2 == 0 else list(ways)[::-1]
                for name in names:
                    found[name].append(measure(ways[name], number, args.tokens))
                    number += 100
            base = statistics.median(speed for speed, _ in found["direct"])
            for name, figures in found.items():
                speed = statistics.median(speed for speed, _ in figures)
                first = statistics.median(first for _, first in figures)
                rows.append((name, n_clients, f"{speed:.1f}", f"{speed / base:.3f}", f"{first * 1e3:.1f}"))
    return rows


if __name__ == "__main__":
    os.environ.setdefault("MLLAMA_IMAGE_CACHE_SIZE", "0")
    main()
