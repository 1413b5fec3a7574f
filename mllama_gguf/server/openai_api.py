"""The routes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import responses
from .openai_replies import CompletionWriter, model_object
from .openai_requests import Wish, chat, completion
from .replies import json_reply
from .service import Service, refuse


def routes(service: Service) -> list[Route]:
    """All of them."""

    async def models(request: Request) -> Response:
        return json_reply({"object": "list", "data": [model_object(card) for card in await service.cards()]})

    async def model(request: Request) -> Response:
        return json_reply(model_object(await service.find(request.path_params["name"])))

    async def respond(request: Request) -> Response:
        body, settings = await service.read(request), service.settings
        wish = await service.translate(
            request, partial(responses.request, body, settings.images, allow_gbnf=settings.allow_gbnf)
        )
        card = await service.find(wish.model)
        writer = responses.ResponseWriter(wish.model, body, wish.tools)
        body = {}  # its images are in the wish
        return service.computed(request, card, wish.ask, writer, stream=wish.stream)

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/v1/chat/completions", _computed(service, "chat", chat), methods=["POST"]),
        Route("/v1/completions", _computed(service, "text", completion), methods=["POST"]),
        Route("/v1/responses", respond, methods=["POST"]),
        Route("/v1/embeddings", refuse(501, "this model does not support embeddings"), methods=["POST"]),
    ]


def _computed(
    service: Service, kind: Literal["chat", "text"], read: Callable[..., Wish]
) -> Callable[[Request], Any]:
    settings = service.settings

    async def route(request: Request) -> Response:
        body = await service.read(request)
        wish = await service.translate(
            request, partial(read, body, settings.images, allow_gbnf=settings.allow_gbnf)
        )
        body = {}  # its images are in the wish
        card = await service.find(wish.model)
        writer = CompletionWriter(wish.model, kind, usage=wish.usage, tools=wish.tools)
        return service.computed(request, card, wish.ask, writer, stream=wish.stream)

    return route
