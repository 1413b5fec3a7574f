"""Images from the web: allowed hosts, public addresses, nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import pytest
from serving import EXAMPLES, Running, running

from mllama_gguf.server import fetching
from mllama_gguf.server.fetching import fetch, is_public
from mllama_gguf.server.images import ImageLimits
from mllama_gguf.server.problems import Refused
from mllama_gguf.server.settings import ServerSettings

IMAGE = (EXAMPLES / "apple.png").read_bytes()
asked: list[tuple[str, str]] = []


class Web(BaseHTTPRequestHandler):
    """A web server with an image and with traps."""

    def do_GET(self) -> None:
        asked.append((self.path, self.headers["Host"]))
        kind, data, status = "image/png", IMAGE, 200
        if self.path == "/text":
            kind = "text/html"
        elif self.path == "/large":
            data = bytes(fetching.MAX_BYTES + 2)
        elif self.path == "/moved":
            status = 302
        elif self.path == "/gone":
            status = 404
        elif self.path == "/slow":
            data = bytes(40)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if status == 302:
            self.send_header("Location", "/apple.png")
        self.end_headers()
        for part in [data[i : i + 1] for i in range(40)] if self.path == "/slow" else [data]:
            self.wfile.write(part)
            time.sleep(0.05 if self.path == "/slow" else 0)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def names(monkeypatch: pytest.MonkeyPatch, **known: list[str]) -> None:
    """Let names stand for addresses."""

    real = socket.getaddrinfo

    def look(host: str, port: int, *args: Any, **more: Any) -> list[Any]:
        if args:  # the connection itself, to the address that was checked
            assert any(host in addresses for addresses in known.values())
            return list(real(host, port, *args))
        if host not in known:
            raise socket.gaierror("unknown")
        return [(0, 0, 0, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look)


def test_an_image_of_an_allowed_host(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the address that was checked; the host is told its own name."""
    names(monkeypatch, images=["127.0.0.1"])
    url = f"http://images:{port}/apple.png"
    with pytest.raises(Refused, match="is in a private network"):
        fetch(url, "x", (f"http://images:{port}",))
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # would look the name up itself
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    asked.clear()
    assert fetch(url, "x", (f"http://images:{port}",)) == IMAGE
    assert asked == [("/apple.png", f"images:{port}")]
    for path, words in (
        ("text", "it is text/html, not an image"),
        ("large", "it has more than"),
        ("moved", "it answers with status 302"),
        ("gone", "it answers with status 404"),
    ):
        with pytest.raises(Refused, match=words):
            fetch(f"http://images:{port}/{path}", "x", (f"http://images:{port}",))
    assert ("/apple.png", f"images:{port}") not in asked[1:]  # no redirect was followed
    monkeypatch.setattr(fetching, "SECONDS", 0.5)  # of all, not of each part
    with pytest.raises(Refused, match="it did not come within"):
        fetch(f"http://images:{port}/slow", "x", (f"http://images:{port}",))


@pytest.mark.parametrize(
    "url",
    [
        "http://allowed.example/x",  # https was allowed
        "https://allowed.example:8443/x",
        "https://other.example/x",
        "https://allowed.example.evil.example/x",
        "https://allowed.example@evil.example/x",
        "https://evil.example#@allowed.example/x",
        "https://evil.example\\@allowed.example/x",
        "https://allowed.example\\.evil.example/x",
        "https://allowed.example/x\\@evil.example/",
        "https://user:word@allowed.example/x",
        " https://allowed.example/x",
        "https://allowed.example\n/x",
        "https:///x",
        "https://[::1/x",
        "HTTPS://OTHER.EXAMPLE/x",
    ],
)
def test_other_addresses_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("it asks")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(Refused) as e:
        fetch(url, "x", ("allowed.example",))
    assert e.value.status == 400


def test_one_private_address_is_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1"):
        names(monkeypatch, **{"allowed.example": ["8.8.8.8", address]})
        with pytest.raises(Refused, match="is in a private network"):
            fetch("https://allowed.example/x", "x", ("allowed.example",))
    with pytest.raises(Refused, match="there is no host"):
        fetch("https://nobody.example/x", "x", ("nobody.example",))


def test_public_addresses() -> None:
    for words in ("8.8.8.8", "2001:4860:4860::8888"):
        assert is_public(ip_address(words)), words
    for words in (
        *("0.0.0.0", "100.64.0.1", "192.168.0.1", "224.0.0.1", "255.255.255.255"),
        *("fe80::1", "ff02::1", "::", "2002:a00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    ):
        assert not is_public(ip_address(words)), words


def test_a_request_with_an_address(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ImageLimits(hosts=(f"http://127.0.0.1:{port}",))
    part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{port}/apple.png"}}
    body = {"model": "demo", "messages": [{"role": "user", "content": [part]}], "temperature": 0}

    def ask(served: Running) -> int:
        return served.post("/v1/chat/completions", body).status_code

    with running(ServerSettings(port=0, images=limits)) as served:
        assert ask(served) == 400
        monkeypatch.setattr(fetching, "is_public", lambda address: True)
        assert ask(served) == 200
