"""Connections: how many there may be, and how long one may take to ask for something."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0  # for the head of a request, the first one too
MOST = 2048
SPARE = 512  # descriptors for everything else: files, models, connections that come at the same moment
BACKLOG = 256  # connections that wait to be accepted, and that are accepted in one go


def most_connections() -> int:
    """How many this process can hold. Its limit of descriptors is raised first, as far as that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MOST
    return max(8, min(MOST, soft - SPARE))


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if no whole head of a request comes in time, or if there are too
    many. Without that, a program that opens connections and asks for nothing takes all descriptors."""

    most = MOST

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: asyncio.TimerHandle | None = None  # closes it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._watch_head()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """Let the time run while a head is awaited, from its first byte on. Before that the connection is
        idle, for which uvicorn has a time of its own, after the first request."""
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._late is None and self.timeout_keep_alive_task is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _forget_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
