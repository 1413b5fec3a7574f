"""Who may ask: names of the server, web pages, keys. Each rule has a test that fails without it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, running

from mllama_gguf.cli.main import run
from mllama_gguf.errors import RequestError
from mllama_gguf.server.jobs import Job
from mllama_gguf.server.security import Security
from mllama_gguf.server.settings import ServerSettings, digest_of, parse_host, read_keys

CHAT = "/v1/chat/completions"


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


def passed(settings: ServerSettings, **headers: str) -> int:
    """The status of a request that Security lets through, 200, or refuses."""
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/api/chat", "headers": raw_headers}
    asyncio.run(Security(app, settings)(scope, None, send))  # type: ignore[arg-type]
    return statuses[0]


def test_names_beyond_this_machine() -> None:
    """Without a key they are checked there too. With one, a page needs the key, and any name will do."""
    open_to_all = ServerSettings(host="0.0.0.0")
    assert passed(open_to_all, host="8.8.8.8:11434") == 200
    evil = {"host": "evil.example:1", "origin": "http://evil.example:1"}
    assert passed(open_to_all, **evil) == 403
    with_key = ServerSettings(host="0.0.0.0", keys=(digest_of("first"),))
    own, key = {"host": "box.example:11434"}, {"authorization": "Bearer first"}
    assert passed(with_key, **own, **key) == 200
    assert passed(with_key, **own, **key, origin="http://box.example:11434") == 200  # its page
    assert passed(with_key, **own, **key, origin="http://evil.example:11434") == 403
    assert passed(with_key, **evil) == 401
    local = ServerSettings(keys=(digest_of("first"),))
    assert passed(local, **own, **key) == 403


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


def test_no_head_says_who_asks(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients take turns by their address: one that could choose it would come before all others."""
    clients: list[str] = []
    submit = served.service.engine.submit

    def watched(job: Job) -> None:
        clients.append(job.client)
        submit(job)

    monkeypatch.setattr(served.service.engine, "submit", watched)
    served.post(
        "/api/generate", {"model": "demo"}, headers={"X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4"}
    )
    assert clients == ["127.0.0.1"]


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
    for origin, readable in (
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://evil.example", None),
    ):
        answer = locked.get("/v1/models", headers={"Origin": origin, "Authorization": "Bearer no"})
        assert answer.status_code == (401 if readable else 403)
        assert answer.headers.get("access-control-allow-origin") == readable


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
    path.write_text("first\nschlüssel\n")  # a header cannot say which bytes these are
    with pytest.raises(RequestError, match="characters of ASCII"):
        read_keys(str(path))
    path.write_text("# none\n")
    with pytest.raises(RequestError, match="there is no key in it"):
        read_keys(str(path))
    with pytest.raises(RequestError, match="cannot be read"):
        read_keys(str(tmp_path / "nothing"))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_other_machines_need_a_key(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listen(settings: ServerSettings) -> None:
        raise RequestError("it listens")  # and would go on

    monkeypatch.setattr("mllama_gguf.server.life.listen", listen)
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
