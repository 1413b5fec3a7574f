"""langchain-ollama, which asks for a stream even where it gives the whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ollama
import pytest
from asked import MODEL, QUESTION, SCHEMA
from langchain_core.messages import HumanMessage
from langchain_ollama import ChatOllama, OllamaLLM
from serving import data_uri, image64


def asked() -> Any:
    image = {"type": "image_url", "image_url": data_uri()}
    return [HumanMessage(content=[{"type": "text", "text": QUESTION}, image])]


@pytest.fixture
def model(url: str) -> ChatOllama:
    return ChatOllama(model=MODEL, base_url=url, temperature=0, num_ctx=2048, validate_model_on_init=True)


def test_a_chat(model: ChatOllama, expected: Callable[[str, str], str]) -> None:
    whole = model.invoke(asked())
    assert whole.content == expected("apple.png", QUESTION)
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 2
    assert whole.response_metadata["done_reason"] == "stop"
    pieces = [str(part.content) for part in model.stream(asked())]
    assert "".join(pieces) == whole.content and len(pieces) > 2
    assert asyncio.run(model.ainvoke(asked())).content == whole.content
    assert {one.content for one in model.batch([asked()] * 3)} == {whole.content}


def test_a_schema_is_obeyed(model: ChatOllama) -> None:
    found: Any = model.with_structured_output({"title": "fruit", **SCHEMA}).invoke(asked())
    assert found["colour"] in ("red", "blue") and found["count"] <= 9


def test_generate(url: str, expected: Callable[[str, str], str]) -> None:
    model = OllamaLLM(model=MODEL, base_url=url, temperature=0)
    assert model.bind(images=[image64()]).invoke(QUESTION) == expected("apple.png", QUESTION)


def test_errors(url: str) -> None:
    with pytest.raises(ollama.ResponseError, match="not found"):
        ChatOllama(model="nobody", base_url=url).invoke("x")
    with pytest.raises(ValueError, match="nobody"):
        ChatOllama(model="nobody", base_url=url, validate_model_on_init=True)
