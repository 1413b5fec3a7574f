"""Connections that ask for nothing: they are few, and they end."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from serving import Running, process, running

from mllama_gguf.server import connections, life


@contextmanager
def connection(served: Running) -> Iterator[socket.socket]:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as one:
        yield one


def seconds_until_closed(one: socket.socket) -> float:
    start = time.monotonic()
    with suppress(ConnectionResetError):
        while one.recv(65536):
            pass
    return time.monotonic() - start


@pytest.mark.parametrize("sent", [b"", b"GET / HT"])
@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_head_that_does_not_come(monkeypatch: pytest.MonkeyPatch, before: bytes, sent: bytes) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(life, "KEEP_CONNECTION", 2)
    with running() as served, connection(served) as one:
        if before:
            one.sendall(before)
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.2)
        one.sendall(sent)
        assert seconds_until_closed(one) < 5


def test_slow_heads_and_long_bodies_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is that of a head alone."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with running() as served, connection(served) as one:
        for part in (b"POST /api/show HTTP/1.1\r\nHost: local", b"host\r\nContent-Length: 17\r\n\r\n"):
            one.sendall(part)
            time.sleep(0.4)
        time.sleep(0.8)  # the time of the head is over
        one.sendall(b'{"model": "demo"}')
        assert one.recv(15) == b"HTTP/1.1 200 OK"


def test_connections_beyond_the_most_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.Connection, "most", 3)
    with running() as served, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connection(served))
        time.sleep(0.2)
        with connection(served) as one:
            assert seconds_until_closed(one) < 5
        stack.close()
        assert served.get("/health").is_success


def test_descriptors_stay_for_other_things(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 1 << 20), (1024, 1024), (100, 200), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)]
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: raised.append(limit))
    found = []
    for limit in limits:
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: limit)
        found.append(connections.most_connections())
    assert found == [connections.MOST, 512, 8, connections.MOST]
    assert raised == [(connections.MOST + connections.SPARE, 1 << 20), (1024, 1024), (200, 200)]


def test_a_request_that_hangs_at_the_end_is_told_so() -> None:
    """Half of a request, and then SIGTERM: an answer, and no traceback in the log."""
    with process("-m", "demo") as (child, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as one:
            one.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.3)
            child.terminate()
            assert one.recv(65536).startswith(b"HTTP/1.1 503")
        assert child.stderr is not None
        words = child.stderr.read()
        assert child.wait(20) == 0
        assert "Traceback" not in words and "CancelledError" not in words
