"""Answers that a model computes: as they come, or whole. A client that goes away ends the computation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..text.logprobs import TokenLogprob
from .engine import Engine
from .jobs import Done, Event, Job, Piece
from .problems import Refused
from .replies import error_reply, to_bytes

# A reader who is told every token of a fast model costs more than the model: what comes within this time, two
# frames of a screen, is sent together, and after the first few tokens as one chunk. Each time costs the
# thread that computes more than half a millisecond, in which it waits for Python's lock.
GATHER_SECONDS = 0.033
TOLD_ALONE = 8


class Writer(Protocol):
    """Writes the events of a reply in the shape of an API."""

    media_type: str

    def frames(self, event: Event) -> Iterable[bytes]:
        """What is sent for an event."""

    def ping(self) -> bytes:
        """What is sent while nothing else is."""

    def failure(self, problem: Refused) -> bytes:
        """What is sent for an error after the beginning."""

    def whole(self, events: Iterable[Event]) -> Any:
        """The whole answer, as JSON."""


class Computed(Response):
    """The answer of a job, which is handed in when the answer begins."""

    def __init__(
        self,
        engine: Engine,
        job: Job,
        writer: Writer,
        *,
        stream: bool,
        ping_seconds: float,
    ) -> None:
        """writer: writes what the job gives; stream: as it comes; ping_seconds: between signs of life."""
        self._engine = engine
        self._job = job
        self._writer = writer
        self._stream = stream
        self._ping_seconds = ping_seconds
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._engine.submit(self._job)
        except Refused as e:
            await error_reply(scope["path"], e)(scope, receive, send)
            return
        watch = asyncio.create_task(self._watch(receive))
        timer = self._time()
        try:
            await (self._send_stream if self._stream else self._send_whole)(scope, receive, send)
        except OSError:  # the connection is gone
            pass
        finally:
            watch.cancel()
            if timer is not None:
                timer.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            self._engine.cancel(self._job)  # does nothing after the end

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self._job)
        self._job.mailbox.put(Refused(499, "request canceled"))

    def _time(self) -> asyncio.TimerHandle | None:
        """What tells a client of the end of its time while its job waits. One that runs is stopped by the
        engine."""
        job = self._job

        def end() -> None:
            if self._engine.expire(job):
                job.mailbox.put(job.lateness)

        if not job.time_limit:
            return None
        rest = job.created + job.time_limit - time.monotonic()
        return asyncio.get_running_loop().call_later(max(0.0, rest), end)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        events: list[Event] = []
        while True:
            events += await self._job.mailbox.take(None)
            last = events[-1] if events else None
            if isinstance(last, Refused):
                await error_reply(scope["path"], last)(scope, receive, send)
                return
            if isinstance(last, Done):
                body = to_bytes(self._writer.whole(events))
                await _start(send, 200, "application/json; charset=utf-8", {"content-length": str(len(body))})
                await send({"type": "http.response.body", "body": body})
                return

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        n_events = 0
        sent = time.monotonic()  # the last time that anything was
        while True:
            wait = max(0.0, self._ping_seconds - (time.monotonic() - sent))
            events = await self._job.mailbox.take(wait)
            if not started:
                if events and isinstance(events[0], Refused):
                    await error_reply(scope["path"], events[0])(scope, receive, send)
                    return
                started = True
                await _start(send, 200, self._writer.media_type, _UNBUFFERED)
            parts: list[bytes] = []
            alone = max(0, TOLD_ALONE - n_events)
            for event in (*events[:alone], *joined(events[alone:])):
                if isinstance(event, Refused):
                    parts.append(self._writer.failure(event))
                    break
                parts += self._writer.frames(event)
            last = bool(events) and isinstance(events[-1], (Done, Refused))
            body = b"".join(parts)
            if not (body or last) and (not events or time.monotonic() - sent >= self._ping_seconds):
                body = self._writer.ping()  # also while events come and the writer holds them back
            n_events += len(events)
            if body or last:
                await send({"type": "http.response.body", "body": body, "more_body": not last})
                sent = time.monotonic()
            if last:
                return
            if events:
                await self._job.mailbox.gather(GATHER_SECONDS)


def joined(events: Iterable[Event]) -> Iterator[Event]:
    """The same events; pieces of a reply that follow each other are one."""
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    choice = 0
    for event in events:
        if texts and not (isinstance(event, Piece) and event.choice == choice):
            yield Piece("".join(texts), choice, tuple(logprobs))
            texts, logprobs = [], []
        if isinstance(event, Piece):
            choice = event.choice
            texts.append(event.text)
            logprobs += event.logprobs
        else:
            yield event
    if texts:
        yield Piece("".join(texts), choice, tuple(logprobs))


_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def _start(send: Send, status: int, media_type: str, headers: Mapping[str, str]) -> None:
    lines = {"content-type": media_type, **headers}
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
