"""A server's life: clients that go away, a full queue, models that fail, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from helpers import elsewhere
from serving import (
    DEMO,
    Running,
    endless,
    image64,
    is_computing,
    one_client,
    process,
    running,
    sent,
    slow_image,
    wait_for,
)

from mllama_gguf.cli.main import run
from mllama_gguf.errors import BackendError
from mllama_gguf.loaded import LoadedModel
from mllama_gguf.server.catalog import Offer
from mllama_gguf.server.jobs import FairQueue, Job, Mailbox
from mllama_gguf.server.models import Models, Need, Opening
from mllama_gguf.server.settings import ServerSettings


@contextmanager
def busy(slow: Path, settings: ServerSettings) -> Iterator[Running]:
    """A server that encodes an image for a long time."""
    with (
        running(settings, offers=(Offer("slow:latest", str(slow)),), given={"n_ctx": 512}) as served,
        sent(served, "/api/chat", slow_image(True)),
    ):
        wait_for(lambda: is_computing(served))
        yield served


def test_questions_about_the_server_never_wait(slow_served: Running) -> None:
    with sent(slow_served, "/api/chat", slow_image(False)):
        wait_for(lambda: is_computing(slow_served))
        for path in ("/", "/api/tags", "/api/ps", "/api/version", "/health", "/metrics", "/v1/models", "/ui"):
            assert slow_served.get(path).is_success, path
        assert slow_served.post("/api/show", {"model": "slow"}).is_success
        assert is_computing(slow_served)


def test_a_sign_of_life_while_an_image_is_encoded(slow: Path) -> None:
    """An ordinary chunk without text, and a comment of SSE."""
    settings = ServerSettings(port=0, ping=0.2)
    with running(settings, offers=(Offer("slow:latest", str(slow)),), given={"n_ctx": 512}) as served:
        with served.client().stream("POST", "/api/chat", json=slow_image(True)) as answer:
            for line in answer.iter_lines():
                found = json.loads(line)
                assert found["message"]["content"] == "" and not found["done"]
                break
        url = "data:image/png;base64," + image64("apple-and-cat.png")
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        body = {"model": "slow", "messages": [message], "stream": True}
        with served.client().stream("POST", "/v1/chat/completions", json=body) as answer:
            assert next(answer.iter_lines()) == ": keep-alive"


def test_a_full_queue(slow: Path) -> None:
    settings = ServerSettings(port=0, max_queue=1)
    with busy(slow, settings) as served, sent(served, "/api/chat", slow_image(True)):
        wait_for(lambda: served.metric("mllama_requests_queued") == 1)
        for path in ("/api/chat", "/v1/chat/completions"):
            body = {"model": "slow", "messages": [{"role": "user", "content": "x"}]}
            answer = served.post(path, body)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert "maximum pending requests exceeded" in answer.text


def test_the_images_that_wait_are_limited(slow: Path) -> None:
    settings = ServerSettings(port=0, max_waiting=1000)
    with busy(slow, settings) as served, sent(served, "/api/chat", slow_image(True)):
        wait_for(lambda: served.metric("mllama_requests_queued") == 1)
        answer = served.post("/api/chat", slow_image(False))
        assert answer.status_code == 503 and "too much waits" in answer.json()["error"]
        assert int(answer.headers["retry-after"]) >= 1


def test_the_texts_that_wait_are_limited(slow: Path) -> None:
    settings = ServerSettings(port=0, max_waiting=100_000)
    with busy(slow, settings) as served:
        text = {"model": "slow", "prompt": "x" * 60_000, "stream": False}
        with sent(served, "/api/generate", text):
            wait_for(lambda: served.metric("mllama_requests_queued") == 1)
            schema = {"type": "object", "properties": {f"name{i}": {} for i in range(2000)}}
            talk = [{"role": "user", "content": "x"}] * 1000
            for path, body in (
                ("/api/generate", text),
                ("/api/generate", {**text, "prompt": "x", "format": schema}),
                ("/api/chat", {"model": "slow", "messages": talk}),
            ):
                answer = served.post(path, body)
                assert answer.status_code == 503 and "too much waits" in answer.json()["error"]


def test_clients_take_turns() -> None:
    loop = asyncio.new_event_loop()

    def job(client: str) -> Job:
        return Job(None, client, None, Mailbox(loop, whole=True))  # type: ignore[arg-type]

    queue = FairQueue()
    jobs = [job(client) for client in "aaabac"]
    for one in jobs:
        queue.add(one)
    assert len(queue) == 6
    assert queue.remove(jobs[1]) and not queue.remove(jobs[1])
    taken = []
    while one := queue.take():
        taken.append(one)
    assert [one.client for one in taken] == ["a", "b", "c", "a", "a"]
    assert [one for one in taken if one.client == "a"] == [jobs[0], jobs[2], jobs[4]]
    loop.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_time_limit_of_a_request_that_waits(slow: Path, stream: bool) -> None:
    """It is told when its time is over, not when its turn comes."""
    settings = ServerSettings(port=0)
    with busy(slow, settings) as served:
        object.__setattr__(served.service, "settings", replace(served.service.settings, time_limit=0.3))
        body = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        answer = served.post("/api/chat", body)
        assert answer.status_code == 504 and "0.3 s" in answer.json()["error"]
        assert is_computing(served) and served.metric("mllama_requests_queued") == 0
        assert served.metric('mllama_cancelled_total{reason="time"}') == 1


def test_a_time_limit(slow: Path) -> None:
    settings = ServerSettings(port=0, time_limit=0.3)
    with running(settings, offers=(Offer("slow:latest", str(slow)),), given={"n_ctx": 512}) as served:
        answer = served.post("/api/chat", slow_image(False))
        assert answer.status_code == 504 and "0.3 s" in answer.json()["error"]
        assert served.metric('mllama_cancelled_total{reason="time"}') == 1


# ---- models ------------------------------------------------------------------------------------------------


def test_the_health_tells_that_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are taken meanwhile, so it is not a failure; nothing waits for it."""
    opened = Models._open
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return opened(*args)

    with running() as served, ThreadPoolExecutor(1) as pool:
        assert served.get("/health").json() == {"status": "ok"}
        monkeypatch.setattr(Models, "_open", slowly)
        with served.client() as other:
            load = pool.submit(other.post, "/api/generate", json={"model": "demo"})
            assert begun.wait(30)
            answer = served.get("/health")
            assert answer.status_code == 200 and answer.json() == {"status": "loading"}
            assert served.get("/api/ps").json() == {"models": []} and served.get("/api/tags").is_success
            go_on.set()
            assert load.result().json()["done_reason"] == "load"
        assert served.get("/health").json() == {"status": "ok"}


def test_a_model_that_fails_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as served:
        body = {"model": "demo", "prompt": "x", "stream": False, "options": {"temperature": 0}}
        expected = served.post("/api/generate", body).json()["response"]

        def fail(*_: object, **__: object) -> None:
            raise BackendError("CUDA0: the device is lost at 0x7f1234567890 (/home/me/x.c)")

        with monkeypatch.context() as changed:
            changed.setattr("mllama_gguf.decode.session.Session.step", fail)
            answer = served.post("/api/generate", body)
            assert answer.status_code == 500
            assert answer.json()["error"].startswith("CUDA0: the device is lost")
            assert "0x7f" not in answer.text and "/home" not in answer.text
            answer = served.post("/v1/completions", {"model": "demo", "prompt": "a red", "temperature": 0})
            assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
        assert served.get("/api/ps").json() == {"models": []}
        assert served.post("/api/generate", body).json()["response"] == expected
        assert served.metric("mllama_loads_total") == 3


def test_a_bug_is_one_error_and_says_little(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as served:
        with monkeypatch.context() as changed:
            changed.setattr(LoadedModel, "tokenize", lambda *_, **__: {}["secret of the house"])
            answer = served.post(
                "/api/generate", {"model": "demo", "prompt": "x", "raw": True, "stream": False}
            )
            assert answer.status_code == 500 and "secret" not in answer.text
        assert served.post("/api/generate", {"model": "demo", "prompt": "x", "stream": False}).is_success


def test_an_error_after_the_first_text_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from mllama_gguf.decode.session import Session

    step, n = Session.step, 0

    def fail_later(self: Session, token: int) -> Any:
        nonlocal n
        n += 1
        if n % 4 == 0:
            time.sleep(0.05)  # what came before is sent
            raise BackendError("the device is lost")
        return step(self, token)

    with running() as served:
        monkeypatch.setattr(Session, "step", fail_later)
        *lines, last = served.lines("/api/generate", endless())
        assert lines and last == {"error": "the device is lost"}
        body = {
            "model": "demo",
            "prompt": "a red",
            "stream": True,
            "response_format": {"type": "json_object"},
        }
        answer = served.post("/v1/completions", body | {"max_tokens": 50, "temperature": 0})
        frames = answer.text.strip().split("\n\n")
        assert json.loads(frames[-1].removeprefix("data: "))["error"]["message"] == "the device is lost"


def test_a_worker_that_is_killed_is_one_error() -> None:
    opening = Opening({"n_threads": 1, "isolate": True}, image_cache=False, tuned=False)
    with running(opening=opening) as served:
        body = {"model": "demo", "prompt": "x", "stream": False, "options": {"temperature": 0}}
        expected = served.post("/api/generate", body).json()["response"]
        with sent(served, "/api/generate", endless(stream=False)) as connection:
            wait_for(lambda: is_computing(served))
            time.sleep(0.2)
            loaded = served.service.engine._models._loaded["demo:latest"].model
            os.kill(loaded._backend.model._supervisor._process._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            assert b" 500 " in connection.recv(4096)
        assert served.post("/api/generate", body).json()["response"] == expected


def test_the_oldest_model_makes_room() -> None:
    """The plan says before loading what would not fit."""
    asked: list[str] = []

    def plan(card: Any, settings: Any) -> Need:
        asked.append(card.name)
        return Need({"CPU": 400})

    offers = (*DEMO, Offer("third:latest", "demo"))
    with running(ServerSettings(port=0, memory=1000), offers=offers, plan=plan) as served:

        def loaded() -> set[str]:
            return {one["name"].partition(":")[0] for one in served.get("/api/ps").json()["models"]}

        for name in ("demo", "other", "demo"):
            served.post("/api/generate", {"model": name})
        assert loaded() == {"demo", "other"}
        served.post("/api/generate", {"model": "third"})
        assert loaded() == {"demo", "third"}
        assert asked == ["demo:latest", "other:latest", "third:latest", "third:latest"]
    with running(ServerSettings(port=0, max_models=1)) as served:
        served.post("/api/generate", {"model": "demo"})
        served.post("/api/generate", {"model": "other"})
        assert loaded() == {"other"}


@pytest.mark.parametrize("layers", [0, "auto", -1, 3])
def test_the_real_plan_is_of_some_use(served: Running, layers: Any) -> None:
    from mllama_gguf.server.models import need_of

    card = served.service.catalog.find("demo")
    need = need_of(card, Opening({"n_gpu_layers": layers}, tuned=False).settings(card))
    assert sum(need.n_bytes.values()) > card.size and not need.lacking


def test_a_model_is_freed_when_its_time_is_over() -> None:
    with running(ServerSettings(port=0, keep_alive=1.0)) as served:

        def loaded() -> list[str]:
            return [one["name"] for one in served.get("/api/ps").json()["models"]]

        served.post("/api/generate", {"model": "other", "keep_alive": -1})
        served.post("/api/generate", {"model": "demo", "prompt": "x", "stream": False})
        wait_for(lambda: loaded() == ["other:latest"])
        assert served.metric("mllama_loads_total") == 2
        # A request that does not name a time, as those of OpenAI's API, does not change it.
        body = {"model": "other", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert served.post("/v1/chat/completions", body).is_success
        time.sleep(1.2)
        assert loaded() == ["other:latest"]
        assert served.metric("mllama_loads_total") == 2


def test_a_model_is_freed_though_jobs_end_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of several ends just when the engine's thread has looked whose time is over."""
    look = Models.close_expired

    def slow_look(self: Models) -> None:
        look(self)
        time.sleep(0.02)

    monkeypatch.setattr(Models, "close_expired", slow_look)
    with running(ServerSettings(port=0, parallel=2)) as served, ThreadPoolExecutor() as threads:
        body = {"model": "demo", "prompt": "x", "stream": False, "keep_alive": 0.05}
        for _ in range(3):
            list(threads.map(lambda _: served.post("/api/generate", body), range(2)))
            wait_for(lambda: served.get("/api/ps").json()["models"] == [], 10)


def test_files_that_cannot_be_used_are_said_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(99))
    for name in (str(tmp_path / "x.gguf"), "nothing-of-this-name", "ollama:nothing-of-this-name"):
        assert run(["serve", "--port", "0", "-m", name]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert run(["serve", "--port", "0", "-m", "demo", "-m", "DEMO=demo"]) == 1
    assert "both called demo:latest" in capsys.readouterr().err


# ---- the process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(number: int) -> None:
    with process("-m", "demo", "--shutdown-grace", "60") as (child, url):
        with ThreadPoolExecutor(2) as pool:
            body = endless(stream=False) | {"options": {"temperature": 0, "num_predict": 3000}}
            runs = pool.submit(httpx.post, f"{url}/api/generate", json=body, timeout=60)
            wait_for(lambda: "processing 1.0" in httpx.get(f"{url}/metrics").text)
            waits = pool.submit(httpx.post, f"{url}/api/generate", json=body, timeout=60)
            wait_for(lambda: "queued 1.0" in httpx.get(f"{url}/metrics").text)
            child.send_signal(number)
            refused = waits.result()
            assert refused.status_code == 503 and refused.json() == {"error": "the server is stopping"}
            done = runs.result()
            assert done.status_code == 200 and done.json()["eval_count"] == 3000
        assert child.wait(60) == 0
        assert child.stderr is not None and child.stderr.read() == ""


def test_the_grace_has_an_end() -> None:
    with process("-m", "demo", "--shutdown-grace", "0.2", "-c", "0") as (child, url):
        with httpx.stream("POST", f"{url}/api/generate", json=endless(), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            child.terminate()
            last = ""
            for line in lines:
                last = line
            assert json.loads(last) == {"error": "the server is stopping"}
        assert child.wait(60) == 0


def test_a_second_signal_ends_it_immediately() -> None:
    with (
        process("-m", "demo", "--shutdown-grace", "60", "-c", "0") as (child, url),
        httpx.stream("POST", f"{url}/api/generate", json=endless(), timeout=60) as answer,
    ):
        lines = answer.iter_lines()  # to drop it would end the connection
        next(lines)
        child.terminate()
        time.sleep(0.3)
        assert child.poll() is None
        start = time.monotonic()
        child.terminate()
        assert child.wait(30) == 0
        assert time.monotonic() - start < 30


def test_a_port_in_use_is_one_line(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.url.rpartition(":")[2]
    assert run(["serve", "-m", "demo", "--port", port]) == 1
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port}: another program listens there already" in err and err.count("\n") == 1


def test_without_the_extra_one_line_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; sys.modules['starlette'] = None; from mllama_gguf.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve"], capture_output=True, text=True, **elsewhere()
    )
    assert done.returncode == 1
    assert "pip install 'mllama_gguf[serve]'" in done.stderr and done.stderr.count("\n") == 1


def test_variables_of_ollama() -> None:
    env = {"OLLAMA_HOST": "127.0.0.1:0", "OLLAMA_CONTEXT_LENGTH": "777", "OLLAMA_KEEP_ALIVE": "-1"}
    with process("-m", "demo", **env) as (_, url):
        httpx.post(f"{url}/api/generate", json={"model": "demo"})
        (line,) = httpx.get(f"{url}/api/ps").json()["models"]
        assert line["context_length"] == 777 and line["expires_at"] > "2100"


# ---- many --------------------------------------------------------------------------------------------------


def test_many_requests_with_clients_that_go_away() -> None:
    """Nothing is stuck, and memory is flat. MLLAMA_TEST_REQUESTS=1000 for a longer trial."""
    with running(ServerSettings(port=0, max_queue=64)) as served:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: one_client(served, seed, 3), range(8)))
            before = psutil.Process().memory_info().rss
            done = sum(pool.map(lambda seed: one_client(served, seed, N_REQUESTS // 8), range(8)))
        wait_for(lambda: served.metric("mllama_requests_processing") == 0)
        wait_for(lambda: served.metric("mllama_requests_queued") == 0)
        assert done > N_REQUESTS / 3
        assert served.metric("mllama_loads_total") == 1
        assert psutil.Process().memory_info().rss - before < 60e6
        assert threading.active_count() < 40
        assert served.post("/api/generate", {"model": "demo", "prompt": "x", "stream": False}).is_success


N_REQUESTS = int(os.environ.get("MLLAMA_TEST_REQUESTS", "160"))
