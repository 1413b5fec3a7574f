"""/api/pull: a model that is here is a success; others are fetched only if the operator allows it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from ..errors import Aborted, MllamaError
from ..store.lockfile import locked_models
from ..store.pull import pull as fetch
from ..store.references import DEFAULT_HOST, DEFAULT_NAMESPACE, OllamaRef
from .catalog import canonical
from .engine import STOPPING
from .problems import Refused, refusal
from .replies import json_reply, to_bytes
from .service import Service

Told: TypeAlias = "dict[str, Any] | Refused"

SUCCESS = {"status": "success"}
_one = threading.Lock()  # a download at a time


async def pull(service: Service, name: str, request: Request, *, stream: bool) -> Response:
    """The answer to a request for a model. Raises Refused, ClientDisconnect."""
    try:
        await service.find(name)
    except Refused as e:
        if e.status != 404:
            raise
        if not service.settings.allow_pull:
            raise Refused(
                403,
                f"model '{name}' is not on this machine, and this server fetches none: run mllama pull "
                "there, or mllama serve --allow-pull",
            ) from None
        if service.catalog.is_chosen:
            raise Refused(403, "this server offers only the models that it was started with (-m)") from None
        reference = reference_of(name)
    else:
        lines = [{"status": "pulling manifest"}, {"status": "verifying sha256 digest"}, SUCCESS]
        if not stream:
            return json_reply(SUCCESS)
        return Response(b"".join(to_bytes(line) + b"\n" for line in lines), media_type="application/x-ndjson")
    told = _told(service, reference)
    if stream:
        return StreamingResponse(_lines(told), media_type="application/x-ndjson")
    async with aclosing(told):
        async for one in told:
            if isinstance(one, Refused):
                raise one
            if await request.is_disconnected():
                raise ClientDisconnect
    return json_reply(SUCCESS)


def reference_of(name: str) -> str:
    """What may be fetched: a name in models.lock, or one of the library of Ollama's own registry.

    Raises Refused.
    """
    wanted = canonical(name)
    for locked in locked_models():
        if canonical(locked) == wanted:
            return locked
    try:
        ref = OllamaRef.parse(wanted)
    except MllamaError:
        raise Refused(400, f"{name[:100]!r} is not a model's name", None, "model") from None
    if (ref.host, ref.namespace) != (DEFAULT_HOST, DEFAULT_NAMESPACE):
        raise Refused(403, f"models are fetched from the library of {DEFAULT_HOST} only", None, "model")
    return str(ref)


def _fetch(reference: str, progress: Any) -> None:
    if not _one.acquire(blocking=False):
        raise Refused(503, "another model is being fetched", "server_busy", again=True, seconds=30)
    try:
        fetch(reference, progress)
    finally:
        _one.release()


async def _lines(told: AsyncIterator[Told]) -> AsyncIterator[bytes]:
    """The progress of a download, a line of JSON each."""
    async for one in told:
        yield to_bytes({"error": one.words} if isinstance(one, Refused) else one) + b"\n"


async def _told(service: Service, reference: str) -> AsyncGenerator[Told, None]:
    """What a download tells, to success or an error. It stops if nobody listens any more, and at the end of
    the server."""
    told: queue.SimpleQueue[Told] = queue.SimpleQueue()
    gone = threading.Event()  # nobody listens any more

    def progress(name: str, done: int, total: int) -> None:
        if service.engine.state == "stopping":
            raise STOPPING
        if gone.is_set():
            raise Aborted("nobody waits for the download")
        told.put({"status": f"pulling {name[-64:][:12]}", "digest": name, "total": total, "completed": done})

    def work() -> None:
        try:
            _fetch(reference, progress)
            told.put({"status": "verifying sha256 digest"})
            told.put({"status": "writing manifest"})
        except BaseException as e:
            told.put(refusal(e))

    yield {"status": "pulling manifest"}
    # No thread of a pool: the process would wait for its end.
    thread = threading.Thread(target=work, name="mllama-pull", daemon=True)
    thread.start()
    failed = False
    try:
        while (is_alive := thread.is_alive()) or not told.empty():
            for one in _latest(told):
                failed |= isinstance(one, Refused)
                yield one
            if is_alive and service.engine.state == "stopping":  # the connection may be stuck
                yield STOPPING
                return
            await asyncio.sleep(0.2)
    finally:
        gone.set()
        service.catalog.forget()
    if not failed:
        yield SUCCESS


def _latest(told: queue.SimpleQueue[Told]) -> Iterator[Told]:
    """What was told, of several amounts one after the other the last one only."""
    amount: dict[str, Any] | None = None
    while not told.empty():
        one = told.get()
        if isinstance(one, dict) and "total" in one:
            if amount is not None and amount["status"] != one["status"]:
                yield amount
            amount = one
            continue
        if amount is not None:
            yield amount
            amount = None
        yield one
    if amount is not None:
        yield amount
