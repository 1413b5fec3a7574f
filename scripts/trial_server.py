#!/usr/bin/env python3
"""A process of `mllama serve` under hostile requests, and under many clients of which some go away.

    python scripts/trial_server.py fuzz [--seconds N] [--seed N]
    python scripts/trial_server.py load [--requests N] [--clients N]

`fuzz` sends odd bodies, methods, heads and bytes to every route, with hypothesis, which prints the smallest
request that fails. No answer may have another status 5xx than those that the documentation names, be late, be
other than the API's form, or tell addresses of memory or folders. `load` sends requests of clients, some of
which leave before the answer. After both, the server must answer as before, hold no more memory, threads or
files than before, and end with exit code 0 after SIGTERM. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LIMIT = 4  # seconds of a request, by the server's own rule
LATE = 30.0  # seconds; the machine may be busy
GROWTH = 80 << 20  # bytes that the process may gain after the first part
DOCUMENTED = {501, 503, 504}
LEAK = re.compile(r"0x[0-9a-fA-F]{6,}|Traceback|internal error|/site-packages/|/mllama_gguf/")


class Serving:
    """A server that is a process of its own."""

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.url = url
        self.process = process
        self.client = httpx.Client(base_url=url, timeout=LATE)

    def caption(self) -> str:
        """What the model says about an image, always the same."""
        body = {"model": "demo", "messages": [_question()], "stream": False, "options": {"temperature": 0}}
        answer = self.client.post("/api/chat", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["message"]["content"])

    def metric(self, line: str) -> float:
        """The value of a line of /metrics; 0 if it is not there."""
        text = self.client.get("/metrics").text
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_idle(self) -> None:
        """Nothing runs and nothing waits, soon."""
        end = time.monotonic() + LATE
        while self.metric("mllama_requests_processing") or self.metric("mllama_requests_queued"):
            assert time.monotonic() < end, "a request is stuck"
            time.sleep(0.02)

    def holds(self) -> dict[str, int]:
        """What the process holds: bytes of memory, threads, open files."""
        self.wait_idle()
        memory = self.process.memory_info().rss
        return {"bytes": memory, "threads": self.process.num_threads(), "files": self.process.num_fds()}


@contextmanager
def serving() -> Iterator[Serving]:
    """`mllama serve` with the demo model under two names. SIGTERM must end it well."""
    command = [sys.executable, "-m", "mllama_gguf", "serve", "--port", "0", "--no-cache", "-t", "1"]
    command += ["-m", "demo", "-m", "other=demo", "--request-timeout", str(LIMIT), "--max-queue", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            assert line.startswith("Serving at "), line
            yield Serving(line.split()[2], psutil.Process(child.pid))
            child.terminate()
            code = child.wait(LATE)
            assert code == 0, f"the exit code after SIGTERM is {code}"
        finally:
            if child.poll() is None:
                child.kill()


def check_unchanged(one: Serving, text: str, before: dict[str, int]) -> None:
    """It answers as before, and holds no more than before. Raises AssertionError."""
    one.wait_idle()
    assert one.client.get("/health").json() == {"status": "ok"}
    assert one.caption() == text, "another answer than before"
    after = one.holds()
    print("before", before, "after", after)
    assert after["bytes"] - before["bytes"] < GROWTH, "memory grows"
    assert after["threads"] - before["threads"] < 30, "threads stay"
    assert after["files"] - before["files"] < 20, "files stay open"


# ---- hostile requests --------------------------------------------------------------------------------------

IMAGE = base64.b64encode((EXAMPLES / "apple.png").read_bytes()).decode()
# What clients send, and what they should not.
IMAGES = [
    IMAGE,
    IMAGE[:200],
    IMAGE[:-1],
    "data:image/png;base64," + IMAGE,
    "data:,",
    "AAAA",
    "",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/a.png",
    base64.b64encode(b"GIF89a" + bytes(40)).decode(),
    base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(40)).decode(),
    "\x00",
    "é",
    "\ud800",
    "=" * 9,
    7,
    None,
]
FORMS = [
    "json",
    "",
    "yaml",
    {},
    {"type": "object"},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    {"enum": ["a", "b"]},
    {"type": "string", "pattern": "[a-z]{2}"},
    {"type": "string", "pattern": "(("},
    {"type": "string", "maxLength": 1 << 20},
    {"$ref": "#"},
    {"anyOf": []},
    {"type": "odd"},
    {"enum": []},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"type": "number", "minimum": 1e308, "maximum": -1e308},
    {"const": "\ud800"},
    True,
    [],
    3,
]
NUMBERS = [
    0,
    1,
    -1,
    0.5,
    2,
    8192.0,
    1e308,
    -1e308,
    1 << 31,
    -(1 << 63),
    1 << 64,
    10**400,
    1e-320,
    True,
    None,
    "1",
]
WORDS = [
    "",
    "x",
    "Describe this image.",
    "[img]",
    "[img-0] [img-7]",
    "<|image|>",
    "<|eot_id|>",
    "\x00",
    "\ud800",
    "é\u202e🍎",
    "word " * 300,
    "user",
    "system",
    "assistant",
    "tool",
    "demo",
    "other:latest",
    "../demo",
    "5m",
    "-1",
    "0",
    "auto",
    "none",
    "required",
    "json_object",
    "json_schema",
    "text",
    "image_url",
]

junk = st.recursive(
    st.sampled_from([None, True, *WORDS, *NUMBERS])
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
number = st.sampled_from([0, 1, 1, 0.5, 1.0] * 12 + NUMBERS)
word = st.sampled_from(WORDS)
image = st.sampled_from([IMAGE] * 60 + IMAGES)
form = st.sampled_from(FORMS) | st.sampled_from(FORMS) | junk


def mostly(usual: st.SearchStrategy[Any], n: int = 40) -> st.SearchStrategy[Any]:
    """A value that a client sends, and once in n anything."""
    return st.integers(0, n - 1).flatmap(lambda i: junk if i == 0 else usual)


def body(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[Any]:
    """An object with fields; each may be of an odd kind, one may be missing, others may be there."""
    fields = {name: mostly(value) for name, value in required.items()}
    some = {name: mostly(value, 12) for name, value in optional.items()}
    return mostly(st.fixed_dictionaries(fields, optional=some), 40)


OLLAMA_NUMBERS = ["temperature", "top_k", "top_p", "min_p", "seed", "num_ctx", "num_gpu", "max_tiles"]
options = body(
    {"num_predict": st.integers(1, 6)},
    dict.fromkeys(OLLAMA_NUMBERS, number) | {"stop": st.lists(word, max_size=3) | word, "num_thread": number},
)
role = st.sampled_from(["user", "user", "user", "system", "assistant", "tool", "User"])
ollama_message = body(
    {"role": role, "content": word},
    {
        "images": st.lists(image, max_size=3),
        "tool_calls": junk,
        "thinking": word,
        "tool_name": word,
        "options": junk,
    },
)
model = st.sampled_from(
    ["demo", "demo", "demo", "demo", "DEMO:latest", "other", "nobody", "../demo", "demo\x00", ""]
)
of_both = {
    "stream": st.booleans(),
    "format": form,
    "keep_alive": st.sampled_from(["5m", "-1", 0, -1, "0s", "1h30m", "x", 1e300]),
    "think": st.sampled_from([False, True, "low"]),
    "logprobs": st.booleans(),
    "top_logprobs": number,
}
part = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, mostly(word)),
    st.builds(
        lambda p, d: {"type": "image_url", "image_url": {"url": p, "detail": d}},
        mostly(image),
        st.sampled_from(["auto", "low", "high", 3]),
    ),
    st.builds(lambda p: {"type": "input_image", "image_url": p}, mostly(image)),
    st.builds(lambda t: {"type": "input_text", "text": t}, mostly(word)),
    junk,
)
content = word | st.lists(part, max_size=3)
tool = body(
    {"type": st.just("function")},
    {"function": body({"name": word}, {"parameters": form, "description": word, "strict": st.booleans()})},
)
call = body(
    {"id": word, "type": st.just("function"), "function": body({"name": word, "arguments": word}, {})}, {}
)
openai_message = body(
    {"role": role | st.just("developer"), "content": content},
    {"tool_calls": st.lists(call, max_size=2), "tool_call_id": word, "name": word, "refusal": word},
)
response_format = st.one_of(
    st.builds(
        lambda s: {"type": "json_schema", "json_schema": {"name": "x", "schema": s, "strict": True}}, form
    ),
    st.builds(lambda t, s: {"type": t, "schema": s}, mostly(word), form),
    junk,
)
OPENAI_NUMBERS = ["temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p"]
sampling = dict.fromkeys([*OPENAI_NUMBERS, "max_completion_tokens", "repeat_penalty", "max_tiles"], number)
openai_more = {
    **sampling,
    "stream": st.booleans(),
    "stop": word | st.lists(word, max_size=5),
    "n": st.sampled_from([1, 2, 9, 0]),
    "response_format": response_format,
    "logprobs": st.booleans(),
    "top_logprobs": number,
    "stream_options": st.just({"include_usage": True}),
    "logit_bias": st.dictionaries(word | st.just("5"), number, max_size=2),
    "tools": st.lists(tool, max_size=2),
    "tool_choice": word,
    "user": word,
    "grammar": word,
    "regex": word,
}
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/api/chat": body(
        {"model": model, "messages": st.lists(ollama_message, max_size=4), "options": options},
        {**of_both, "tools": st.lists(tool, max_size=1), "truncate": st.booleans(), "shift": st.booleans()},
    ),
    "/api/generate": body(
        {"model": model, "prompt": word, "options": options},
        {
            **of_both,
            "images": st.lists(image, max_size=3),
            "system": word,
            "raw": st.booleans(),
            "suffix": word,
            "template": word,
            "context": st.lists(
                st.sampled_from([5, 7, 400, 511, 128256, 0, 1 << 31, (1 << 32) - 1, -1, 1.5]), max_size=12
            ),
        },
    ),
    "/api/show": body({"model": model}, {"name": model, "verbose": st.booleans()}),
    "/api/pull": body(
        {"model": st.sampled_from(["demo", "nobody", "../x", "http://127.0.0.1:9/x"])},
        {"stream": st.booleans(), "insecure": st.booleans()},
    ),
    "/v1/chat/completions": body(
        {"model": model, "messages": st.lists(openai_message, max_size=4), "max_tokens": st.integers(1, 6)},
        openai_more,
    ),
    "/v1/completions": body(
        {"model": model, "prompt": word, "max_tokens": st.integers(1, 6)},
        {**openai_more, "echo": st.booleans()},
    ),
    "/v1/responses": body(
        {
            "model": model,
            "max_output_tokens": st.integers(1, 6),
            "input": word
            | st.lists(
                body(
                    {"role": role, "content": content},
                    {"type": st.just("message"), "id": word, "status": word},
                ),
                max_size=3,
            ),
        },
        {
            "instructions": word,
            "stream": st.booleans(),
            "text": body({}, {"format": response_format}),
            "temperature": number,
            "top_p": number,
            "store": st.booleans(),
            "tools": st.lists(tool, max_size=1),
            "previous_response_id": word,
        },
    ),
}
GETS = [
    "/",
    "/api/tags",
    "/api/ps",
    "/api/version",
    "/api/status",
    "/health",
    "/v1/models",
    "/v1/models/demo",
    "/v1/models/..%2f",
    "/ui",
]
OTHERS = [
    "/api/embed",
    "/api/embeddings",
    "/api/create",
    "/api/copy",
    "/api/push",
    "/api/delete",
    "/api/me",
    "/api/blobs/sha256:0",
    "/v1/embeddings",
    "/v1/responses/x",
    "/ui/../x",
    "/%2e%2e/x",
    "/api/chat/",
    "/\u00e9",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]

Sent = tuple[str, str, bytes, dict[str, str]]
as_json: st.SearchStrategy[Sent] = st.sampled_from(sorted(BODIES)).flatmap(
    lambda path: BODIES[path].map(lambda value: ("POST", path, json.dumps(value).encode(), {}))
)
HEADS = [
    {},
    {"Host": "evil.example"},
    {"Origin": "http://evil.example"},
    {"Content-Type": "text/plain"},
    {"Content-Encoding": "gzip"},
    {"Origin": "http://localhost:3000"},
    {"Accept": "text/html"},
    {"Authorization": "Bearer \xff"},
    {"Content-Type": "\xff"},
    {"Accept-Encoding": "zstd"},
    {"X-Forwarded-For": "1.2.3.4"},
    {"Connection": "close"},
    {"Range": "bytes=0-"},
]
other: st.SearchStrategy[Sent] = st.tuples(
    st.sampled_from(METHODS),
    st.sampled_from([*BODIES, *GETS, *OTHERS]),
    st.binary(max_size=40)
    | st.sampled_from(
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"{}",
            b'{"model": 5}',
            b"[" * 5000,
            b'{"a":' * 200,
            b"\xff\xfe{}",
            b'{"model":"demo","model":"nobody"}',
            b"1" * 5000,
            b'{"a": NaN}',
        ]
    ),
    st.sampled_from(HEADS),
)
request = st.integers(0, 5).flatmap(lambda i: other if i == 0 else as_json)


def check(answer: httpx.Response, path: str) -> None:
    """An answer of the documented kind. Raises AssertionError."""
    status, text = answer.status_code, answer.text
    assert status < 500 or status in DOCUMENTED, f"{status}: {text[:300]}"
    assert answer.request.method == "HEAD" or status != 503 or "retry-after" in answer.headers
    found = LEAK.search(text)
    assert path.startswith("/ui") or found is None, f"it tells {found and found[0]!r}: {text[:300]}"
    kind = answer.headers.get("content-type", "")
    if not text or answer.request.method == "HEAD":
        return
    if kind.startswith("application/x-ndjson"):
        lines = [json.loads(line) for line in text.splitlines()]
        assert lines[-1].get("done") or "error" in lines[-1] or lines[-1].get("status") == "success", lines[
            -1
        ]
    elif kind.startswith("text/event-stream"):
        frames = [frame for frame in text.split("\n\n") if frame]
        told = [line for frame in frames for line in frame.split("\n") if line.startswith("data: ")]
        values = [json.loads(line[6:]) for line in told if line != "data: [DONE]"]
        assert told[-1] == "data: [DONE]" or "response" in values[-1] or "error" in values[-1], told[-1]
    elif kind.startswith("application/json"):
        value = json.loads(text)
        if status >= 400:
            error = value["error"] if not path.startswith("/v1") else value["error"]["message"]
            assert isinstance(error, str) and error.strip() and "\n" not in error, value


def fuzz(seconds: float, first: int) -> None:
    """Hostile requests for so long."""
    statuses: Counter[tuple[str, int]] = Counter()
    with serving() as one:
        text = one.caption()

        def send(sent: Sent) -> None:
            method, path, data, heads = sent
            coded = {name: value.encode("latin-1") for name, value in heads.items()}
            start = time.monotonic()
            answer = one.client.request(method, path, content=data, headers=coded)
            statuses[path, answer.status_code] += 1
            assert time.monotonic() - start < LATE, "late"
            check(answer, path)

        rules = settings(
            max_examples=300,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        run = rules(given(request)(send))
        start, number_of_run = time.monotonic(), first
        before: dict[str, int] = {}
        while time.monotonic() - start < seconds or not before:
            seed(number_of_run)(run)()
            number_of_run += 1
            if not before and time.monotonic() - start > seconds / 4:
                before = one.holds()
        check_unchanged(one, text, before)
    for (path, status), n in sorted(statuses.items()):
        print(f"{n:7} {status} {path!r}")
    print(f"{sum(statuses.values())} requests, seeds {first} to {number_of_run - 1}, nothing failed")


# ---- many clients ------------------------------------------------------------------------------------------


def _question(name: str = "apple.png") -> dict[str, Any]:
    image = base64.b64encode((EXAMPLES / name).read_bytes()).decode()
    return {"role": "user", "content": "Describe this image.", "images": [image]}


def load(n_requests: int, n_clients: int) -> None:
    """Requests of several clients, a third of which are left before their end."""
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def client(number_of_client: int, n: int) -> None:
        rng = random.Random(number_of_client)
        mine: Counter[str] = Counter()
        with httpx.Client(base_url=one.url, timeout=120) as own:
            for _ in range(n):
                mine[_ask(one.url, own, rng)] += 1
        with lock:
            outcomes.update(mine)

    with serving() as one, ThreadPoolExecutor(n_clients) as pool:
        text = one.caption()
        share = max(1, n_requests // (4 * n_clients))
        list(pool.map(lambda i: client(i, share), range(n_clients)))
        before = one.holds()
        start = time.monotonic()
        list(pool.map(lambda i: client(100 + i, n_requests // n_clients - share), range(n_clients)))
        one.wait_idle()
        print(f"{time.monotonic() - start:.0f} s, {dict(outcomes)}")
        assert set(outcomes) == {"whole", "stream", "left"}, outcomes
        check_unchanged(one, text, before)
        assert one.metric('mllama_loads_total{model="demo:latest"}') <= 1
        stops_soon(one)


def _ask(url: str, own: httpx.Client, rng: random.Random) -> str:
    """One request; what became of it."""
    image_of = _question(rng.choice(["apple.png", "apple-and-cat.png"]))
    stream = rng.random() < 0.5
    ways: list[tuple[str, dict[str, Any]]] = [
        ("/api/chat", {"messages": [image_of], "options": {"seed": 1, "num_predict": 30}}),
        ("/api/generate", {"prompt": "x", "options": {"num_predict": 30}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 30}),
    ]
    path, asked = rng.choice(ways)
    asked = {"model": "demo", "stream": stream, **asked}
    if rng.random() < 1 / 3:
        leave(url, path, asked, rng.random() * 0.1)
        return "left"
    # The time limit of this server is short: a client that is refused waits, as clients do.
    for _ in range(200):
        answer = own.post(path, json=asked)
        late = answer.status_code in (503, 504) or '"not done within' in answer.text
        if not late:
            break
        time.sleep(0.05)
    if answer.status_code != 200 or '"error"' in answer.text:
        return f"{answer.status_code} {answer.text[:200]}"
    return "stream" if stream else "whole"


def leave(url: str, path: str, asked: dict[str, Any], seconds: float) -> None:
    """Send a request, and go after so long."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(asked).encode()
    with suppress(OSError), socket.create_connection((host, int(port)), 20) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        time.sleep(seconds)


def stops_soon(one: Serving) -> None:
    """A client that goes away stops its computation, with and without a stream. Raises AssertionError."""
    endless = {"type": "string", "minLength": 9000}
    for stream in (True, False):
        asked = {
            "model": "demo",
            "prompt": "x",
            "stream": stream,
            "format": endless,
            "options": {"num_predict": 9000},
        }
        leave(one.url, "/api/generate", asked, 0.5)
        start = time.monotonic()
        one.wait_idle()
        seconds = time.monotonic() - start
        print(f"stopped {seconds:.2f} s after its client had gone ({'stream' if stream else 'whole'})")
        assert seconds < LIMIT / 2


def main() -> int:
    """Run what is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("fuzz")
    one.add_argument("--seconds", type=float, default=60)
    one.add_argument("--seed", type=int, default=0)
    one = commands.add_parser("load")
    one.add_argument("--requests", type=int, default=1000)
    one.add_argument("--clients", type=int, default=8)
    given_args = parser.parse_args()
    trial: Callable[[], None] = (
        (lambda: fuzz(given_args.seconds, given_args.seed))
        if given_args.what == "fuzz"
        else (lambda: load(given_args.requests, given_args.clients))
    )
    trial()
    return 0


if __name__ == "__main__":
    sys.exit(main())
