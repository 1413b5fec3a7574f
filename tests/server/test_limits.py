"""How much a request may hold. Each rule has a test that fails without it."""

from __future__ import annotations

import base64
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from PIL import Image
from serving import Running, image64, running

from mllama_gguf.server import bodies
from mllama_gguf.server.images import ImageLimits
from mllama_gguf.server.settings import ServerSettings

CHAT = "/v1/chat/completions"


def chat(image: str, prompt: str = "x", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": prompt, "images": [image]}
    return {"model": "demo", "messages": [message], "stream": False, **more}


def raw(served: Running, request: bytes, seconds: float = 10.0) -> bytes:
    """The beginning of the answer to bytes that no client would send."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), seconds) as connection:
        found = b""
        with suppress(OSError):  # the server hangs up before it has read all
            connection.sendall(request)
            found = connection.recv(65536)
        return found


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
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200001\r\n\r\n"
    assert b" 413 " in raw(small, head)  # before it has come


def test_a_large_body_is_read_beside_the_loop(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clients do not wait while megabytes of JSON are read."""
    threads: list[str] = []
    parse = bodies.parse_object

    def watched(data: Any) -> Any:
        threads.append(threading.current_thread().name)
        return parse(data)

    monkeypatch.setattr(bodies, "parse_object", watched)
    for n in (10, 2 << 20):
        body = {"model": "demo", "unknown": "x" * n}
        assert served.post("/api/generate", body).json()["done_reason"] == "load"
    small, large = threads
    assert small == "server" != large


def test_a_body_that_does_not_come_is_given_up(small: Running) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert b" 408 " in connection.recv(4096)


def test_a_slow_body_is_waited_for(small: Running) -> None:
    """The limit is of a pause, not of the whole request."""
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(b"POST /api/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n\r\n")
        for part in (b'{"mod', b'el": ', b'"none', b'"}'):
            time.sleep(0.8)  # of 2 s
            connection.sendall(part)
        assert b" 404 " in connection.recv(4096)


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
        b'{"model": "demo", "x": [' + b"[]," * 500_001 + b"1]}",
        b"\xff\xfe\x00",
        b'{"model": "\xff"}',
    ],
)
def test_json_that_is_none(served: Running, body: bytes) -> None:
    for path in ("/api/generate", "/api/show", "/api/pull", CHAT, "/v1/responses"):
        assert served.post(path, content=body).status_code == 400, path


def test_limits_of_images(small: Running) -> None:
    def png(width: int, height: int) -> str:
        file = io.BytesIO()
        Image.new("RGB", (width, height)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    assert small.post("/api/chat", chat(png(100, 100))).status_code == 200
    answer = small.post("/api/chat", chat(png(101, 100)))
    assert answer.status_code == 400 and "too large (101x100)" in answer.json()["error"]
    assert "--max-image-pixels" in answer.text and "MLLAMA" not in answer.text
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


def test_an_image_bomb_costs_one_request(served: Running) -> None:
    for width, height in ((30_000, 30_000), (100_000, 1000), (65_535, 65_535)):
        image = base64.b64encode(png_bomb(width, height)).decode()
        assert served.post("/api/chat", chat(image)).status_code == 400
    assert served.post("/api/chat", chat(image64())).status_code == 200


def test_two_images_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from mllama_gguf.errors import Aborted
    from mllama_gguf.server import images

    held, most, now = threading.Event(), 0, 0

    def decode(*_: Any) -> Any:
        nonlocal most, now
        now += 1
        most = max(most, now)
        held.wait(20)
        now -= 1

    monkeypatch.setattr(images, "decode", decode)
    threads = [threading.Thread(target=images.to_pixels, args=(b"", ImageLimits())) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    with pytest.raises(Aborted):
        images.to_pixels(b"", ImageLimits(), lambda: True)
    held.set()
    for thread in threads:
        thread.join(20)
    assert most == 2
