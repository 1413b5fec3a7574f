"""/v1/responses, with the demo model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from serving import Running, data_uri

from mllama_gguf.server.problems import Refused
from mllama_gguf.server.responses import ResponseWriter
from mllama_gguf.text.tools import Tools

QUESTION = "What is this?"
TOOL = {
    "type": "function",
    "name": "paint",
    "description": "Paint it.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}


def respond(**more: Any) -> dict[str, Any]:
    parts = [{"type": "input_image", "image_url": data_uri()}, {"type": "input_text", "text": QUESTION}]
    return {"model": "demo", "input": [{"role": "user", "content": parts}], "temperature": 0, **more}


def test_a_response(served: Running, expected: Callable[..., str]) -> None:
    found = served.post("/v1/responses", respond(instructions=None, store=True)).json()
    assert found["object"] == "response" and found["status"] == "completed"
    (item,) = found["output"]
    assert item["type"] == "message" and item["role"] == "assistant"
    assert item["content"][0]["text"] == expected("apple.png", QUESTION)
    assert found["usage"]["output_tokens"] >= 3
    text = served.post("/v1/responses", respond(max_output_tokens=2)).json()
    assert text["status"] == "incomplete" and text["incomplete_details"] == {"reason": "max_output_tokens"}


def events_of(served: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    events = []
    for frame in served.post("/v1/responses", body | {"stream": True}).text.strip().split("\n\n"):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    return events


def test_a_response_as_a_stream(served: Running, expected: Callable[..., str]) -> None:
    events = events_of(served, respond())
    kinds = [one["type"].removeprefix("response.") for one in events]
    n = kinds.count("output_text.delta")
    first = ["created", "in_progress", "output_item.added", "content_part.added"]
    last = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds == [*first, *["output_text.delta"] * n, *last] and n > 1
    assert "".join(one.get("delta", "") for one in events) == expected("apple.png", QUESTION)


def test_a_long_response_comes_in_pieces(served: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 900}}, "required": ["a"]}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    events = events_of(served, respond(text=form, max_output_tokens=300))
    pieces = [one["delta"] for one in events if one["type"] == "response.output_text.delta"]
    assert 1 < len(pieces) < 300  # 33 ms of tokens each


def test_a_response_in_a_form(served: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    found = served.post("/v1/responses", respond(text=form)).json()
    assert json.loads(found["output"][0]["content"][0]["text"])["n"] in (1, 2)


def test_responses_are_not_kept(served: Running) -> None:
    for more in (
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
        {"input": 5},
        {"tools": [{"type": "function", "function": {"name": "x"}}]},
        {"tools": [5]},
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL]}},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"type": "function_call", "call_id": "a", "name": "paint", "arguments": "{"}]},
        {"input": [{"type": "function_call", "call_id": 5, "name": "paint", "arguments": "{}"}]},
    ):
        answer = served.post("/v1/responses", respond(**more))
        assert answer.status_code == 400, more
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert served.get("/v1/responses/resp_1").status_code == 404


# ---- tools -------------------------------------------------------------------------------------------------


def test_a_tool_is_called_and_answers(served: Running) -> None:
    body = respond(tools=[TOOL], tool_choice="required", max_output_tokens=100)
    found = served.post("/v1/responses", body).json()
    (call,) = found["output"]
    assert call["type"] == "function_call" and call["name"] == "paint" and call["status"] == "completed"
    assert json.loads(call["arguments"])["colour"] in ("red", "blue")
    assert found["tools"] == [TOOL] and found["tool_choice"] == "required"
    again = [
        *body["input"],
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"},
    ]
    (item,) = served.post("/v1/responses", body | {"input": again, "tool_choice": "none"}).json()["output"]
    assert item["type"] == "message"
    named = {"type": "function", "name": "paint"}
    (other,) = served.post("/v1/responses", body | {"tool_choice": named}).json()["output"]
    assert other["name"] == "paint" and other["call_id"] != call["call_id"]


def test_a_call_as_a_stream(served: Running) -> None:
    events = events_of(served, respond(tools=[TOOL], tool_choice="required", max_output_tokens=100))
    assert [one["type"].removeprefix("response.") for one in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    (call,) = events[-1]["response"]["output"]
    assert events[2]["item"] == {**call, "status": "in_progress", "arguments": ""}
    assert events[3]["delta"] == events[4]["arguments"] == call["arguments"]
    assert events[5]["item"] == call and {one["item_id"] for one in events[3:5]} == {call["id"]}


def test_calls_that_follow_each_other_are_one_message() -> None:
    from mllama_gguf.server.images import ImageLimits
    from mllama_gguf.server.responses import request

    def item(n: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{n}", "name": "paint", "arguments": "{}"}

    def answer(n: int) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": f"c{n}", "output": f"o{n}"}

    given = [
        {"role": "user", "content": "x"},
        {"type": "reasoning", "id": "r", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I paint."}]},
        *(item(1), item(2), answer(1), answer(2), item(3), answer(3)),
    ]
    wish = request({"model": "m", "input": given, "tools": [TOOL]}, ImageLimits(), allow_gbnf=False)
    shown = [(one["role"], len(one.get("tool_calls", ()))) for one in wish.ask.messages]
    tool = ("tool", 0)
    assert shown == [("user", 0), ("assistant", 0), ("assistant", 2), tool, tool, ("assistant", 1), tool]
    assert wish.tools.names == ("paint",)


def test_text_that_is_no_call_is_a_message(served: Running) -> None:
    talk = {"model": "demo", "input": "hello", "temperature": 0, "tools": [TOOL], "max_output_tokens": 8}
    (item,) = served.post("/v1/responses", talk).json()["output"]
    assert item["type"] == "message"
    told = events_of(served, talk)
    assert "".join(one.get("delta", "") for one in told) == item["content"][0]["text"]
    assert told[-1]["response"]["output"][0]["content"] == item["content"]


def test_an_error_before_the_first_text() -> None:
    """OpenAI's client wants response.created first."""
    writer = ResponseWriter("demo", {"input": "x"}, Tools())
    names = [
        line for line in writer.failure(Refused(400, "too long")).decode().splitlines() if "event" in line
    ]
    assert names == ["event: response.created", "event: response.in_progress", "event: response.failed"]
