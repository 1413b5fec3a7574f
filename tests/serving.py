"""For the tests of the server: one in a thread of this process, on a free port, with the demo model."""

from __future__ import annotations

import base64
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from helpers import elsewhere

from mllama_gguf.server.app import make_app, make_service
from mllama_gguf.server.catalog import Catalog, Offer
from mllama_gguf.server.life import Server, listen
from mllama_gguf.server.models import Opening
from mllama_gguf.server.service import Service
from mllama_gguf.server.settings import ServerSettings

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = (Offer("demo:latest", "demo"), Offer("other:latest", "demo"))


@dataclass
class Running:
    """A server that answers. url: without a slash at its end."""

    url: str
    service: Service
    server: Server

    _client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._client = self.client()

    def client(self) -> httpx.Client:
        """A client with connections of its own."""
        return httpx.Client(base_url=self.url, timeout=60, verify=False)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self._client.get(path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        if body is not None:
            more["json"] = body
        return self._client.post(path, **more)

    def close(self) -> None:
        self._client.close()

    def lines(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The lines of a stream of JSON."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of an SSE stream, which ends with [DONE]."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        frames = [one for one in answer.text.split("\n\n") if one and not one.startswith(":")]
        assert frames[-1] == "data: [DONE]"
        return [json.loads(one.removeprefix("data: ")) for one in frames[:-1]]

    def metric(self, line: str) -> float:
        """The value of a line of /metrics; 0 if it is not there."""
        for one in self.get("/metrics").text.splitlines():
            if one.startswith(f"{line} "):
                return float(one.rpartition(" ")[2])
        return 0.0


@contextmanager
def running(
    settings: ServerSettings | None = None,
    *,
    offers: tuple[Offer, ...] | None = DEMO,
    given: dict[str, Any] | None = None,
    opening: Opening | None = None,
    **more: Any,
) -> Iterator[Running]:
    settings = settings or ServerSettings(port=0)
    opening = opening or Opening({"n_threads": 1, **(given or {})}, image_cache=False, tuned=False)
    service = make_service(settings, Catalog(offers), opening, **more)
    listener = listen(settings)
    port = listener.getsockname()[1]
    ready = threading.Event()
    server = Server(service, make_app(service), ready.set)
    service.engine.start()
    thread = threading.Thread(target=server.run, args=([listener],), name="server")
    thread.start()
    assert ready.wait(20)
    one = Running(f"http://127.0.0.1:{port}", service, server)
    try:
        yield one
    finally:
        one.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        service.engine.join()
        assert not service.engine.is_alive


def image64(name: str = "apple.png") -> str:
    """An image of examples/ in base64."""
    return base64.b64encode((EXAMPLES / name).read_bytes()).decode()


def data_uri(name: str = "apple.png") -> str:
    return f"data:image/png;base64,{image64(name)}"


def endless(model: str = "demo", **more: Any) -> dict[str, Any]:
    """A reply that has no end for seconds."""
    form = {"type": "object", "properties": {"a": {"type": "string", "minLength": 9000}}, "required": ["a"]}
    return {"model": model, "prompt": "x", "format": form, "options": {"temperature": 0}, **more}


def slow_image(stream: bool) -> dict[str, Any]:
    """A request whose image is encoded for seconds."""
    message = {"role": "user", "content": "x", "images": [image64("apple-and-cat.png")]}
    return {"model": "slow", "messages": [message], "stream": stream}


def wait_for(found: Any, seconds: float = 60.0) -> None:
    """Wait until a function says yes."""
    start = time.monotonic()
    while not found():
        assert time.monotonic() - start < seconds, "it never came"
        time.sleep(0.005)


def is_computing(served: Running) -> bool:
    """Whether one request is computed now."""
    return served.metric("mllama_requests_processing") == 1


@contextmanager
def sent(served: Running, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request on a connection of its own, whose answer nobody reads yet."""
    host, port = served.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), 20) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        yield connection


@contextmanager
def process(*args: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`mllama serve` as a process, and its address."""
    command = [sys.executable, "-m", "mllama_gguf", "serve", "--port", "0", "--no-cache", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **elsewhere(**env)
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        try:
            assert line.startswith("Serving at http://127.0.0.1:"), (
                line,
                child.stderr and child.stderr.read(),
            )
            yield child, line.split()[2]
        finally:
            if child.poll() is None:
                child.kill()


def one_client(served: Running, seed: int, n: int) -> int:
    """Requests of one client, some of which it leaves early; how many it read to their end."""
    rng, read = random.Random(seed), 0
    message = {
        "role": "user",
        "content": "x",
        "images": [image64(rng.choice(["apple.png", "apple-and-cat.png"]))],
    }
    for _ in range(n):
        kind = rng.randrange(4)
        chat = {"model": "demo", "messages": [message], "stream": rng.random() < 0.5, "options": {"seed": 1}}
        if kind == 0:
            with sent(served, "/api/generate", endless(stream=rng.random() < 0.5)):
                time.sleep(rng.random() * 0.05)
        elif kind == 1:
            with sent(served, "/api/chat", chat):
                time.sleep(rng.random() * 0.05)
        else:
            answer = served.post("/api/chat", chat)
            assert answer.status_code == 200, answer.text
            read += 1
    return read
