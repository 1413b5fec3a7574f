"""OpenAI's API as its clients use it, with the demo model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from asked import QUESTION, TOOL
from serving import Running, data_uri, image64

CHAT = "/v1/chat/completions"


def content(name: str = "apple.png", **image: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": data_uri(name), **image}}
    return [part, {"type": "text", "text": QUESTION}]


def ask(**more: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": content()}],
        "temperature": 0,
        **more,
    }


def test_models(served: Running) -> None:
    found = served.get("/v1/models").json()
    assert found["object"] == "list"
    assert [one["id"] for one in found["data"]] == ["demo:latest", "other:latest"]
    one = served.get("/v1/models/demo").json()
    assert one == found["data"][0] and one["object"] == "model" and one["created"] > 1e9
    answer = served.get("/v1/models/gpt-5")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["type"] == "not_found_error"


def test_a_completion(served: Running, expected: Callable[..., str]) -> None:
    found = served.post(CHAT, ask()).json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    assert found["model"] == "demo" and found["created"] > 1e9
    (choice,) = found["choices"]
    text = expected("apple.png", QUESTION)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] >= 3 and "cached_tokens" in usage["prompt_tokens_details"]


def test_a_stream(served: Running, expected: Callable[..., str]) -> None:
    chunks = served.events(CHAT, ask(stream=True))
    assert all(one["object"] == "chat.completion.chunk" for one in chunks)
    assert len({(one["id"], one["created"]) for one in chunks}) == 1
    deltas = [one["choices"][0]["delta"] for one in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(one.get("content", "") for one in deltas) == expected("apple.png", QUESTION)
    assert [one["choices"][0]["finish_reason"] for one in chunks][-1] == "stop"
    assert not any("usage" in one for one in chunks)


def test_a_stream_with_its_usage(served: Running) -> None:
    *chunks, last = served.events(CHAT, ask(stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["usage"]["completion_tokens"] >= 3
    assert all(one["usage"] is None for one in chunks)


def test_an_image_url_may_be_a_text(served: Running, expected: Callable[..., str]) -> None:
    parts: list[Any] = [{"type": "image_url", "image_url": data_uri()}, {"type": "text", "text": QUESTION}]
    found = served.post(CHAT, ask(messages=[{"role": "user", "content": parts}])).json()
    assert found["choices"][0]["message"]["content"] == expected("apple.png", QUESTION)


def test_low_detail_is_one_tile(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllama_gguf.decode.conversation import Conversation

    prepare, tiles = Conversation.prepare_image, []

    def prepare_image(self: Conversation, image: Any) -> Any:
        tiles.append(prepare(self, image).n_tiles)
        return prepare(self, image)

    monkeypatch.setattr(Conversation, "prepare_image", prepare_image)
    for detail in ("low", "high", "auto"):
        message = {"role": "user", "content": content("apple-and-cat.png", detail=detail)}
        assert served.post(CHAT, ask(messages=[message])).is_success
    message = {"role": "user", "content": content("apple-and-cat.png")}
    for most in (1, 2, 99):
        assert served.post(CHAT, ask(messages=[message], max_tiles=most)).is_success
    low, high, auto, one, two, many = tiles[::2]  # decoded, and checked again
    assert low == one == 1 < two <= 2 and high == auto == many > 1
    assert served.post(CHAT, ask(messages=[message], max_tiles=0)).status_code == 400
    message = {"role": "user", "content": content(detail="best")}
    assert served.post(CHAT, ask(messages=[message])).status_code == 400


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "https://127.0.0.1/a.png",
        "file:///etc/passwd",
        "examples/apple.png",
        "/etc/hostname",
        "~/x.png",
        "data:image/png;base64,!!!!",
        "data:text/plain,hello",
        "data:",
        image64()[:100],
    ],
)
def test_other_addresses_are_no_images(served: Running, url: str) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    answer = served.post(CHAT, ask(messages=[message]))
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x", "images": [image64()]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "images": [image64()]}),
        ("/v1/completions", {"prompt": "x", "images": [image64()]}),
        ("/v1/responses", {"input": "x", "images": [image64()]}),
        ("/v1/responses", {"input": [{"role": "user", "content": "x", "images": [image64()]}]}),
    ],
)
def test_images_of_ollamas_shape_are_not_lost(served: Running, path: str, body: dict[str, Any]) -> None:
    answer = served.post(path, {"model": "demo", **body})
    assert answer.status_code == 400
    assert "images" in answer.json()["error"]["param"] and "image_url" in answer.json()["error"]["message"]


def test_no_images_of_ollamas_shape_are_no_error(served: Running) -> None:
    message = {"role": "user", "content": "x", "images": []}
    body = ask(messages=[message], images=None, max_tokens=1)
    assert served.post(CHAT, body).is_success


def test_response_formats(served: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    found = served.post(CHAT, ask(response_format=wrapped, max_tokens=200)).json()
    assert json.loads(found["choices"][0]["message"]["content"])["n"] in (1, 2)
    other = {"type": "json_object", "schema": schema}
    found = served.post(CHAT, ask(response_format=other, max_tokens=200)).json()
    assert json.loads(found["choices"][0]["message"]["content"])["n"] in (1, 2)
    assert served.post(CHAT, ask(response_format={"type": "text"})).is_success
    for grammar in ({"type": "gbnf", "grammar": 'root ::= "x"'}, {"type": "lark", "grammar": 'start: "x"'}):
        answer = served.post(CHAT, ask(response_format=grammar))
        assert answer.status_code == 400 and "--allow-gbnf" in answer.json()["error"]["message"]
    assert served.post(CHAT, ask(grammar='root ::= "x"')).status_code == 400


def test_several_replies(served: Running) -> None:
    body = ask(n=3, temperature=2.0, seed=1, max_tokens=12)
    found = served.post(CHAT, body).json()
    assert [one["index"] for one in found["choices"]] == [0, 1, 2]
    texts = [one["message"]["content"] for one in found["choices"]]
    assert len(set(texts)) > 1
    told = ["", "", ""]
    for one in served.events(CHAT, {**body, "stream": True}):
        told[one["choices"][0]["index"]] += one["choices"][0]["delta"].get("content", "")
    assert told == texts
    assert served.post(CHAT, ask(n=9)).status_code == 400


def test_logprobs(served: Running) -> None:
    found = served.post(CHAT, ask(logprobs=True, top_logprobs=2)).json()
    told = found["choices"][0]["logprobs"]["content"]
    assert len(told) == found["usage"]["completion_tokens"]
    assert "".join(bytes(one["bytes"]).decode() for one in told)
    assert all(len(one["top_logprobs"]) == 2 for one in told)
    chunks = served.events(CHAT, ask(logprobs=True, stream=True))
    told = [
        one for c in chunks if (c["choices"][0]["logprobs"]) for one in c["choices"][0]["logprobs"]["content"]
    ]
    assert len(told) == found["usage"]["completion_tokens"]


def test_stops_and_limits(served: Running) -> None:
    found = served.post(CHAT, ask(stop=[" apple"])).json()["choices"][0]
    assert " apple" not in found["message"]["content"] and found["finish_reason"] == "stop"
    found = served.post(CHAT, ask(max_completion_tokens=2, max_tokens=9)).json()
    assert found["usage"]["completion_tokens"] == 2
    assert found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": [{"role": "owl", "content": "x"}]}, "messages[0].role 'owl' is not known"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a string or a list"),
        ({"temperature": "x"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"n": 0}, "n must be a whole number from 1 to 8"),
        ({"response_format": {"type": "xml"}}, "'xml'"),
        ({"model": None}, "model is required"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_what_is_wrong_is_said(served: Running, more: dict[str, Any], words: str) -> None:
    answer = served.post(CHAT, ask(**more))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_a_context_that_is_too_long(served: Running) -> None:
    message = {"role": "user", "content": "the cat " * 5000}
    answer = served.post(CHAT, ask(messages=[message]))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_parameters_that_change_nothing(served: Running) -> None:
    more = {"user": "u", "store": False, "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True}
    unknown = {"keep_alive": "5m", "num_ctx": 4, "chat_template": "{{ x }}", "reasoning_effort": None}
    assert served.post(CHAT, ask(**more, **unknown)).is_success
    for wish in ({"reasoning_effort": "low"}, {"reasoning_effort": "high", "verbosity": "low"}):
        assert served.post(CHAT, ask(**wish)).is_success
    for odd in ({"reasoning_effort": "lwo"}, {"verbosity": 3}, {"reasoning_effort": ["low"]}):
        assert served.post(CHAT, ask(**odd)).status_code == 400


def test_roles(served: Running) -> None:
    talk: list[Any] = [{"role": "developer", "content": "be short"}, *ask()["messages"]]
    talk += [{"role": "assistant", "content": None}, {"role": "user", "content": "And?"}]
    assert served.post(CHAT, ask(messages=talk)).is_success


def test_text_completions(served: Running) -> None:
    body = {"model": "demo", "prompt": "a red", "temperature": 0, "max_tokens": 5}
    found = served.post("/v1/completions", body).json()
    assert found["object"] == "text_completion" and found["choices"][0]["text"]
    chunks = served.events("/v1/completions", {**body, "stream": True})
    assert "".join(one["choices"][0]["text"] for one in chunks) == found["choices"][0]["text"]
    assert served.post("/v1/completions", {**body, "best_of": 3}).status_code == 400
    assert served.post("/v1/completions", {**body, "prompt": [1, 2]}).status_code == 400


def test_embeddings(served: Running) -> None:
    answer = served.post("/v1/embeddings", {"model": "demo", "input": "x"})
    assert answer.status_code == 501
    assert answer.headers["x-should-retry"] == "false"


# ---- tools -------------------------------------------------------------------------------------------------


def test_a_tool_is_called(served: Running) -> None:
    body = ask(tools=[TOOL], tool_choice="required", max_tokens=100)
    (choice,) = served.post(CHAT, body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "paint"
    assert json.loads(call["function"]["arguments"])["colour"] in ("red", "blue")
    chunks = served.events(CHAT, {**body, "stream": True})
    deltas = [one["choices"][0]["delta"] for one in chunks]
    (told,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert told[0]["index"] == 0 and told[0]["function"] == call["function"]
    assert not any(delta.get("content") for delta in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    talk = [
        *body["messages"],
        {"role": "assistant", "content": None, "tool_calls": choice["message"]["tool_calls"]},
        {"role": "tool", "tool_call_id": call["id"], "content": "painted"},
    ]
    found = served.post(CHAT, ask(messages=talk, tools=[TOOL], tool_choice="none"))
    assert found.status_code == 200, found.text


def test_a_tool_that_is_not_called(served: Running, expected: Callable[..., str]) -> None:
    talk = [{"role": "user", "content": "hello"}]
    plain = served.post(CHAT, ask(messages=talk, tools=[TOOL])).json()["choices"][0]
    told = served.events(CHAT, ask(messages=talk, tools=[TOOL], stream=True))
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in told)
    assert text == (plain["message"]["content"] or "")
    assert served.post(CHAT, ask(tools=[TOOL, TOOL])).status_code == 400
    assert served.post(CHAT, ask(tools=[{"type": "function"}])).status_code == 400
    assert served.post(CHAT, ask(tool_choice="required")).status_code == 400


def test_held_text_is_shown_when_it_is_no_call() -> None:
    from mllama_gguf import Stats
    from mllama_gguf.server.jobs import Done, Ended, Piece
    from mllama_gguf.server.openai_replies import CompletionWriter
    from mllama_gguf.text.tools import read_tools

    def said(texts: list[str], tools: Any) -> tuple[list[Any], Any]:
        events: list[Any] = [Piece(text) for text in texts]
        events += [Ended(Stats("stop", 3, 0, 2)), Done(0.0, 0.0)]
        streamed = CompletionWriter("m", "chat", usage=False, tools=read_tools(tools))
        frames = b"".join(frame for event in events for frame in streamed.frames(event))
        chunks = [json.loads(one[6:]) for one in frames.decode().split("\n\n") if one.startswith("data: {")]
        whole = CompletionWriter("m", "chat", usage=False, tools=read_tools(tools)).whole(events)
        return [one["choices"][0]["delta"] for one in chunks], whole["choices"][0]["message"]

    deltas, message = said([" ", "{", '"x', '": 1}'], [TOOL])
    assert [delta for delta in deltas if delta.get("content")] == [{"content": ' {"x": 1}'}]
    assert message["content"] == ' {"x": 1}'
    deltas, _ = said(["no", " {", "x"], [TOOL])
    assert [delta["content"] for delta in deltas if delta.get("content")] == ["no", " {", "x"]
    call = '{"name": "paint", "parameters": {"colour": "red"}}'
    deltas, message = said([call[:9], call[9:]], [TOOL])
    assert deltas[1]["tool_calls"][0]["function"]["name"] == "paint" and message["content"] is None
    deltas, message = said([call], None)
    assert message["content"] == call
