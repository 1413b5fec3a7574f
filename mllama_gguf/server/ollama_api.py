"""The routes of Ollama's API."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import fields
from .ollama_replies import OllamaWriter, description, loaded, running
from .ollama_requests import Wish, chat, generate, model_of
from .pulling import pull
from .replies import json_reply
from .service import Service, refuse

_NO_CHANGES = "mllama serve does not change models"
_NO_EMBEDDINGS = "this model does not support embeddings"


def routes(service: Service) -> list[Route]:
    """All of them."""

    async def version(request: Request) -> Response:
        return json_reply({"version": service.settings.version})

    async def tags(request: Request) -> Response:
        return json_reply({"models": [card.tag for card in await service.cards()]})

    async def ps(request: Request) -> Response:
        return json_reply({"models": [running(shown) for shown in service.engine.snapshot()]})

    async def show(request: Request) -> Response:
        body = await service.read(request)
        card = await service.find(model_of(body))
        return json_reply(description(card, verbose=fields.flag(body, "verbose")))

    async def status(request: Request) -> Response:
        return json_reply({"cloud": {"disabled": True, "source": "none"}})

    async def pull_model(request: Request) -> Response:
        body = await service.read(request)
        return await pull(service, model_of(body), request, stream=fields.flag(body, "stream", True))

    unchanged = refuse(501, _NO_CHANGES)
    no_embeddings = refuse(501, _NO_EMBEDDINGS)
    return [
        Route("/api/version", version, methods=["GET"]),
        Route("/api/tags", tags, methods=["GET"]),
        Route("/api/ps", ps, methods=["GET"]),
        Route("/api/status", status, methods=["GET"]),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/chat", _computed(service, "chat", chat), methods=["POST"]),
        Route("/api/generate", _computed(service, "generate", generate), methods=["POST"]),
        Route("/api/pull", pull_model, methods=["POST"]),
        Route("/api/embed", no_embeddings, methods=["POST"]),
        Route("/api/embeddings", no_embeddings, methods=["POST"]),
        Route("/api/create", unchanged, methods=["POST"]),
        Route("/api/copy", unchanged, methods=["POST"]),
        Route("/api/push", unchanged, methods=["POST"]),
        Route("/api/delete", unchanged, methods=["DELETE"]),
        Route("/api/blobs/{digest}", unchanged, methods=["HEAD", "POST"]),
        Route("/api/me", refuse(401, "unauthorized"), methods=["POST"]),
    ]


def _computed(
    service: Service, kind: Literal["chat", "generate"], read: Callable[..., Wish]
) -> Callable[[Request], Any]:
    async def route(request: Request) -> Response:
        body = await service.read(request)
        wish = await service.translate(request, partial(read, body, service.settings.images))
        body = {}  # its images are in the wish
        card = await service.find(wish.model)
        if wish.ask is None and wish.keep_alive == 0:
            service.engine.unload(card)
            return json_reply(loaded(wish.model, kind, "unload"))
        # A request without a prompt has one answer, even as a stream.
        stream = wish.stream and wish.ask is not None
        writer = OllamaWriter(wish.model, kind)
        return service.computed(request, card, wish.ask, writer, stream=stream, keep_alive=wish.keep_alive)

    return route
