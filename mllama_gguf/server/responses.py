"""/v1/responses, stateless: its requests as those of a chat, its answers as they are written.

Plain functions: no server, no model.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from ..decode.writer import Stats
from ..text.tools import Tools
from ..words import brief
from . import fields
from .images import ImageLimits
from .jobs import Done, Ended, Event, Piece
from .openai_replies import PING, Held
from .openai_requests import Wish, chat, model_of, refuse_images
from .problems import Refused
from .replies import openai_error, to_bytes


def request(body: Mapping[str, Any], limits: ImageLimits, *, allow_gbnf: bool) -> Wish:
    """A request of /v1/responses. Raises Refused, RequestError."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if body.get(name) is not None:
            raise Refused(
                400,
                f"{name}: this server keeps no responses; send the whole conversation",
                "unsupported",
                name,
            )
    if fields.flag(body, "background"):
        raise Refused(400, "background is not served", "unsupported", "background")
    messages: list[dict[str, Any]] = []
    if instructions := fields.text(body, "instructions"):
        messages.append({"role": "system", "content": instructions})
    given = body.get("input")
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list):
        for i, item in enumerate(given):
            _add_item(messages, i, item)
    else:
        raise fields.wrong("input", "a string or a list of items", given)
    asked: dict[str, Any] = {"model": model_of(body), "messages": messages, "stream": body.get("stream")}
    for name in ("temperature", "top_p", "seed", "stop", "images"):
        asked[name] = body.get(name)
    if tools := fields.items(body, "tools"):
        asked["tools"] = [_tool(i, tool) for i, tool in enumerate(tools)]
        asked["parallel_tool_calls"] = body.get("parallel_tool_calls")
    asked["tool_choice"] = _choice(body.get("tool_choice"))
    asked["max_tokens"] = fields.whole(body, "max_output_tokens", 1)
    asked["response_format"] = _format(fields.get(body, "text", dict, {}))
    return chat(asked, limits, allow_gbnf=allow_gbnf)


def _add_item(messages: list[dict[str, Any]], index: int, item: Any) -> None:
    """Add an item of the input to the messages. Calls that follow each other are one message."""
    where = f"input[{index}]"
    if not isinstance(item, dict):
        raise fields.wrong(where, "an object", item)
    kind = item.get("type", "message")
    if kind == "message":
        refuse_images(item, f"{where}.images")
        messages.append({"role": item.get("role", "user"), "content": item.get("content")})
    elif kind == "function_call":
        call = {
            "id": fields.text(item, "call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        if messages and "tool_calls" in messages[-1]:
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        told = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        messages.append(told)
    elif kind != "reasoning":  # of another model, for which this one has no place
        raise Refused(400, f"{where}: items of type {brief(kind)} are not served", "unsupported", where)


def _tool(index: int, tool: Any) -> Any:
    """A tool in the shape that chats have."""
    if not isinstance(tool, dict) or "function" in tool or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise Refused(
            400,
            f"tools[{index}]: tools of type {brief(kind)} are not served; use functions: "
            '{"type": "function", "name": ..., "parameters": ...}',
            "unsupported",
            "tools",
        )
    return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}


def _choice(given: Any) -> Any:
    """The tool_choice in the shape that chats have."""
    if isinstance(given, dict) and given.get("type") == "function" and "function" not in given:
        return {"type": "function", "function": {"name": given.get("name")}}
    return given


def _format(text: Mapping[str, Any]) -> dict[str, Any] | None:
    """The response_format of text.format."""
    form = text.get("format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise fields.wrong("text.format", "an object", form)
    if form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    return form


class ResponseWriter:
    """Writes a reply of /v1/responses."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, model: str, body: Mapping[str, Any], tools: Tools) -> None:
        """body: of the request, some of which is repeated in the answer; tools: that the reply may call."""
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._number = 0
        self._texts: list[str] = []
        self._stats: Stats | None = None
        self._held = Held(tools)
        self._calls: list[dict[str, Any]] = []  # items of the output, in place of a message
        self._opened = False  # the stream
        self._begun = False  # the message
        text = body.get("text")
        self._frame: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") if isinstance(body.get("metadata"), dict) else {},
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
            "text": text if isinstance(text, dict) and "format" in text else {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
            "truncation": "disabled",
            "background": False,
        }

    # ---- whole ---------------------------------------------------------------------------------------------

    def whole(self, events: Iterable[Event]) -> Any:
        for event in events:
            if isinstance(event, Piece):
                self._texts.append(event.text)
            elif isinstance(event, Ended):
                self._stats = event.stats
                self._take(self._held.calls("".join(self._texts), event))
        return self._response(self._status())

    def _take(self, calls: Iterable[Mapping[str, Any]]) -> None:
        """Calls of tools that the reply is, in the shape that chats have."""
        self._calls = [
            {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "status": "completed",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
            }
            for call in calls
        ]

    def _status(self) -> str:
        return (
            "incomplete" if self._stats is not None and self._stats.finish_reason == "length" else "completed"
        )

    def _response(self, status: str, error: Any = None) -> dict[str, Any]:
        stats = self._stats
        ended = status in ("completed", "incomplete")
        return {
            **self._frame,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": (self._calls or [self._item(status)]) if ended else [],
            "usage": None
            if stats is None
            else {
                "input_tokens": stats.prompt_tokens,
                "input_tokens_details": {"cached_tokens": stats.cached_tokens},
                "output_tokens": stats.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": stats.prompt_tokens + stats.completion_tokens,
            },
        }

    def _item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part("".join(self._texts))]
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    # ---- streams -------------------------------------------------------------------------------------------

    def frames(self, event: Event) -> Iterable[bytes]:
        if isinstance(event, Piece):
            return (*self._open(), *self._shown(self._held.add(event)))
        if isinstance(event, Ended):
            self._stats = event.stats
            rest, calls = self._held.end(event)
            self._take(calls)
            return (*self._open(), *self._shown(None if calls else rest))
        if isinstance(event, Done):
            return (*self._open(), *self._end())
        return ()

    def _shown(self, piece: Piece | None) -> Iterable[bytes]:
        if piece is not None:
            self._texts.append(piece.text)
            yield from self._begin()
            yield self._delta(piece.text)

    def ping(self) -> bytes:
        return PING

    def failure(self, problem: Refused) -> bytes:
        error = openai_error(problem)["error"]
        told = {"code": error["code"] or "server_error", "message": error["message"]}
        begun = b"".join(self._open())
        return begun + self._event("response.failed", response=self._response("failed", told))

    def _open(self) -> Iterable[bytes]:
        if self._opened:
            return
        self._opened = True
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def _begin(self) -> Iterable[bytes]:
        if self._begun:
            return
        self._begun = True
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress"))
        yield self._event("response.content_part.added", **self._place, part=self._part(""))

    def _delta(self, text: str) -> bytes:
        return self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def _end(self) -> Iterable[bytes]:
        if self._calls:
            yield from self._told_calls()
        else:
            yield from self._end_of_message()
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _told_calls(self) -> Iterable[bytes]:
        for index, item in enumerate(self._calls):
            place = {"item_id": item["id"], "output_index": index}
            begun = {**item, "status": "in_progress", "arguments": ""}
            yield self._event("response.output_item.added", output_index=index, item=begun)
            yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
            yield self._event(
                "response.function_call_arguments.done",
                **place,
                name=item["name"],
                arguments=item["arguments"],
            )
            yield self._event("response.output_item.done", output_index=index, item=item)

    def _end_of_message(self) -> Iterable[bytes]:
        text, status = "".join(self._texts), self._status()
        yield from self._begin()
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item(status))

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **more: Any) -> bytes:
        data = to_bytes({"type": kind, "sequence_number": self._number, **more})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
