"""The body of a request: read within limits, and JSON that is an object.

An image of some megabytes is not copied more than it must be: it is in memory as the request brought it, and
as the file that its base64 stands for. So it is cut out of the body before the JSON is read.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import anyio
import anyio.to_thread
from starlette.requests import Request

from .problems import Refused
from .settings import ServerSettings

LARGE = 1 << 20  # bytes; more is parsed in a thread
MAX_DEPTH = 128  # of JSON
# Values of JSON, counted roughly: they take up to 60 bytes each, and while they are read nothing else goes
# on. A text with so many brackets and commas is longer than any context.
MAX_PARTS = 1_000_000
_PARTS = (b"[", b"{", b",")
_MOST_DIGITS = 300  # of an integer; a float has 308
# Base64, as the only thing in a string of JSON.
_IMAGE = re.compile(rb'(?<=[\s:,\[{])"((?:data:[\w/.+;=-]{0,80},)?[A-Za-z0-9+/]{32768,}={0,2})"')
_FIELDS = frozenset(("images", "image_url", "url"))  # that hold images
_PLACES = _FIELDS | {"messages", "input", "content"}  # that lead there


class Bodies:
    """Reads bodies, of which a limited number of bytes is in memory at the same time."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._taken = 0  # bytes

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The object in a request's body, whatever its Content-Type says. Raises Refused, ClientDisconnect.

        Long base64 in fields of images is a memoryview; everything else is as `json` gives it.
        """
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise Refused(415, f"Content-Encoding {encoding[:40]!r} is not read; send the JSON as it is")
        with self._room() as take:
            data = await self._data(request, take)
            if not data.strip():
                raise Refused(400, "missing request body")
            if len(data) > LARGE:
                return await anyio.to_thread.run_sync(parse_object, data)
            return parse_object(data)

    async def _data(self, request: Request, take: Callable[[int], None]) -> bytearray:
        """The bytes of a body. take: asks for memory. Raises Refused, ClientDisconnect."""
        settings = self._settings
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > settings.max_body:
            raise _too_large(settings.max_body)
        data, loop = bytearray(), asyncio.get_running_loop()
        try:
            # Most bodies are there already. `asyncio.wait_for` would make a task for each chunk.
            with anyio.fail_after(settings.body_seconds) as pause:
                async for chunk in request.stream():
                    if len(data) + len(chunk) > settings.max_body:
                        raise _too_large(settings.max_body)
                    take(len(chunk))
                    data += chunk
                    pause.deadline = loop.time() + settings.body_seconds
        except TimeoutError:
            words = f"no more of the request came for {settings.body_seconds:g} s"
            raise Refused(408, words, headers={"Connection": "close"}) from None
        return data

    @contextmanager
    def _room(self) -> Iterator[Any]:
        """A function that asks for memory; it is given back at the end."""
        mine = 0

        def take(n_bytes: int) -> None:
            nonlocal mine
            # A single request may always be as large as its limit.
            if self._taken > mine and self._taken + n_bytes > self._settings.max_waiting:
                raise Refused(
                    503,
                    "server busy, please try again.  too many requests arrive",
                    "server_busy",
                    again=True,
                    headers={"Connection": "close"},
                )
            mine += n_bytes
            self._taken += n_bytes

        try:
            yield take
        finally:
            self._taken -= mine


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the request has more than {limit} bytes", headers={"Connection": "close"})


def parse_object(data: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in some bytes, which stay as they are. Raises Refused."""
    views: list[memoryview] = []
    mark = secrets.token_hex(8)  # a request cannot guess it

    def cut(match: re.Match[bytes]) -> bytes:
        start, end = match.span(1)
        views.append(memoryview(data)[start:end])
        return f'"{mark}{len(views) - 1}"'.encode()

    rest = _IMAGE.sub(cut, data)
    if sum(map(rest.count, _PARTS)) > MAX_PARTS:
        raise Refused(400, f"the JSON has more than {MAX_PARTS} values")
    value = _parse(rest)
    if not isinstance(value, dict):
        raise Refused(400, f"expected a JSON object, not {type(value).__name__}")
    _check_depth(value)
    if views:
        _put_back(value, mark, views)
    return value


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_refuse_constant, parse_int=_whole_number, parse_float=_number)
    except RecursionError:
        raise Refused(400, f"the JSON is nested deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as e:
        raise Refused(400, f"invalid JSON: {e.msg} at line {e.lineno} column {e.colno}") from None


def _whole_number(digits: str) -> int:
    """An integer that a float can hold too, so that it can be compared with any number."""
    if len(digits) > _MOST_DIGITS:
        raise _unreadable()
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _unreadable()
    return value


def _unreadable() -> Refused:
    return Refused(400, "invalid JSON: a number that is too large")


def _refuse_constant(word: str) -> NoReturn:
    raise Refused(400, f"invalid JSON: {word} is not a number of JSON")


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


def _put_back(body: dict[str, Any], mark: str, views: list[memoryview]) -> None:
    """What was cut out, in its places: as it is in fields of images, else as text."""

    def restored(found: Any, is_image: bool) -> Any:
        if isinstance(found, str) and found.startswith(mark) and found[len(mark) :].isdecimal():
            view = views[int(found[len(mark) :])]
            return view if is_image else str(view, "ascii")
        return found

    # Containers, each with whether an image is expected in it.
    rest: list[tuple[Any, bool]] = [(body, True)]
    while rest:
        outer, expected = rest.pop()
        for name, inner in list(outer.items() if isinstance(outer, dict) else enumerate(outer)):
            is_image = expected and (name in _PLACES or not isinstance(name, str))
            if isinstance(inner, (dict, list)):
                rest.append((inner, is_image))
            else:
                is_image = is_image and (name in _FIELDS or not isinstance(name, str))
                outer[name] = restored(inner, is_image)
            if isinstance(name, str) and (own := restored(name, False)) != name:
                outer[own] = outer.pop(name)
