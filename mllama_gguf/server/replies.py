"""Answers that are JSON, and errors in the shape of the API that was asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from .problems import Refused

_JSON = "application/json; charset=utf-8"
_NO_REPEAT = {"x-should-retry": "false"}  # OpenAI's clients obey it


# `json.dumps` with settings makes one for each value.
_PLAIN = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_ESCAPED = json.JSONEncoder(separators=(",", ":"))


def to_bytes(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which a request may hold, is written as an escape."""
    try:
        return _PLAIN.encode(value).encode()
    except UnicodeEncodeError:
        return _ESCAPED.encode(value).encode()


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON."""
    return Response(to_bytes(value), status, dict(headers or {}), media_type=_JSON)


def is_openai(path: str) -> bool:
    """Whether a path belongs to OpenAI's API."""
    return path == "/v1" or path.startswith("/v1/")


def openai_error(problem: Refused) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(problem.status)
    if kind is None:
        kind = "invalid_request_error" if problem.status < 500 else "server_error"
    return {
        "error": {
            "message": problem.words,
            "type": kind,
            "param": problem.param,
            "code": problem.code,
        }
    }


def error_reply(path: str, problem: Refused) -> Response:
    """The answer to a request that is refused."""
    headers = dict(problem.headers)
    if problem.again:
        headers["Retry-After"] = str(max(1, problem.seconds))
    elif problem.status >= 500 or problem.status in (408, 409, 429):
        headers |= _NO_REPEAT
    body = openai_error(problem) if is_openai(path) else {"error": problem.words}
    return json_reply(body, problem.status, headers)
