"""The package `ollama` of PyPI, with and without asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx
import ollama
import pytest
from asked import GREEDY, KEY, MODEL, QUESTION, SCHEMA, TAGGED
from pydantic import BaseModel
from serving import EXAMPLES, image64

APPLE = EXAMPLES / "apple.png"


@pytest.fixture
def client(url: str) -> ollama.Client:
    return ollama.Client(host=url, timeout=60)


def asked(image: Any = APPLE) -> list[dict[str, Any]]:
    return [{"role": "user", "content": QUESTION, "images": [image]}]


def test_models(client: ollama.Client) -> None:
    (one,) = client.list().models
    assert one.model == TAGGED and one.size > 0 and isinstance(one.modified_at, datetime)
    shown = client.show(MODEL)
    assert shown.capabilities is not None and {"completion", "vision"} <= set(shown.capabilities)
    assert shown.modelinfo is not None and shown.modelinfo["general.architecture"] == "mllama"
    assert client.pull(MODEL).status == "success"
    assert [one.status for one in client.pull(MODEL, stream=True)][-1] == "success"


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "base64"])
def test_an_image_however_it_is_given(
    client: ollama.Client, expected: Callable[[str, str], str], kind: str
) -> None:
    image = {"path": APPLE, "text": str(APPLE), "bytes": APPLE.read_bytes(), "base64": image64()}[kind]
    found = client.chat(MODEL, asked(image), options=GREEDY)
    assert found.message.content == expected("apple.png", QUESTION)
    assert found.done and found.done_reason == "stop" and found.model == MODEL
    assert found.prompt_eval_count and found.eval_count and found.total_duration


def test_a_stream_is_the_whole(client: ollama.Client) -> None:
    whole = client.chat(MODEL, asked(), options=GREEDY)
    pieces = list(client.chat(MODEL, asked(), options=GREEDY, stream=True))
    assert len(pieces) > 2
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].done and pieces[-1].eval_count == whole.eval_count
    told = client.generate(MODEL, QUESTION, images=[APPLE], options=GREEDY)
    parts = list(client.generate(MODEL, QUESTION, images=[APPLE], options=GREEDY, stream=True))
    assert "".join(part.response for part in parts) == told.response == whole.message.content
    assert parts[-1].context == told.context


def test_a_schema_is_obeyed(client: ollama.Client) -> None:
    class Fruit(BaseModel):
        colour: str
        count: int

    found = client.chat(MODEL, asked(), format=SCHEMA, options=GREEDY)
    fruit = Fruit.model_validate_json(found.message.content or "")
    assert fruit.colour in ("red", "blue") and fruit.count <= 9
    found = client.chat(
        MODEL, asked(), format=Fruit.model_json_schema(), options=GREEDY | {"num_predict": 200}
    )
    assert found.done_reason == "length" or Fruit.model_validate_json(found.message.content or "")


def test_options_by_ollamas_names(client: ollama.Client) -> None:
    told = ollama.Options(num_ctx=2048, num_predict=2, seed=7, top_k=20, repeat_penalty=1.2, stop=["zzz"])
    found = client.chat(MODEL, asked(), options=told)
    assert found.eval_count == 2 and found.done_reason == "length"


def test_a_reply_that_is_begun(client: ollama.Client, expected: Callable[[str, str], str]) -> None:
    whole = expected("apple.png", QUESTION)
    begun = {"role": "assistant", "content": whole[:5]}
    found = client.chat(MODEL, [*asked(), begun], options=GREEDY)
    assert whole[:5] + (found.message.content or "") == whole


def test_several_images(client: ollama.Client) -> None:
    two = [APPLE, EXAMPLES / "apple-and-cat.png"]
    messages = [{"role": "user", "content": QUESTION, "images": two}]
    found = client.chat(MODEL, messages, options=GREEDY)
    one = client.chat(MODEL, asked(), options=GREEDY)
    assert found.message.content and found.prompt_eval_count == (one.prompt_eval_count or 0) + 1


def test_context_goes_on(client: ollama.Client) -> None:
    first = client.generate(MODEL, QUESTION, images=[APPLE], options=GREEDY)
    second = client.generate(MODEL, QUESTION, context=first.context, options=GREEDY)
    assert second.response and second.context is not None and first.context is not None
    assert list(second.context)[: len(first.context)] == list(first.context)


def test_keep_alive(client: ollama.Client) -> None:
    client.generate(MODEL, keep_alive="1h")
    (one,) = client.ps().models
    assert one.model == TAGGED and one.expires_at is not None
    assert 3500 < (one.expires_at - datetime.now(one.expires_at.tzinfo)).total_seconds() <= 3600
    for value in (-1, "-1m", 300, "300s", 0.5e3):
        client.chat(MODEL, [{"role": "user", "content": "x"}], options={"num_predict": 1}, keep_alive=value)
    assert client.generate(MODEL, keep_alive=0).done_reason == "unload"


def test_log_probabilities(client: ollama.Client) -> None:
    found = client.chat(MODEL, asked(), options=GREEDY, logprobs=True, top_logprobs=2)
    assert found.logprobs is not None and len(found.logprobs) == found.eval_count
    assert all(len(one.top_logprobs or ()) == 2 for one in found.logprobs)


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (lambda c: c.chat("nobody", asked()), 404, "model 'nobody' not found"),
        (lambda c: c.chat("nobody", asked(), stream=True), 404, "model 'nobody' not found"),
        (lambda c: c.chat(MODEL, asked(b"no image")), 400, "image"),
        (lambda c: c.chat(MODEL, asked(), options={"top_k": "many"}), 400, "options.top_k"),
        (lambda c: c.chat(MODEL, asked(), format={"type": "nothing"}), 400, "type"),
        (lambda c: c.chat(MODEL, asked(), keep_alive="soon"), 400, "keep_alive"),
        (lambda c: c.chat(MODEL, asked(), think=True), 400, "does not support thinking"),
        (lambda c: c.chat(MODEL, asked(), tools=[max_of]), 400, "does not support tools"),
        (lambda c: c.embed(MODEL, "text"), 501, "does not support embeddings"),
        (lambda c: c.delete(MODEL), 501, "does not change models"),
        (lambda c: c.create("other", from_=MODEL), 501, "does not change models"),
        (lambda c: c.pull("nobody"), None, ""),
    ],
)
def test_errors(client: ollama.Client, call: Callable[[Any], Any], status: int | None, words: str) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        list(call(client))
    assert words in caught.value.error and "{" not in caught.value.error
    assert status is None or caught.value.status_code == status


def max_of(a: int, b: int) -> int:
    """The larger of two numbers.

    Args:
        a: one
        b: the other
    """
    return max(a, b)


def test_a_key(locked: str) -> None:
    with pytest.raises(ollama.ResponseError, match="a key is needed") as caught:
        ollama.Client(host=locked).list()
    assert caught.value.status_code == 401
    client = ollama.Client(host=locked, headers={"Authorization": f"Bearer {KEY}"})
    assert client.list().models


def test_nobody_there(url: str) -> None:
    with pytest.raises(ConnectionError):
        ollama.Client(host="http://127.0.0.1:9").list()


def test_asyncio(url: str, expected: Callable[[str, str], str]) -> None:
    text = expected("apple.png", QUESTION)

    async def talk() -> None:
        client = ollama.AsyncClient(host=url, timeout=60)
        assert (await client.list()).models[0].model == TAGGED
        whole = await client.chat(MODEL, asked(), options=GREEDY)
        assert whole.message.content == text
        pieces = [part async for part in await client.chat(MODEL, asked(), options=GREEDY, stream=True)]
        assert "".join(part.message.content or "" for part in pieces) == text
        many = await asyncio.gather(*(client.chat(MODEL, asked(), options=GREEDY) for _ in range(6)))
        assert {one.message.content for one in many} == {text}
        found = await client.generate(MODEL, "x", format=SCHEMA, options=GREEDY)
        assert found.response.startswith("{")
        with pytest.raises(ollama.ResponseError):
            await client.chat("nobody", asked())
        with pytest.raises(ollama.ResponseError):
            async for _ in await client.chat("nobody", asked(), stream=True):
                pass

    asyncio.run(talk())


def test_a_reader_who_stops(client: ollama.Client, url: str) -> None:
    """A stream that is left in its middle frees the model for the next request."""
    pieces = client.generate(MODEL, "x", stream=True, format={"type": "string", "minLength": 9000})
    next(pieces)
    pieces.close()
    assert client.chat(MODEL, asked(), options=GREEDY).done
    assert "mllama_requests_processing 0.0" in httpx.get(f"{url}/metrics").text
