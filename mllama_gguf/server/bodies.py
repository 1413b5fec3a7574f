"""The body of a request: read within limits, and JSON that is an object."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

import anyio.to_thread
from starlette.requests import Request

from .problems import Refused
from .settings import ServerSettings

LARGE = 1 << 20  # bytes; more is parsed in a thread
MAX_DEPTH = 128  # of JSON


async def read_json(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """The object in a request's body, whatever its Content-Type says. Raises Refused, ClientDisconnect."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise Refused(415, f"Content-Encoding {encoding[:40]!r} is not read; send the JSON as it is")
    data = await _read(request, settings)
    if not data.strip():
        raise Refused(400, "missing request body")
    if len(data) > LARGE:
        return await anyio.to_thread.run_sync(parse_object, data)
    return parse_object(data)


async def _read(request: Request, settings: ServerSettings) -> bytearray:
    limit = settings.max_body
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)
    data = bytearray()
    chunks = request.stream().__aiter__()
    while True:
        try:
            chunk = await asyncio.wait_for(chunks.__anext__(), settings.body_seconds)
        except StopAsyncIteration:
            return data
        except asyncio.TimeoutError:
            raise Refused(
                408,
                f"no more of the request came for {settings.body_seconds:g} s",
                headers={"Connection": "close"},
            ) from None
        data += chunk
        if len(data) > limit:
            raise _too_large(limit)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the request has more than {limit} bytes", headers={"Connection": "close"})


def parse_object(data: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in some bytes. Raises Refused."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise Refused(400, f"the JSON is nested deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as e:
        raise Refused(400, f"invalid JSON: {e.msg} at line {e.lineno} column {e.colno}") from None
    except ValueError:  # a number of thousands of digits
        raise Refused(400, "invalid JSON: a number that cannot be read") from None
    if not isinstance(value, dict):
        raise Refused(400, f"expected a JSON object, not {type(value).__name__}")
    _check_depth(value)
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise Refused(400, f"invalid JSON: {word} is no number of JSON")


def _check_depth(value: Any) -> None:
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not layer:
            return
    raise Refused(400, f"the JSON is nested deeper than {MAX_DEPTH}")
