"""What else is refused. Each rule has a test that fails without it."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import EXAMPLES, Running, data_uri, image64, running

from mllama_gguf.errors import ImageError, ModelError, RequestError
from mllama_gguf.server.problems import Refused, clean, refusal
from mllama_gguf.server.settings import ServerSettings

CHAT = "/v1/chat/completions"


def chat(image: str, prompt: str = "x", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": prompt, "images": [image]}
    return {"model": "demo", "messages": [message], "stream": False, **more}


# ---- no path, no address -----------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image on this machine that no request may see."""
    path = tmp_path / "secret.png"
    path.write_bytes((EXAMPLES / "apple.png").read_bytes())
    return path


def test_no_text_of_a_request_opens_a_file(
    served: Running, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place of a request that takes an image, with every spelling of a path."""
    monkeypatch.chdir(secret.parent)
    for text in (
        str(secret),
        "secret.png",
        f"file://{secret}",
        f"file:{secret}",
        f" {secret} ",
        "./secret.png",
    ):
        assert served.post("/api/chat", chat(text)).status_code == 400
        body = {"model": "demo", "prompt": "x", "images": [text], "stream": False}
        assert served.post("/api/generate", body).status_code == 400
        assert served.post("/api/generate", {**body, "raw": True}).status_code == 400
        for part in (
            {"type": "image_url", "image_url": {"url": text}},
            {"type": "image_url", "image_url": text},
            {"type": "image", "image": text},
            {"type": "input_image", "image_url": text},
        ):
            message = {"role": "user", "content": [part]}
            assert served.post(CHAT, {"model": "demo", "messages": [message]}).status_code == 400
            assert served.post("/v1/responses", {"model": "demo", "input": [message]}).status_code == 400
    inside = base64.b64encode(str(secret).encode()).decode()
    assert served.post("/api/chat", chat(inside)).status_code == 400
    uri = base64.b64encode(data_uri().encode()).decode()
    assert served.post("/api/chat", chat(uri)).status_code == 400


def test_no_name_of_a_model_is_a_path(served: Running, tmp_path: Path) -> None:
    demo = Path(served.service.catalog.find("demo").files.text)
    for name in (
        str(demo),
        f"../{demo.name}",
        "ollama:../../x",
        "hf:a/b/c.gguf",
        "/etc/passwd",
        "x" * 400,
        "\ud800",
    ):
        for path in ("/api/chat", "/api/show", "/api/pull", CHAT):
            body = json.dumps({"model": name, "messages": [{"role": "user", "content": "x"}]})
            assert served.post(path, content=body).status_code in (400, 403, 404), (path, name)


def test_templates_are_not_taken(served: Running) -> None:
    body = {"model": "demo", "prompt": "x", "template": "{{ .Prompt }}"}
    assert served.post("/api/generate", body).status_code == 400


def test_pulls_go_to_one_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from mllama_gguf.server.pulling import reference_of

    assert reference_of("llama3.2-vision") == "ollama:llama3.2-vision:latest"
    assert reference_of("llama3.2-vision-11b") == "llama3.2-vision-11b"
    for name in (
        "http://evil.example/a/b",
        "evil.example/a/b:1",
        "127.0.0.1:80/a/b",
        "../x",
        "hf:a/b/c",
        "a/b/c/d",
        "somebody/llama3.2-vision",
    ):
        with pytest.raises(Refused) as e:
            reference_of(name)
        assert e.value.status in (400, 403), name


def test_a_hostile_schema_costs_one_request(served: Running) -> None:
    deep: Any = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}}
    for schema in (
        {"type": "string", "maxLength": 100_000_000},
        {"type": "array", "maxItems": 20_000, "items": {"type": "array", "maxItems": 20_000}},
        {"$ref": "#"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "(" * 5000},
        {"allOf": [{"$ref": "#"}] * 500},
        deep,
    ):
        body = {
            "model": "demo",
            "prompt": "x",
            "format": schema,
            "stream": False,
            "options": {"num_predict": 3},
        }
        assert served.post("/api/generate", body).status_code in (200, 400), schema
    assert served.post("/api/chat", chat(image64())).status_code == 200


# ---- words -------------------------------------------------------------------------------------------------


def test_errors_tell_no_addresses_and_no_folders(served: Running) -> None:
    """As Pillow's words would: cannot identify image file <_io.BytesIO object at 0x7f...>."""
    found = []
    for data in (
        b"\x89PNG\r\n\x1a\n" + bytes(99),
        b"\xff\xd8\xff" + bytes(99),
        b"GIF89a" + b"\x01" * 99,
        b"BMxx",
    ):
        answer = served.post("/api/chat", chat(base64.b64encode(data).decode()))
        assert answer.status_code == 400
        found.append(answer.text)
    for words in found:
        assert not re.search(r"0x[0-9a-f]{6,}", words), words
        assert "object at" not in words
    text = "A" * 40_000  # which is kept as a part of the request
    for body in ({"images": text}, {"images": [[text]]}, {"messages": [text]}, {"input": [text]}):
        for path in ("/api/generate", "/api/chat", CHAT, "/v1/responses"):
            words = served.post(path, {"model": "demo", "prompt": "x", **body}).text
            assert "memory" not in words and "0x" not in words, (path, words)
    told = (
        "cannot identify <_io.BytesIO object at 0x7f1234567890> in /home/me/models/x.gguf, see http://a.b/c/d"
    )
    assert clean(told) == "cannot identify <_io.BytesIO object > in x.gguf, see http://a.b/c/d"
    for error in (ImageError(told), ModelError(told), RequestError(told), ValueError(told)):
        assert "0x7f" not in refusal(error).words and "/home" not in refusal(error).words


def test_kinds_of_images(served: Running) -> None:
    """Decoders that few have tried are not offered to everybody."""
    kinds = {"PNG": 200, "JPEG": 200, "WEBP": 200, "GIF": 200, "BMP": 200, "TIFF": 200}
    for kind, status in {**kinds, "JPEG2000": 400, "ICO": 400, "PPM": 400}.items():
        file = io.BytesIO()
        Image.open(EXAMPLES / "apple.png").convert("RGB").save(file, kind)
        answer = served.post("/api/chat", chat(base64.b64encode(file.getvalue()).decode()))
        assert answer.status_code == status, kind


def test_base64_as_it_comes(served: Running) -> None:
    text = image64()
    for other in (
        f"data:image/png;base64,{text}",
        text.rstrip("="),
        text.replace("+", "-").replace("/", "_"),
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        f" {text} ",
    ):
        assert served.post("/api/chat", chat(other)).status_code == 200
    for wrong in ("", "=", "a", "ü" * 40, text[:41], None, 5, {"url": text}):
        assert served.post("/api/chat", chat(wrong)).status_code == 400, wrong  # type: ignore[arg-type]


def test_the_page_is_locked_up(served: Running) -> None:
    answer = served.get("/ui")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    for path in ("/ui/../app.py", "/ui/%2e%2e%2fapp.py", "/ui/..%2f..%2fapp.py", "/ui/nothing.js"):
        assert served.get(path).status_code == 404, path
    assert served.get("/api/tags").headers["x-content-type-options"] == "nosniff"


def test_no_fetching(served: Running) -> None:
    """No request of ours leaves the machine for an image."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = served.post(CHAT, {"model": "demo", "messages": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 400
        assert "please use base64 encoded data instead" in answer.json()["error"]["message"]
        with pytest.raises(TimeoutError):
            listener.accept()


def test_bodies_that_arrive_share_a_room() -> None:
    """Many clients that send much do not fill the memory; one alone may send what it is allowed."""
    with running(ServerSettings(port=0, max_waiting=100_000)) as served:
        body = json.dumps({"model": "demo", "prompt": "x", "stream": False, "unknown": "y" * 150_000})
        assert served.post("/api/generate", content=body).status_code == 200
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 10) as connection:
            head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n"
            connection.sendall(head + b" " * 60_000)
            bodies = served.service.bodies
            for _ in range(500):
                if bodies._taken == 60_000:
                    break
                time.sleep(0.01)
            answer = served.post("/api/generate", content=body)
            assert answer.status_code == 503 and "retry-after" in answer.headers
        for _ in range(500):
            if bodies._taken == 0:
                break
            time.sleep(0.01)
        assert served.post("/api/generate", content=body).status_code == 200
