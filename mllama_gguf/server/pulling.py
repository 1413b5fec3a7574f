"""/api/pull: a model that is here is a success; others are fetched only if the operator allows it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio.to_thread
from starlette.responses import Response, StreamingResponse

from ..errors import Aborted, MllamaError
from ..store.lockfile import locked_models
from ..store.pull import pull as fetch
from ..store.references import DEFAULT_HOST, OllamaRef
from .catalog import canonical
from .problems import Refused, refusal
from .replies import json_reply, to_bytes
from .service import Service

SUCCESS = {"status": "success"}
_one = threading.Lock()  # a download at a time


async def pull(service: Service, name: str, *, stream: bool) -> Response:
    """The answer to a request for a model. Raises Refused."""
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
        reference = reference_of(name)
    else:
        lines = [{"status": "pulling manifest"}, {"status": "verifying sha256 digest"}, SUCCESS]
        if not stream:
            return json_reply(SUCCESS)
        return Response(b"".join(to_bytes(line) + b"\n" for line in lines), media_type="application/x-ndjson")
    if stream:
        return StreamingResponse(_lines(service, reference), media_type="application/x-ndjson")
    try:
        await anyio.to_thread.run_sync(_fetch, reference, None)
    except MllamaError as e:
        raise refusal(e) from None
    service.catalog.forget()
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
    if ref.host != DEFAULT_HOST:
        raise Refused(403, f"models are fetched from {DEFAULT_HOST} only", None, "model")
    return str(ref)


def _fetch(reference: str, progress: Any) -> None:
    if not _one.acquire(blocking=False):
        raise Refused(503, "another model is being fetched", "server_busy", again=True, seconds=30)
    try:
        fetch(reference, progress)
    finally:
        _one.release()


async def _lines(service: Service, reference: str) -> AsyncIterator[bytes]:
    """The progress of a download, a line of JSON each."""
    told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    gone = threading.Event()  # nobody reads any more

    def progress(name: str, done: int, total: int) -> None:
        if gone.is_set():
            raise Aborted("nobody waits for the download")
        told.put({"status": f"pulling {name[-64:][:12]}", "digest": name, "total": total, "completed": done})

    def work() -> None:
        try:
            _fetch(reference, progress)
            told.put({"status": "verifying sha256 digest"})
            told.put({"status": "writing manifest"})
        except BaseException as e:
            told.put({"error": refusal(e).words})

    yield to_bytes({"status": "pulling manifest"}) + b"\n"
    thread = threading.Thread(target=work, name="mllama-pull", daemon=True)
    thread.start()
    failed = False
    try:
        while thread.is_alive() or not told.empty():
            for line in _latest(told):
                failed |= "error" in line
                yield to_bytes(line) + b"\n"
            await asyncio.sleep(0.2)
    finally:
        gone.set()
        service.catalog.forget()
    if not failed:
        yield to_bytes(SUCCESS) + b"\n"


def _latest(told: queue.SimpleQueue[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was told, of several amounts one after the other the last one only."""
    amount: dict[str, Any] | None = None
    while not told.empty():
        line = told.get()
        if "total" in line and (amount is None or amount["status"] == line["status"]):
            amount = line
            continue
        if amount is not None:
            yield amount
        amount = line if "total" in line else None
        if amount is None:
            yield line
    if amount is not None:
        yield amount
