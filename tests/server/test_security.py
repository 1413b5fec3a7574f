"""Each rule of security has a test that fails without it."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import EXAMPLES, Running, data_uri, picture64, running

from mllama_gguf.cli.main import run
from mllama_gguf.errors import ImageError, ModelError, RequestError
from mllama_gguf.server.images import ImageLimits
from mllama_gguf.server.problems import Refused, clean, refusal
from mllama_gguf.server.security import Security
from mllama_gguf.server.settings import ServerSettings, digest_of, parse_host, read_keys

CHAT = "/v1/chat/completions"


def chat(image: str, prompt: str = "x", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": prompt, "images": [image]}
    return {"model": "demo", "messages": [message], "stream": False, **more}


def raw(served: Running, request: bytes, seconds: float = 10.0) -> bytes:
    """The answer to bytes that no client would send."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), seconds) as connection:
        found = b""
        with suppress(OSError):  # the server hangs up before it has read all
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                found += data
        return found


# ---- who asks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:11434", "8.8.8.8", "localhost.evil.example", "a b"]
)
def test_a_foreign_name_is_refused(served: Running, host: str) -> None:
    """A page elsewhere lets its own name point to this machine (DNS rebinding)."""
    for path in ("/", "/api/tags", "/ui", "/health"):
        answer = served.get(path, headers={"Host": host})
        assert answer.status_code == 403, path


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:5", "192.168.0.7", "10.1.2.3", "x.local", "a.internal"],
)
def test_own_names_are_taken(served: Running, host: str) -> None:
    assert served.get("/api/version", headers={"Host": host}).status_code == 200


def test_a_name_can_be_allowed() -> None:
    security = Security(None, ServerSettings(hosts=("mllama",)))  # type: ignore[arg-type]
    assert security._is_own_name("mllama:11434") and not security._is_own_name("other")


def test_without_keys_names_are_checked_beyond_this_machine_too() -> None:
    open_to_all = Security(None, ServerSettings(host="0.0.0.0"))  # type: ignore[arg-type]
    assert open_to_all._is_own_name("8.8.8.8")
    assert not open_to_all._is_own_name("evil.example")


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "https://localhost.evil.example",
        "http://localhost@evil.example",
        "x",
        "http://",
    ],
)
def test_a_foreign_page_is_refused(served: Running, origin: str) -> None:
    """Simple requests too, which a browser sends without asking first."""
    body = json.dumps({"model": "demo", "prompt": "x", "stream": False})
    for kind in ("text/plain", "application/json"):
        headers = {"Origin": origin, "Content-Type": kind}
        answer = served.post("/api/generate", content=body, headers=headers)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert served.get("/api/tags", headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "https://127.0.0.1", "app://x", "tauri://localhost", "chrome-extension://abc"],
)
def test_own_pages_may_ask(served: Running, origin: str) -> None:
    answer = served.get("/api/tags", headers={"Origin": origin})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "Origin" in answer.headers["vary"]


def test_the_page_of_this_server_may_ask(served: Running) -> None:
    assert served.get("/api/tags", headers={"Origin": served.url}).status_code == 200


def test_preflight(served: Running) -> None:
    asked = "authorization, x-stainless-os, x-evil"
    headers = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    with served.client() as client:
        answer = client.options("/v1/chat/completions", headers=headers)
        assert answer.status_code == 204
        allowed = answer.headers["access-control-allow-headers"]
        assert "authorization" in allowed and "x-stainless-os" in allowed and "x-evil" not in allowed
        headers["Origin"] = "http://evil.example"
        assert client.options("/v1/chat/completions", headers=headers).status_code == 403


def test_a_page_without_an_origin_is_known_by_its_fetch_site(served: Running) -> None:
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert served.get("/api/tags", headers=cross).status_code == 403
    assert served.get("/api/tags", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Accept": "text/html"}
    assert served.get("/ui", headers=link).status_code == 200
    assert served.get("/api/tags", headers=link).status_code == 403


def test_origins_can_be_allowed() -> None:
    settings = ServerSettings(origins=("https://*.home.example", "chat.example"))
    security = Security(None, settings)  # type: ignore[arg-type]
    for origin, expected in (
        ("https://a.home.example", True),
        ("http://a.home.example", False),
        ("https://chat.example", True),
        ("http://chat.example", True),
        ("http://chat.example.evil", False),
        ("http://evil/chat.example", False),
    ):
        assert security.allows_origin(origin, "localhost") == expected, origin


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    keys = (digest_of("first"), digest_of("second"))
    with running(ServerSettings(port=0, keys=keys)) as one:
        yield one


def test_a_key_is_needed_for_all_that_tells_something(locked: Running) -> None:
    for path in ("/api/tags", "/api/ps", "/api/version", "/v1/models", "/metrics", "/nothing", "/ui/x/y"):
        answer = locked.get(path)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/ui"):
        assert locked.get(path).status_code == 200, path
    assert locked.post("/", content=b"").status_code == 401
    assert locked.get("/v1/models").json()["error"]["type"] == "authentication_error"


def test_keys(locked: Running) -> None:
    for words, status in (
        ("Bearer first", 200),
        ("bearer second", 200),
        ("Bearer  first", 200),
        ("Bearer third", 401),
        ("Bearer firs", 401),
        ("Bearer", 401),
        ("Basic first", 401),
        ("first", 401),
    ):
        assert locked.get("/api/tags", headers={"Authorization": words}).status_code == status, words
    assert locked.get("/api/tags", headers={"X-Api-Key": "first"}).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    settings = ServerSettings(keys=(digest_of("first"), digest_of("second")))
    assert settings.owner_of("first") and not settings.owner_of("x") and not settings.owner_of(None)
    assert compared == [(32, 32)] * 6  # all keys, every time


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# ours\nfirst\n\n  second  \n")
    assert read_keys(str(path)) == (digest_of("first"), digest_of("second"))
    path.write_text("# none\n")
    with pytest.raises(RequestError, match="there is no key in it"):
        read_keys(str(path))
    with pytest.raises(RequestError, match="cannot be read"):
        read_keys(str(tmp_path / "nothing"))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_other_machines_need_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", host, "--port", "0", "-m", "demo"]) == 1
    err = capsys.readouterr().err
    assert "--api-key-file" in err and "--no-auth" in err and err.count("\n") == 1


def test_ollama_host() -> None:
    for words, expected in (
        ("0.0.0.0", ("0.0.0.0", None)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        (":5000", ("127.0.0.1", 5000)),
        ("http://example.org:1/", ("example.org", 1)),
        ("[::1]:9", ("::1", 9)),
        ("::1", ("::1", None)),
        ('"127.0.0.1"', ("127.0.0.1", None)),
    ):
        assert parse_host(words) == expected, words
    for words in ("a b", "x:99999", "x:y"):
        with pytest.raises(RequestError, match="OLLAMA_HOST"):
            parse_host(words)


# ---- how much ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    limits = ImageLimits(most=2, n_bytes=50_000, pixels=10_000)
    with running(ServerSettings(port=0, max_body=200_000, body_seconds=2.0, images=limits)) as one:
        yield one


def test_a_large_body_is_refused(small: Running) -> None:
    body = b'{"model": "demo", "prompt": "' + b"x" * 300_000 + b'"}'
    assert small.post("/api/generate", content=body).status_code == 413

    def chunks() -> Iterator[bytes]:  # without Content-Length
        for _ in range(30):
            yield b" " * 10_000

    assert small.post("/api/generate", content=chunks()).status_code == 413
    assert small.post(CHAT, content=body).json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_does_not_come_is_given_up(small: Running) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert b" 408 " in connection.recv(4096)


def test_an_encoded_body_is_refused(served: Running) -> None:
    for encoding in ("gzip", "deflate", "br", "zstd"):
        answer = served.post("/api/chat", content=b"x", headers={"Content-Encoding": encoding})
        assert answer.status_code == 415


def test_large_heads_are_refused(served: Running) -> None:
    head = b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"x" * 200_000 + b"\r\n\r\n"
    assert raw(served, head).split(b"\r\n")[0] in (b"", b"HTTP/1.1 400 Bad Request")
    assert served.get("/api/tags", headers={"X-Large": "x" * 10_000}).status_code == 200
    assert served.get("/api/tags?" + "x" * 5000).status_code == 414


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"model": "demo", "messages": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"model": NaN}',
        b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": "demo", "prompt": "x", "input": "x", "messages": [], "seed": 1' + b"0" * 400 + b"}",
        b'{"model": "demo", "prompt": "x", "input": "x", "messages": [], "top_p": 1e999}',
        b'{"model": "demo", "options": {"num_ctx": -1' + b"0" * 400 + b"}}",
        b'{"model": "demo"',
        b"[]",
        b'"x"',
        b"null",
        b"",
        b"   ",
        b"\xff\xfe\x00",
        b'{"model": "\xff"}',
    ],
)
def test_json_that_is_none(served: Running, body: bytes) -> None:
    for path in ("/api/generate", "/api/show", "/api/pull", CHAT, "/v1/responses"):
        assert served.post(path, content=body).status_code == 400, path


def test_limits_of_pictures(small: Running) -> None:
    def png(width: int, height: int) -> str:
        file = io.BytesIO()
        Image.new("RGB", (width, height)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    assert small.post("/api/chat", chat(png(100, 100))).status_code == 200
    answer = small.post("/api/chat", chat(png(101, 100)))
    assert answer.status_code == 400 and "too large (101x100)" in answer.json()["error"]
    three = {"role": "user", "content": "x", "images": [png(9, 9)] * 3}
    assert small.post("/api/chat", {"model": "demo", "messages": [three]}).status_code == 400
    apart = [{"role": "user", "content": "x", "images": [png(9, 9)]} for _ in range(3)]
    assert small.post("/api/chat", {"model": "demo", "messages": apart}).status_code == 400
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + png(9, 9)}}] * 3
    assert (
        small.post(CHAT, {"model": "demo", "messages": [{"role": "user", "content": parts}]}).status_code
        == 400
    )
    large = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60_000)).decode()
    assert small.post("/api/chat", chat(large)).status_code == 413


def png_bomb(width: int, height: int) -> bytes:
    """A few kilobytes that say they are so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_picture_bomb_costs_one_request(served: Running) -> None:
    for width, height in ((30_000, 30_000), (100_000, 1000), (65_535, 65_535)):
        image = base64.b64encode(png_bomb(width, height)).decode()
        assert served.post("/api/chat", chat(image)).status_code == 400
    assert served.post("/api/chat", chat(picture64())).status_code == 200


# ---- no path, no address -----------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture on this machine that no request may see."""
    path = tmp_path / "secret.png"
    path.write_bytes((EXAMPLES / "apple.png").read_bytes())
    return path


def test_no_text_of_a_request_opens_a_file(
    served: Running, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place of a request that takes a picture, with every spelling of a path."""
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
    assert served.post("/api/chat", chat(picture64())).status_code == 200


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
    told = (
        "cannot identify <_io.BytesIO object at 0x7f1234567890> in /home/me/models/x.gguf, see http://a.b/c/d"
    )
    assert clean(told) == "cannot identify <_io.BytesIO object > in x.gguf, see http://a.b/c/d"
    for error in (ImageError(told), ModelError(told), RequestError(told), ValueError(told)):
        assert "0x7f" not in refusal(error).words and "/home" not in refusal(error).words


def test_kinds_of_pictures(served: Running) -> None:
    """Decoders that few have tried are not offered to everybody."""
    kinds = {"PNG": 200, "JPEG": 200, "WEBP": 200, "GIF": 200, "BMP": 200, "TIFF": 200}
    for kind, status in {**kinds, "JPEG2000": 400, "ICO": 400, "PPM": 400}.items():
        file = io.BytesIO()
        Image.open(EXAMPLES / "apple.png").convert("RGB").save(file, kind)
        answer = served.post("/api/chat", chat(base64.b64encode(file.getvalue()).decode()))
        assert answer.status_code == status, kind


def test_base64_as_it_comes(served: Running) -> None:
    text = picture64()
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
    """No request of ours leaves the machine for a picture."""
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
