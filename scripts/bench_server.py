#!/usr/bin/env python3
"""What the server costs: tokens a second and the time to the first token, against the direct call.

    python scripts/bench_server.py [--model NAME|PATH] [--clients 1,8] [--tokens N] [--rounds N] [--json FILE]
    python scripts/bench_server.py --layers 5 --dir DIR     # the shape of the 11B model, its first 5 layers
    python scripts/bench_server.py --parts --clients 1      # where the time goes

The direct call is `Conversation.reply` in this process, asked for one reply after the other. The server runs
in a process of its own, as `mllama serve`, with the same threads; its clients here read streams of Ollama's
API and of OpenAI's. Every reply has exactly N tokens, greedy, to a new question.

On few cores a client takes time from the server. So the clients are bare sockets: their requests are made
before, and they only look for the first text and the end. `--client http` reads lines by http.client, as
programs in Python do. "CPU ms" is the processor time for each reply: of this process for the direct call,
else of the server alone; "of one thread": of its busiest one, which computes. The rest is the event loop's.

`--parts` adds what tells whose the time is: the direct call in a second thread, and after a rest of the
machine, as between the requests of one client; a reply that is not streamed; the processor time that the
clients take.

Every round runs all three, in another order each time: what runs first after another process is slower. The
figures are medians of the rounds; "of direct" is the median of the rounds' shares. With 8 clients the direct
call answers as many prompts one after the other, for the server computes them in that way too.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import full_shape
import psutil
import report

from mllama_gguf import LoadedModel

# A reply of this form does not end before its tokens do.
FORM = {"type": "object", "properties": {"a": {"type": "string", "minLength": 9000}}, "required": ["a"]}
COLUMNS = ("way", "clients", "tokens/s", "of direct", "first token, ms", "CPU ms", "of one thread")
REST = 0.003  # seconds
TEXT = re.compile(rb'"content":"[^"]')
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

    def rested(self, number: int) -> tuple[float, float]:
        """The same after a rest."""
        time.sleep(REST)
        return self.run(number)


class Client:
    """A reader of streams, on one connection."""

    def __init__(self, address: tuple[str, int], api: str, n_tokens: int) -> None:
        self.address = address
        self.api = api
        self.n_tokens = n_tokens

    def request(self, number: int) -> tuple[str, bytes]:
        """A path and a body."""
        message = {"role": "user", "content": PROMPT.format(number)}
        body: dict[str, Any] = {"model": "bench", "messages": [message], "stream": self.api != "whole"}
        if self.api != "openai":
            path, body = "/api/chat", body | {"format": FORM}
            # Ollama's own default of 1.1 would be work that the direct call does not have.
            body["options"] = {"temperature": 0, "num_predict": self.n_tokens, "repeat_penalty": 1}
        else:
            path = "/v1/chat/completions"
            form = {"type": "json_schema", "json_schema": {"schema": FORM}}
            body |= {"temperature": 0, "max_tokens": self.n_tokens, "response_format": form}
        return path, json.dumps(body).encode()


class HttpClient(Client):
    """Reads lines by http.client."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.connection = http.client.HTTPConnection(*self.address)

    def run(self, number: int) -> tuple[float, float]:
        """Seconds to the first text, and in all."""
        path, data = self.request(number)
        start = time.perf_counter()
        self.connection.request("POST", path, data)
        answer = self.connection.getresponse()
        assert answer.status == 200, answer.read()
        first, last = None, b""
        while line := answer.readline():
            if first is None and TEXT.search(line):
                first = time.perf_counter() - start
            last = line if b"eval_count" in line else last
        assert first is not None
        if self.api == "ollama":
            assert json.loads(last)["eval_count"] == self.n_tokens
        return first, time.perf_counter() - start


class SocketClient(Client):
    """Reads bytes: of HTTP it knows only how the last chunk ends."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.socket = socket.create_connection(self.address)

    def run(self, number: int) -> tuple[float, float]:
        """Seconds to the first text, and in all."""
        path, data = self.request(number)
        head = f"POST {path} HTTP/1.1\r\nHost: {self.address[0]}\r\nContent-Length: {len(data)}\r\n\r\n"
        request = head.encode() + data
        first, got = None, b""
        start = time.perf_counter()
        self.socket.sendall(request)
        while not got.endswith(b"}" if self.api == "whole" else b"\r\n0\r\n\r\n"):
            more = self.socket.recv(1 << 16)
            assert more, got
            got += more
            if first is None and TEXT.search(got):
                first = time.perf_counter() - start
        seconds = time.perf_counter() - start
        assert first is not None and got.startswith(b"HTTP/1.1 200"), got
        if self.api != "openai":
            assert b'"eval_count":%d,' % self.n_tokens in got
        return first, seconds


CLIENTS: dict[str, Callable[..., Any]] = {"socket": SocketClient, "http": HttpClient}


@contextmanager
def server(model: str, threads: int | None) -> Iterator[tuple[tuple[str, int], psutil.Process]]:
    """The address of a server, and its process."""
    command = [sys.executable, "-m", "mllama_gguf", "serve", "-m", f"bench={model}", "--port", "0"]
    command += ["--no-cache", *([] if threads is None else ["-t", str(threads)])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        try:
            host, port = line.split()[2].removeprefix("http://").split(":")
            yield (host, int(port)), psutil.Process(child.pid)
        finally:
            child.terminate()


def thread_seconds(process: psutil.Process) -> dict[int, float]:
    """The processor time of each thread. Linux counts nanoseconds, others steps of 10 ms."""
    tasks = Path(f"/proc/{process.pid}/task")
    try:
        texts = {int(one.name): (one / "schedstat").read_text() for one in tasks.iterdir()}
        return {number: int(text.split()[0]) / 1e9 for number, text in texts.items()}
    except OSError:
        return {one.id: one.user_time + one.system_time for one in process.threads()}


def measure(
    runs: Callable[[int], list[tuple[float, float]]],
    start: int,
    n_tokens: int,
    process: psutil.Process,
    *,
    one_by_one: bool,
) -> tuple[float, ...]:
    """Tokens a second of all replies together; the median time to the first text; for each reply the seconds
    of processors that a process takes, those of its busiest thread, and those of this process.

    one_by_one: the time between replies does not count
    """
    own, before, began = time.process_time(), thread_seconds(process), time.perf_counter()
    found = runs(start)
    seconds, after = time.perf_counter() - began, thread_seconds(process)
    own = time.process_time() - own
    if one_by_one:
        seconds = sum(one for _, one in found)
    taken = [n - before.get(thread, 0.0) for thread, n in after.items()]
    cpu = [one / len(found) for one in (sum(taken), max(taken), own)]
    return len(found) * n_tokens / seconds, statistics.median(first for first, _ in found), *cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--layers", type=int, help="the shape of the 11B model, its first LAYERS layers")
    parser.add_argument("--dir", type=report.folder, help="where the file of --layers is made")
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--replies", type=int, default=1, help="replies of one client in a round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--client", choices=CLIENTS, default="socket", help="see above")
    parser.add_argument("--parts", action="store_true", help="see above")
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
        {
            "about": report.about(**settings, client=args.client),
            "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
        },
    )


def compare(model: str, args: Any) -> list[tuple[Any, ...]]:
    direct = Direct(model, args.threads, args.tokens)
    direct.run(0)
    rows: list[tuple[Any, ...]] = []
    number = 1
    with server(model, args.threads) as (address, process), ThreadPoolExecutor(1) as second:
        for n_clients in map(int, args.clients.split(",")):
            n_replies = args.replies if n_clients == 1 else 1

            def straight(start: int, run: Any = direct.run, n: int = n_clients * n_replies) -> list[Any]:
                return [run(start + i) for i in range(n)]

            def in_thread(start: int, straight: Any = straight) -> list[Any]:
                return second.submit(straight, start).result()

            def by(api: str, n: int = n_clients, each: int = n_replies) -> Any:
                clients = [CLIENTS[args.client](address, api, args.tokens) for _ in range(n)]
                for client in clients:
                    client.run(0)

                def one(i: int, start: int) -> list[tuple[float, float]]:
                    return [clients[i].run(start + i * each + k) for k in range(each)]

                def together(start: int) -> list[tuple[float, float]]:
                    with ThreadPoolExecutor(n) as pool:
                        return [run for runs in pool.map(one, range(n), [start] * n) for run in runs]

                return together

            ways = {"direct": straight, "Ollama's API": by("ollama"), "OpenAI's API": by("openai")}
            if args.parts:
                ways["direct, second thread"] = in_thread
                ways["direct, after a rest"] = partial(straight, run=direct.rested)
                ways["Ollama's API, whole"] = by("whole")
            orders = list(itertools.permutations(ways))
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
            for turn in range(args.rounds):
                for name in orders[turn * (len(orders) // args.rounds or 1) % len(orders)]:
                    is_direct = name.startswith("direct")
                    one_by_one = is_direct or n_clients == 1
                    computes = psutil.Process() if is_direct else process
                    figures = measure(ways[name], number, args.tokens, computes, one_by_one=one_by_one)
                    found[name].append(figures)
                    number += 100
            base = [speed for speed, *_ in found["direct"]]
            for name, rounds in found.items():
                speed, first, *cpu, own = map(statistics.median, zip(*rounds, strict=True))
                share = statistics.median(a[0] / b for a, b in zip(rounds, base, strict=True))
                times = [f"{seconds * 1e3:.1f}" for seconds in (first, *cpu)]
                rows.append((name, n_clients, f"{speed:.1f}", f"{share:.3f}", *times))
                if args.parts and name == "Ollama's API":
                    rows.append(("its clients", n_clients, "", "", "", f"{own * 1e3:.1f}", ""))
    return rows


if __name__ == "__main__":
    os.environ.setdefault("MLLAMA_IMAGE_CACHE_SIZE", "0")
    main()
