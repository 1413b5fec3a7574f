"""What all routes share: the settings, the models on offer, the engine, the figures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import Request

from .asking import Ask, answer, encode_ahead, load_only
from .bodies import LARGE, Bodies
from .catalog import Card, Catalog
from .engine import Engine
from .jobs import Job, Mailbox
from .metrics import Metrics
from .problems import Refused
from .settings import ServerSettings
from .streaming import Computed, Writer

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """One server."""

    settings: ServerSettings
    catalog: Catalog
    engine: Engine
    metrics: Metrics
    bodies: Bodies

    async def read(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request. Raises Refused."""
        return await self.bodies.read_json(request)

    async def translate(self, request: Request, read: Callable[[], T]) -> T:
        """What a request asks for. In a thread, if it is large, or if images may be fetched for it."""
        is_large = int(request.headers.get("content-length", "0") or 0) > LARGE
        if is_large or self.settings.images.hosts:
            return await anyio.to_thread.run_sync(read)
        return read()

    async def find(self, name: str) -> Card:
        """The model of a name. Raises Refused."""
        # To look at files takes a thread; most requests need none.
        if (card := self.catalog.recent(name)) is not None:
            return card
        return await anyio.to_thread.run_sync(self.catalog.find, name)

    async def cards(self) -> list[Card]:
        """The models on offer."""
        return await anyio.to_thread.run_sync(self.catalog.cards)

    def job(
        self, request: Request, card: Card, ask: Ask | None, *, keep_alive: float | None, stream: bool
    ) -> Job:
        """What the engine is to do. ask: None: only load the model."""
        return Job(
            card,
            request.scope.get("client_name", ""),
            load_only if ask is None else answer(ask),
            Mailbox(asyncio.get_running_loop(), whole=not stream),
            keep_alive,
            0 if ask is None else ask.n_bytes,
            self.settings.time_limit,
            encode_ahead(ask) if ask is not None and ask.has_images else None,
        )

    def computed(
        self,
        request: Request,
        card: Card,
        ask: Ask | None,
        writer: Writer,
        *,
        stream: bool,
        keep_alive: float | None = None,
    ) -> Computed:
        """The answer of a job."""
        return Computed(
            self.engine,
            self.job(request, card, ask, keep_alive=keep_alive, stream=stream),
            writer,
            stream=stream,
            ping_seconds=self.settings.ping,
        )


def refuse(status: int, words: str) -> Callable[[Request], Any]:
    """A route that is never served."""

    async def route(request: Request) -> Any:
        raise Refused(status, words)

    return route
