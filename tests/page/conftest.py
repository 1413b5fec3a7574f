"""A browser, the real server with the demo model, and a server that replies as a test says."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, Request, sync_playwright
from serving import Running, running
from starlette.applications import Starlette
from starlette.requests import Request as Asked
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mllama_gguf.server import page as pages
from mllama_gguf.server.life import listen
from mllama_gguf.server.settings import ServerSettings

CHROMIUM = os.environ.get("MLLAMA_CHROMIUM", "/usr/bin/chromium")
ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield one
        one.close()


@dataclass
class Opened:
    """A page in a browser of its own, and what it did."""

    page: Page
    context: BrowserContext
    complaints: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of its requests to /api/chat
    addresses: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("request", self._request)

    def _console(self, message: Any) -> None:
        # A status of 4xx is logged by the browser itself; that is no fault of the page.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _request(self, request: Request) -> None:
        self.addresses.append(request.url)
        if request.url.endswith("/api/chat"):
            self.bodies.append(json.loads(request.post_data or "{}"))


@pytest.fixture
def opening(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Opens a page. Afterwards: no error of a script, no breach of the policy, no request to another host."""
    opened: list[tuple[Opened, str]] = []

    def open_page(url: str, path: str = "/ui", **settings: Any) -> Opened:
        settings = {"viewport": {"width": 1280, "height": 860}, **settings}
        context = browser.new_context(**settings)
        context.set_default_timeout(120_000)  # a loaded machine
        one = Opened(context.new_page(), context)
        one.watch()
        opened.append((one, url))
        one.page.goto(url + path)
        return one

    yield open_page
    for one, url in opened:
        one.context.close()
        assert one.complaints == []
        assert [address for address in one.addresses if not address.startswith((url, "blob:"))] == []


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    with running() as one:
        yield one


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: the folder that MLLAMA_ARTEFACTS names, or one that goes away."""
    given = os.environ.get("MLLAMA_ARTEFACTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Fake:
    """A server with the page whose replies a test writes line by line: an object, or None for the end."""

    def __init__(self) -> None:
        self.gone = threading.Event()  # the client left before the end
        self.knows_models = threading.Event()  # until then, nobody is told which
        self.knows_models.set()
        self._lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        routes = [
            Route("/api/tags", self._tags),
            Route("/api/ps", self._ps),
            Route("/api/chat", self._chat, methods=["POST"]),
            *pages.routes(),
        ]
        self._server = uvicorn.Server(
            uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off")
        )
        self._listener = listen(ServerSettings(port=0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="fake")
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(20)

    def write(self, *lines: dict[str, Any] | None) -> None:
        assert self._loop is not None
        for line in lines:
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)

    def say(self, text: str) -> None:
        self.write({"message": {"role": "assistant", "content": text}, "done": False})

    def finish(self, **more: Any) -> None:
        last = {"done": True, "done_reason": "stop", "total_duration": 3_240_000_000, "eval_count": 44}
        self.write({**last, "eval_duration": 2_000_000_000, "message": {"content": ""}, **more}, None)

    def close(self) -> None:
        self.knows_models.set()
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(30)

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await self._server.serve([self._listener])

        asyncio.run(serve())

    async def _tags(self, request: Asked) -> Response:
        while not self.knows_models.is_set():
            await asyncio.sleep(0.01)
        return JSONResponse({"models": [{"name": "fake:latest", "capabilities": ["vision"]}]})

    async def _ps(self, request: Asked) -> Response:
        return JSONResponse({"models": []})

    async def _chat(self, request: Asked) -> Response:
        await request.body()

        async def lines() -> Any:
            is_done = False
            try:
                while (line := await self._lines.get()) is not None:
                    yield json.dumps(line).encode() + b"\n"
                is_done = True
            finally:
                if not is_done:
                    self.gone.set()

        return StreamingResponse(lines(), media_type="application/x-ndjson")


@pytest.fixture
def fake() -> Iterator[Fake]:
    one = Fake()
    yield one
    one.close()
