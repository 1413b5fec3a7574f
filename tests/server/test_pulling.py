"""/api/pull where the operator allows it, with a download that a test makes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from serving import DEMO, Running, running, wait_for

from mllama_gguf.errors import DownloadError
from mllama_gguf.server import pulling
from mllama_gguf.server.settings import ServerSettings

NAME = {"model": "llama3.2-vision:90b"}


class Download:
    """Tells its progress until a test ends it, or nobody wants it any more."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.began = threading.Event()
        self.error: BaseException | None = None

    def __call__(self, reference: str, progress: Callable[[str, int, int], None]) -> None:
        self.began.set()
        try:
            while not self.end.wait(0.02):
                progress("sha256:00", 1, 2)
        except BaseException as e:
            self.error = e
            raise


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> Iterator[Download]:
    one = Download()
    monkeypatch.setattr(pulling, "fetch", one)
    yield one
    one.end.set()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with running(ServerSettings(port=0, allow_pull=True), offers=None) as one:
        yield one


def test_a_download_tells_its_progress(served: Running, download: Download) -> None:
    with served.client().stream("POST", "/api/pull", json=NAME) as answer:
        lines: list[dict[str, Any]] = []
        for line in answer.iter_lines():
            lines.append(json.loads(line))
            if "total" in lines[-1]:
                download.end.set()
    assert lines[0] == {"status": "pulling manifest"} and lines[-1] == {"status": "success"}
    assert {"status": "pulling sha256:00", "digest": "sha256:00", "total": 2, "completed": 1} in lines


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_a_download(served: Running, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    def fail(*_: Any) -> None:
        raise DownloadError("the registry says no")

    monkeypatch.setattr(pulling, "fetch", fail)
    answer = served.post("/api/pull", {**NAME, "stream": stream})
    assert answer.status_code == (200 if stream else 502)
    assert json.loads(answer.text.splitlines()[-1]) == {"error": "the registry says no"}


def test_without_a_stream(served: Running, download: Download) -> None:
    download.end.set()
    assert served.post("/api/pull", {**NAME, "stream": False}).json() == {"status": "success"}


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_waits_for_it(served: Running, download: Download, stream: bool) -> None:
    body = {**NAME, "stream": stream}
    if stream:
        with served.client() as client, client.stream("POST", "/api/pull", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.TimeoutException), served.client() as client:
            client.post("/api/pull", json=body, timeout=0.5)
    wait_for(lambda: download.error is not None, 20)
    assert "nobody waits" in str(download.error)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_ends_waits_for_no_download(download: Download, stream: bool) -> None:
    found: list[httpx.Response] = []
    with running(ServerSettings(port=0, allow_pull=True), offers=None) as served:
        client = served.client()
        thread = threading.Thread(
            target=lambda: found.append(client.post("/api/pull", json={**NAME, "stream": stream}))
        )
        thread.start()
        assert download.began.wait(20)
        start = time.monotonic()
    thread.join(20)
    assert time.monotonic() - start < 5
    assert "the server is stopping" in found[0].text and found[0].status_code == (200 if stream else 503)
    assert download.error is not None


def test_models_that_were_not_chosen_are_not_fetched(download: Download) -> None:
    with running(ServerSettings(port=0, allow_pull=True), offers=DEMO) as served:
        answer = served.post("/api/pull", NAME)
        assert answer.status_code == 403 and "(-m)" in answer.json()["error"]
    assert not download.began.is_set()
