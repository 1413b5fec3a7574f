"""Replies in the shapes of OpenAI's chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ..text.logprobs import TokenLogprob
from ..text.tools import Tools, call_id, find_calls, may_be_call
from ..words import as_json
from .reply import Reply
from .writer import Stats

_NO_TOOLS = Tools()


def completion(replies: Sequence[Reply], model: str, *, tools: Tools = _NO_TOOLS) -> dict[str, Any]:
    """Whole replies to one prompt as a `chat.completion`; beside OpenAI's fields it has timings.

    tools: of the request, to find the calls in the replies
    """
    head = _head("chat.completion", model)
    choices = []
    for index, reply in enumerate(replies):
        text = reply.read()
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        calls = tool_calls(reply, text, tools)
        if calls:
            message |= {"content": None, "tool_calls": calls}
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": shown_logprobs(reply.logprobs),
                "finish_reason": "tool_calls" if calls else reply.finish_reason,
            }
        )
    stats = together([reply.stats for reply in replies])
    return {**head, "choices": choices, "usage": usage(stats), "timings": timings(stats)}


def chunks(
    replies: Sequence[Reply], model: str, *, tools: Tools = _NO_TOOLS, include_usage: bool | None = None
) -> Iterator[dict[str, Any]]:
    """Replies to one prompt as `chat.completion.chunk`s, one reply after the other. A reply that may be a
    call of a tool is held back until it is known whether it is one.

    tools:         of the request
    include_usage: True: at the end a chunk of its own, without choices, has usage and timings; False: there
                   are none; None: the last chunk has them
    """
    head = _head("chat.completion.chunk", model)
    if include_usage:
        head["usage"] = None

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Sequence[TokenLogprob] = (), finish: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": shown_logprobs(logprobs),
            "finish_reason": finish,
        }
        return {**head, "choices": [choice]}

    for index, reply in enumerate(replies):
        yield chunk(index, {"role": "assistant", "content": ""})
        n_told = 0  # logprobs
        held = ""
        is_held = bool(tools.names)
        for piece in reply:
            held += piece
            is_held = is_held and may_be_call(held)
            if not is_held:
                yield chunk(index, {"content": held}, reply.logprobs[n_told:])
                n_told, held = len(reply.logprobs), ""
        calls = tool_calls(reply, held, tools) if is_held else []
        if calls:
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            yield chunk(index, {"tool_calls": numbered}, reply.logprobs[n_told:])
            n_told = len(reply.logprobs)
        elif held:
            yield chunk(index, {"content": held}, reply.logprobs[n_told:])
            n_told = len(reply.logprobs)
        last = chunk(index, {}, reply.logprobs[n_told:], "tool_calls" if calls else reply.finish_reason)
        if include_usage is None and index == len(replies) - 1:
            last |= _figures(together([reply.stats for reply in replies]))
        yield last
    if include_usage:
        yield {**head, "choices": [], **_figures(together([reply.stats for reply in replies]))}


def tool_calls(reply: Reply, text: str, tools: Tools) -> list[dict[str, Any]]:
    """The calls that a whole reply consists of, in OpenAI's shape; []: it is not a call.

    text: of the reply
    """
    if not tools.names or reply.finish_reason != "stop":
        return []
    return shown_calls(text, tools)


def shown_calls(text: str, tools: Tools) -> list[dict[str, Any]]:
    """The calls that the text of a reply which has ended consists of, as `tool_calls`."""
    calls = find_calls(text, tools.names)
    return [
        {
            "id": call_id(),
            "type": "function",
            "function": {"name": name, "arguments": as_json(arguments)},
        }
        for name, arguments in calls[: 1 if tools.one_call else None]
    ]


def usage(stats: Stats) -> dict[str, Any]:
    """How many tokens a prompt and its replies have."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }


def timings(stats: Stats) -> dict[str, Any]:
    """How long replies took, and their speed."""
    return {"seconds": dict(stats.seconds), "tokens_per_second": stats.tokens_per_second}


def _figures(stats: Stats) -> dict[str, Any]:
    return {"usage": usage(stats), "timings": timings(stats)}


def together(stats: Sequence[Stats]) -> Stats:
    """What several replies to one prompt took. The prompt counts once."""
    first = stats[0]
    return Stats(
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens,
        completion_tokens=sum(one.completion_tokens for one in stats),
        seconds={name: sum(one.seconds[name] for one in stats) for name in first.seconds},
    )


def shown_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """In OpenAI's shape; None: there are none."""
    return {"content": [one.as_dict() for one in logprobs], "refusal": None} if logprobs else None


def _head(kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4()}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }
