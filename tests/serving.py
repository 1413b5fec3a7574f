"""For the tests of the server: one in a thread of this process, on a free port, with the demo model."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

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


def picture64(name: str = "apple.png") -> str:
    """A picture of examples/ in base64."""
    return base64.b64encode((EXAMPLES / name).read_bytes()).decode()


def data_uri(name: str = "apple.png") -> str:
    return f"data:image/png;base64,{picture64(name)}"
