"""Calls of tools in replies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import Mllama, RequestError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Köln", "Rom"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
QUESTION = [
    {
        "role": "user",
        "content": [{"type": "image", "image": noisy_image(1)}, {"type": "text", "text": "the dog"}],
    }
]
REQUIRED: dict[str, Any] = {"tools": [WEATHER, TIME], "tool_choice": "required"}


@pytest.fixture(scope="module")
def model(tiny_files: Callable[[str], TinyFiles]) -> Iterator[Mllama]:
    with Mllama(tiny_files("gqa").one, n_ctx=1024, n_threads=1, image_cache=False) as opened:
        yield opened


def saying(text: str) -> dict[str, Any]:
    """Options with which the reply is this text."""
    return {"grammar": f"root ::= {json.dumps(text)}"}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "seed": 4}])
def test_a_call_that_is_required(model: Mllama, options: dict[str, Any]) -> None:
    (choice,) = model.create_chat_completion(QUESTION, **REQUIRED, **options)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert set(call) == {"id", "type", "function"}
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    arguments = json.loads(call["function"]["arguments"])
    schemas = {"weather": WEATHER["function"]["parameters"], "time": {"maxProperties": 0}}  # type: ignore[index]
    jsonschema.validate(arguments, schemas[call["function"]["name"]])


def test_a_call_of_one_tool(model: Mllama) -> None:
    for name in ("weather", "time"):
        named = {**REQUIRED, "tool_choice": {"type": "function", "function": {"name": name}}}
        (choice,) = model.create_chat_completion(QUESTION, **named)["choices"]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == name


def test_calls_in_chunks(model: Mllama) -> None:
    options = {**REQUIRED, "temperature": 1.5, "seed": 3, "logprobs": True}
    (whole,) = model.create_chat_completion(QUESTION, **options)["choices"]
    chunks = list(model.create_chat_completion(QUESTION, stream=True, **options))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    (delta,) = deltas[1:-1]
    ((call,), (expected,)) = delta["tool_calls"], whole["message"]["tool_calls"]
    assert call["index"] == 0
    assert call["function"] == expected["function"]
    told = [
        one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert len(told) == len(whole["logprobs"]["content"]) > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "time"}', ["time"]),
        ('{"name": "time"}; {"name": "weather", "parameters": {"city": "Rom"}}', ["time", "weather"]),
        ('{"name": "other"}', None),
        ("the cat", None),
        ("[the cat]", None),
        (' {"a": 1} ', None),
    ],
)
def test_calls_that_are_not_required(model: Mllama, text: str, calls: list[str] | None, stream: bool) -> None:
    options: dict[str, Any] = {"tools": [WEATHER, TIME], **saying(text)}
    if stream:
        content, names, reason = "", [], None
        for chunk in model.create_chat_completion(QUESTION, stream=True, **options):
            (choice,) = chunk["choices"]
            content += choice["delta"].get("content") or ""
            names += [call["function"]["name"] for call in choice["delta"].get("tool_calls", [])]
            reason = choice["finish_reason"]
    else:
        (choice,) = model.create_chat_completion(QUESTION, **options)["choices"]
        content, reason = choice["message"]["content"] or "", choice["finish_reason"]
        names = [call["function"]["name"] for call in choice["message"].get("tool_calls", [])]
    assert (content, names, reason) == (("", calls, "tool_calls") if calls else (text, [], "stop"))


def test_text_is_not_held_back(model: Mllama) -> None:
    options: dict[str, Any] = {"tools": [TIME], "grammar": "root ::= [a-z ] root", "max_tokens": 9}
    chunks = list(model.create_chat_completion(QUESTION, stream=True, **options))
    assert sum("content" in chunk["choices"][0]["delta"] for chunk in chunks) > 4


def test_one_call_at_a_time(model: Mllama) -> None:
    options: dict[str, Any] = {"tools": [TIME], **saying('{"name": "time"}; {"name": "time"}')}
    for parallel, n in ((None, 2), (True, 2), (False, 1)):
        (choice,) = model.create_chat_completion(QUESTION, parallel_tool_calls=parallel, **options)["choices"]
        assert len(choice["message"]["tool_calls"]) == n


def test_a_call_that_was_cut_is_text(model: Mllama) -> None:
    (choice,) = model.create_chat_completion(QUESTION, max_tokens=3, **REQUIRED)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


def test_without_tools_a_reply_is_no_call(model: Mllama) -> None:
    for options in ({}, {"tools": []}, {"tools": [TIME], "tool_choice": "none"}):
        (choice,) = model.create_chat_completion(QUESTION, **options, **saying('{"name": "time"}'))["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", '{"name": "time"}')
    tokens = [
        model.create_chat_completion(QUESTION, max_tokens=1, **options)["usage"]["prompt_tokens"]
        for options in ({}, {"tools": [TIME], "tool_choice": "none"}, {"tools": [TIME]})
    ]
    assert tokens[0] == tokens[1] < tokens[2]


def test_a_whole_round(model: Mllama) -> None:
    """The reply goes back as it came, with the tool's answer."""
    reply = model.create_chat_completion(QUESTION, **REQUIRED)
    message = reply["choices"][0]["message"]
    answer = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    again = model.create_chat_completion([*QUESTION, message, answer], tools=[WEATHER, TIME], max_tokens=3)
    assert again["usage"]["prompt_tokens"] > reply["usage"]["total_tokens"]
    # The call is written as the model wrote it, but for what was between the parts of its JSON.
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= reply["usage"]["prompt_tokens"]


def test_what_excludes_each_other(model: Mllama) -> None:
    with pytest.raises(RequestError, match="tool_choice excludes response_format"):
        model.create_chat_completion(QUESTION, **REQUIRED, response_format={"type": "json_object"})


def test_a_reply_goes_on_with_the_last_message(model: Mllama) -> None:
    whole = model.caption(noisy_image(1), "the dog", max_tokens=12, grammar="root ::= [a-z ] root")
    begun = [*QUESTION, {"role": "assistant", "content": whole[:5]}]
    for wanted in (None, True):
        reply = model.create_chat_completion(
            begun, max_tokens=4, grammar="root ::= [a-z ] root", continue_final_message=wanted
        )
        usage = reply["usage"]
        assert reply["choices"][0]["message"]["content"]
    prompt = model.create_chat_completion(QUESTION, max_tokens=1)["usage"]["prompt_tokens"]
    n_begun = len(model.tokenize(whole[:5], add_bos=False))
    assert usage["prompt_tokens"] == prompt + n_begun  # nothing closes it
    closed = model.create_chat_completion(begun, max_tokens=1, continue_final_message=False)
    assert closed["usage"]["prompt_tokens"] > usage["prompt_tokens"]
    with pytest.raises(RequestError, match="continue_final_message"):
        model.create_chat_completion(QUESTION, continue_final_message=True)
    with pytest.raises(RequestError, match="continue_final_message must be"):
        model.create_chat_completion(begun, continue_final_message="yes")


def test_variables_of_the_template(model: Mllama) -> None:
    for wrong in ("x", [1], {1: 2}, {"messages": []}):
        with pytest.raises(RequestError, match="chat_template_kwargs"):
            model.create_chat_completion(QUESTION, chat_template_kwargs=wrong)
    assert model.create_chat_completion(
        QUESTION, max_tokens=1, chat_template_kwargs={"date_string": "26 Jul 2024"}
    )
