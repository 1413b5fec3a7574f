"""Replies in the shapes of OpenAI's chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from .reply import Reply
from .writer import Stats


def completion(reply: Reply, model: str) -> dict[str, Any]:
    """The whole reply as a `chat.completion`."""
    head = _head("chat.completion", model)
    text = reply.read()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
        "finish_reason": reply.stats.finish_reason,
    }
    return {**head, "choices": [choice], **_figures(reply.stats)}


def chunks(reply: Reply, model: str) -> Iterator[dict[str, Any]]:
    """The reply as `chat.completion.chunk`s; the last one has finish_reason, usage and timings."""
    head = _head("chat.completion.chunk", model)

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice]}

    yield chunk({"role": "assistant"})
    for piece in reply:
        yield chunk({"content": piece})
    yield {**chunk({}, reply.stats.finish_reason), **_figures(reply.stats)}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model}


def _figures(stats: Stats) -> dict[str, Any]:
    return {
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "total_tokens": stats.prompt_tokens + stats.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
        },
        "timings": {"seconds": dict(stats.seconds), "tokens_per_second": stats.tokens_per_second},
    }
