"""The application: all routes, and before them security, errors and figures."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import MllamaError
from . import ollama_api, openai_api, page
from .bodies import Bodies
from .catalog import Catalog
from .engine import STOPPING, Engine
from .metrics import Metrics
from .models import Opening
from .problems import Refused, refusal
from .replies import error_reply, is_openai, json_reply
from .security import Security
from .service import Service
from .settings import ServerSettings

RUNNING = "Ollama is running"  # programs look for these words


def make_service(settings: ServerSettings, catalog: Catalog, opening: Opening, **more: Any) -> Service:
    """The parts of a server; its engine is not started. more: for `Engine`."""
    metrics = Metrics()
    engine = Engine(settings, opening, metrics, **more)
    return Service(settings, catalog, engine, metrics, Bodies(settings))


def make_app(service: Service) -> ASGIApp:
    """The application of a server."""

    async def root(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            answer = page.index()
            answer.headers["Vary"] = "Accept"
            return answer
        return PlainTextResponse(RUNNING, headers={"Vary": "Accept"})

    async def health(request: Request) -> Response:
        state = service.engine.state
        # Requests are taken while a model loads, so that is not a failure.
        return json_reply({"status": state}, 503 if state == "stopping" else 200)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        Route("/", root, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/v1/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        *page.routes(),
        *ollama_api.routes(service),
        *openai_api.routes(service),
    ]
    handlers: dict[Any, Any] = {
        Refused: _refused,
        MllamaError: _refused,
        ClientDisconnect: _gone,
        HTTPException: _http,
        Exception: _refused,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Counted(Security(app, service.settings), service.metrics, _labels(routes))


async def _refused(request: Request, error: Exception) -> Response:
    return error_reply(request.url.path, refusal(error))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is nothing at {request.url.path[:100]}", 405: "method not allowed"}
    headers = dict(error.headers or {})
    problem = Refused(
        error.status_code, words.get(error.status_code, str(error.detail)), None, None, headers=headers
    )
    return error_reply(request.url.path, problem)


def _labels(routes: list[Any]) -> set[str]:
    return {route.path for route in routes}


def _plain(path: str) -> str:
    """A path without doubled slashes and without one at its end. Programs whose address of this server ends
    with a slash ask for //api/tags, which Ollama leads to the right place too."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


class Counted:
    """Counts requests by route and status; adds the headers that every answer has; makes paths plain."""

    def __init__(self, app: ASGIApp, metrics: Metrics, labels: set[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._labels = labels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": _plain(scope["path"])}
        status = 499  # nothing was sent
        start = time.monotonic()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                safe = (b"x-content-type-options", b"nosniff")
                message = {**message, "headers": [*message.get("headers", ()), safe]}
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:  # the server ends, and this took too long
            if status == 499:
                await error_reply(scope["path"], STOPPING)(scope, receive, counted)
        finally:
            label = self._label(scope["path"])
            api = "openai" if is_openai(label) else "ollama" if label.startswith("/api/") else "server"
            self._metrics.requests.labels(api, label, str(status)).inc()
            self._metrics.request_seconds.labels(label).observe(time.monotonic() - start)

    def _label(self, path: str) -> str:
        """The route of a path: of few values, whatever is asked for."""
        if path in self._labels:
            return path
        for prefix, label in (("/v1/models/", "/v1/models/{name}"), ("/api/blobs/", "/api/blobs/{digest}")):
            if path.startswith(prefix):
                return label
        return "other"
