"""Bodies of requests: JSON, and the images that are cut out of it."""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import pytest

from mllama_gguf.server.bodies import parse_object
from mllama_gguf.server.images import ImageLimits, from_base64
from mllama_gguf.server.ollama_requests import chat
from mllama_gguf.server.openai_requests import chat as openai_chat
from mllama_gguf.server.problems import Refused

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 400
LIMITS = ImageLimits()
TEXT = base64.b64encode(PNG).decode()


def test_images_are_cut_out_and_everything_else_is_as_it_was() -> None:
    body: dict[str, Any] = {
        "images": [TEXT, "short", TEXT],
        "prompt": TEXT,  # no image, only long
        "image_url": {"url": f"data:image/png;base64,{TEXT}", "detail": "low"},
        TEXT: 1,
        "n": [1.5, None, True, {"deep": ["é\ud800", TEXT]}],
        "messages": [{"tool_calls": [{"url": TEXT}], "role": "x", "content": f'a"{TEXT}"'}],
        "format": {"url": TEXT, "images": [TEXT]},
        "metadata": {"image_url": TEXT},
        "quoted": f'"{TEXT}',
    }
    found = parse_object(json.dumps(body).encode())
    assert all(isinstance(found["images"][i], memoryview) for i in (0, 2))
    assert [from_base64(found["images"][i], "x", LIMITS) for i in (0, 2)] == [PNG, PNG]
    assert from_base64(found["image_url"]["url"], "x", LIMITS) == PNG
    found["images"], found["image_url"] = body["images"], body["image_url"]
    assert found == body


def test_a_mark_of_ours_cannot_be_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "mark")
    found = parse_object(json.dumps({"images": [TEXT], "prompt": "mark", "x": "mark9x"}).encode())
    assert (found["prompt"], found["x"]) == ("mark", "mark9x")


@pytest.mark.parametrize("text", [TEXT[:-1], TEXT + "=", TEXT[:-2] + "==", TEXT + "A"])
def test_base64_that_is_a_little_wrong(text: str) -> None:
    """Without padding it is taken; the same as for short images."""
    view = parse_object(json.dumps({"images": [text]}).encode())["images"][0]

    def read(one: Any) -> Any:
        try:
            return from_base64(one, "x", LIMITS)
        except Refused as e:
            return e.words

    assert read(view) == read(text)


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64,", "data:;base64,", "DATA:image/png;BASE64,", "data:x,", "data:image/png,"]
)
def test_data_uris(uri: str) -> None:
    view = parse_object(json.dumps({"url": uri + TEXT}).encode())["url"]
    assert isinstance(view, (memoryview, str))
    if "base64" not in uri.lower():
        with pytest.raises(Refused, match=";base64"):
            from_base64(view, "x", LIMITS)
    else:
        assert from_base64(view, "x", LIMITS) == PNG


@pytest.mark.parametrize("api", ["ollama", "openai"])
def test_an_image_is_copied_twice_at_most(api: str) -> None:
    """It is in memory as base64, which the request brought, and as the file."""
    image = PNG + bytes(4 << 20)
    text = base64.b64encode(image).decode()
    if api == "ollama":
        body: Any = {"model": "m", "messages": [{"role": "user", "content": "x", "images": [text]}]}
    else:
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
        body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    data = bytearray(json.dumps(body).encode())
    del body, text
    tracemalloc.start()
    try:
        found = parse_object(data)
        read = chat if api == "ollama" else openai_chat
        more: Any = {} if api == "ollama" else {"allow_gbnf": False}
        wish: Any = read(found, LIMITS, **more)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert wish.ask.messages[0]["content"][0]["image"] == image
    assert peak < 1.2 * len(image)
