"""The package `openai` of PyPI: chat, responses and models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from asked import KEY, MODEL, QUESTION, SCHEMA, TAGGED, TOOL
from pydantic import BaseModel
from serving import data_uri

FORM: Any = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": SCHEMA, "strict": True}}


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=60)


def asked(**image: Any) -> Any:
    part = {"type": "image_url", "image_url": {"url": data_uri(), **image}}
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == [TAGGED]
    one = client.models.retrieve(MODEL)
    assert one.id == TAGGED and one.object == "model" and one.created > 1e9
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_a_chat(client: openai.OpenAI, expected: Callable[[str, str], str]) -> None:
    found = client.chat.completions.create(model=MODEL, messages=asked(detail="auto"), temperature=0)
    text = expected("apple.png", QUESTION)
    assert found.choices[0].message.content == text and found.choices[0].finish_reason == "stop"
    assert found.usage is not None and found.usage.completion_tokens > 2
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=asked(), temperature=0, stream=True, stream_options=options
        )
    )
    told = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert told == text and chunks[-1].usage == found.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage and chunks[-1].usage.prompt_tokens_details}
    )
    with client.chat.completions.stream(model=MODEL, messages=asked(), temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == text


def test_a_schema_is_obeyed(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model=MODEL, messages=asked(), response_format=FORM, temperature=0)
    assert json.loads(found.choices[0].message.content or "")["colour"] in ("red", "blue")

    class Fruit(BaseModel):
        is_round: bool

    parsed = client.chat.completions.parse(model=MODEL, messages=asked(), response_format=Fruit)
    assert isinstance(parsed.choices[0].message.parsed, Fruit)


def test_tools(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=MODEL, messages=asked(), tools=[TOOL], tool_choice="required", max_tokens=100
    )
    message = found.choices[0].message
    assert found.choices[0].finish_reason == "tool_calls" and message.tool_calls
    call: Any = message.tool_calls[0]
    assert call.function.name == "paint" and json.loads(call.function.arguments)["colour"] in ("red", "blue")
    talk = [
        *asked(),
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "painted"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=talk, tools=[TOOL], max_tokens=5).choices
    with client.chat.completions.stream(
        model=MODEL, messages=asked(), tools=[TOOL], tool_choice="required", max_tokens=100
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.tool_calls


def test_what_openais_users_set(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, *asked(detail="high")],
        n=2,
        max_completion_tokens=3,
        seed=5,
        stop=["zzz"],
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logprobs=True,
        top_logprobs=2,
        user="somebody",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        extra_body={"top_k": 40, "min_p": 0.05},
    )
    assert len(found.choices) == 2
    for choice in found.choices:
        assert choice.finish_reason in ("length", "stop") and choice.logprobs is not None
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content or ())
    text = client.completions.create(model=MODEL, prompt="a red", max_tokens=3, temperature=0)
    assert text.choices[0].text
    parts = client.completions.create(model=MODEL, prompt="a red", max_tokens=3, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text


def test_responses(client: openai.OpenAI, expected: Callable[[str, str], str]) -> None:
    text = expected("apple.png", QUESTION)
    part = {"type": "input_image", "image_url": data_uri(), "detail": "auto"}
    items: Any = [{"role": "user", "content": [part, {"type": "input_text", "text": QUESTION}]}]
    found = client.responses.create(model=MODEL, input=items, temperature=0)
    assert found.output_text == text and found.status == "completed" and found.error is None
    assert found.usage is not None and found.usage.output_tokens > 2
    events = list(client.responses.create(model=MODEL, input=items, temperature=0, stream=True))
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == text
    assert events[-1].type == "response.completed" and events[-1].response.output_text == text
    with client.responses.stream(model=MODEL, input=items, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text
    form: Any = {"format": {"type": "json_schema", "name": "fruit", "schema": SCHEMA, "strict": True}}
    found = client.responses.create(model=MODEL, input="x", instructions="Be brief.", text=form)
    assert json.loads(found.output_text)["colour"] in ("red", "blue")
    talk: Any = [
        {"role": "user", "content": "hello"},
        *[one.model_dump(exclude_none=True) for one in found.output],
        {"role": "user", "content": "again"},
    ]
    assert client.responses.create(model=MODEL, input=talk, max_output_tokens=3).output


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "gpt-5"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 100}, openai.BadRequestError, "n must"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": asked(url="https://example.org/a.png")}, openai.BadRequestError, "image URLs are not"),
        ({"messages": asked(url="data:image/png;base64,AAAA")}, openai.BadRequestError, "not an image"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, openai.BadRequestError, "context"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_errors(
    url: str, more: dict[str, Any], kind: type[openai.APIStatusError], words: str, stream: bool
) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    body = {"model": MODEL, "messages": asked(), "stream": stream, **more}
    with pytest.raises(kind, match=words) as caught:
        client.chat.completions.create(**body)
    assert caught.value.type and caught.value.body


def test_what_is_useless_is_not_tried_again(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2)
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model=MODEL, input="x")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"


def test_a_key(locked: str) -> None:
    with pytest.raises(openai.AuthenticationError, match="a key is needed"):
        openai.OpenAI(base_url=f"{locked}/v1", api_key="another").models.list()
    assert openai.OpenAI(base_url=f"{locked}/v1", api_key=KEY).models.list().data


def test_asyncio(url: str, expected: Callable[[str, str], str]) -> None:
    async def talk() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as client:
            asks = [
                client.chat.completions.create(model=MODEL, messages=asked(), temperature=0) for _ in range(6)
            ]
            stream = await client.chat.completions.create(
                model=MODEL, messages=asked(), temperature=0, stream=True
            )
            told = "".join([part.choices[0].delta.content or "" async for part in stream])
            return [told, *[one.choices[0].message.content for one in await asyncio.gather(*asks)]]

    assert set(asyncio.run(talk())) == {expected("apple.png", QUESTION)}
