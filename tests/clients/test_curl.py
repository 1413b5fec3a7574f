"""curl, as Ollama's documentation writes it: with -d alone the body's Content-Type is that of a form."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from asked import MODEL, QUESTION, SCHEMA, TAGGED
from serving import image64


def curl(url: str, *args: str, body: Any = None) -> str:
    command = ["curl", "-sS", url, *args]
    if body is not None:
        command += ["-d", "@-"]
    ran = subprocess.run(
        command, input=None if body is None else json.dumps(body), capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_chat(url: str, expected: Callable[[str, str], str]) -> None:
    message = {"role": "user", "content": QUESTION, "images": [image64()]}
    body = {"model": MODEL, "messages": [message], "options": {"temperature": 0}}
    lines = [json.loads(line) for line in curl(f"{url}/api/chat", body=body).splitlines()]
    text = "".join(line["message"]["content"] for line in lines)
    assert text == expected("apple.png", QUESTION) and lines[-1]["done"]
    whole = json.loads(curl(f"{url}/api/chat", body={**body, "stream": False}))
    assert whole["message"]["content"] == text


def test_generate(url: str, expected: Callable[[str, str], str]) -> None:
    body = {"model": MODEL, "prompt": QUESTION, "images": [image64()], "stream": False}
    found = json.loads(curl(f"{url}/api/generate", body={**body, "options": {"temperature": 0}}))
    assert found["response"] == expected("apple.png", QUESTION)
    found = json.loads(curl(f"{url}/api/generate", body={**body, "format": SCHEMA}))
    assert json.loads(found["response"])["colour"] in ("red", "blue")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["-H", "Content-Type: application/json"],
        ["-H", "Expect: 100-continue"],
        ["-H", "Transfer-Encoding: chunked"],
    ],
    ids=["form", "json", "expect", "chunked"],
)
def test_heads(url: str, args: list[str]) -> None:
    assert json.loads(curl(f"{url}/api/show", *args, body={"model": MODEL}))["model_info"]


def test_the_small_routes(url: str) -> None:
    assert curl(f"{url}/") == "Ollama is running"
    assert curl(f"{url}/", "-I").startswith("HTTP/1.1 200 ")
    assert json.loads(curl(f"{url}/api/version"))["version"]
    assert json.loads(curl(f"{url}/api/tags"))["models"][0]["name"] == TAGGED
    assert "models" in json.loads(curl(f"{url}/api/ps"))
    loaded = json.loads(curl(f"{url}/api/generate", body={"model": MODEL}))
    assert loaded["done_reason"] == "load"
    assert json.loads(curl(f"{url}/api/generate", body={"model": "nobody"})) == {
        "error": "model 'nobody' not found"
    }
    assert "error" in json.loads(curl(f"{url}/api/chat", "-X", "POST"))
    assert json.loads(curl(f"{url}/api/chat")) == {"error": "method not allowed"}


def test_openais_api(url: str, expected: Callable[[str, str], str]) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image64()}"}}
    content = [{"type": "text", "text": QUESTION}, image]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0}
    found = json.loads(curl(f"{url}/v1/chat/completions", body=body))
    assert found["choices"][0]["message"]["content"]
    body["messages"][0]["content"] = content[::-1]  # type: ignore[index]
    found = json.loads(curl(f"{url}/v1/chat/completions", body=body))
    assert found["choices"][0]["message"]["content"] == expected("apple.png", QUESTION)
    stream = curl(f"{url}/v1/chat/completions", "-N", body={**body, "stream": True})
    assert stream.endswith("data: [DONE]\n\n")
