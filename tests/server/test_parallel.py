"""Requests of a model that run together: the same texts, and each with an end of its own."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import (
    DEMO,
    Running,
    endless,
    image64,
    one_client,
    process,
    running,
    sent,
    slow_image,
    wait_for,
)

from mllama_gguf.backend.plan import Plan, Setting
from mllama_gguf.backend.types import Device, DeviceMemory
from mllama_gguf.decode.scheduler import Scheduler
from mllama_gguf.errors import RequestError
from mllama_gguf.loaded import LoadedModel
from mllama_gguf.server.catalog import Offer
from mllama_gguf.server.engine import Engine
from mllama_gguf.server.jobs import Job
from mllama_gguf.server.models import Loaded, Need, Opening, need_of
from mllama_gguf.server.settings import ServerSettings, from_environment

IMAGES = ("apple.png", "wide.png", "tall.png", "apple-and-cat.png")
SHORT = {"model": "demo", "prompt": "x", "stream": False, "options": {"temperature": 0}}
PROCESSING = "mllama_requests_processing"
QUEUED = "mllama_requests_queued"


@pytest.fixture(scope="module")
def together() -> Iterator[Running]:
    """A server that computes up to four requests together."""
    with running(ServerSettings(port=0, parallel=4)) as one:
        yield one


def question(name: str, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Describe this image.", "images": [image64(name)]}
    return {"model": "demo", "messages": [message], "stream": False, "options": {"temperature": 0}, **more}


def is_free(served: Running) -> bool:
    return served.metric(PROCESSING) == 0 == served.metric(QUEUED)


def test_the_same_texts(together: Running, expected: Callable[..., str]) -> None:
    def ask(i: int) -> str:
        answer = together.post("/api/chat", question(IMAGES[i % 4]))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["message"]["content"])

    with ThreadPoolExecutor(8) as pool:
        for i, text in enumerate(pool.map(ask, range(24))):
            assert text == expected(IMAGES[i % 4], "Describe this image.")
    wait_for(lambda: is_free(together))
    assert together.metric("mllama_loads_total") == 1


def test_so_many_run_and_the_others_wait(together: Running) -> None:
    """One that goes away ends alone, and its place goes to one that waits."""
    bodies = [endless(stream=True) for _ in range(6)]
    begun: list[Any] = []
    try:
        for body in bodies:
            begun.append(sent(together, "/api/generate", body))
            begun[-1].__enter__()
        wait_for(lambda: together.metric(QUEUED) == 2)
        assert together.metric(PROCESSING) == 4
        for _ in range(2):
            begun.pop(0).__exit__(None, None, None)
        wait_for(lambda: together.metric(QUEUED) == 0)
        wait_for(lambda: together.metric(PROCESSING) == 4)
    finally:
        for one in begun:
            one.__exit__(None, None, None)
    wait_for(lambda: is_free(together))
    assert together.post("/api/generate", SHORT).is_success


def test_a_conversation_goes_on_in_the_caches_that_hold_it(together: Running) -> None:
    """Whichever of four it was."""
    chats = []
    for i in range(4):
        messages = [{"role": "user", "content": f"{i} " * 30}]
        answer = together.post("/api/chat", {**question("apple.png"), "messages": messages}).json()
        chats.append([*messages, answer["message"], {"role": "user", "content": "and?"}])
    before = together.metric("mllama_prompt_tokens_cached_total")
    n_prompt = 0
    for messages in reversed(chats):
        body = {**question("apple.png"), "messages": messages}
        n_prompt += together.post("/api/chat", body).json()["prompt_eval_count"]
    # All but the last messages, each of some ten tokens with what is around it.
    assert together.metric("mllama_prompt_tokens_cached_total") - before > n_prompt - 4 * 40


def test_a_lost_device_ends_all_that_run_and_the_next_one_loads_the_model() -> None:
    opening = Opening({"n_threads": 1, "isolate": True}, image_cache=False, tuned=False)
    with running(ServerSettings(port=0, parallel=3), opening=opening) as served:
        expected = served.post("/api/generate", SHORT).json()["response"]
        with ThreadPoolExecutor(3) as pool:
            runs = [
                pool.submit(served.client().post, "/api/generate", json=endless(stream=False))
                for _ in range(3)
            ]
            wait_for(lambda: served.metric(PROCESSING) == 3)
            time.sleep(0.3)
            loaded = served.service.engine._models._loaded["demo:latest"].model
            os.kill(loaded._backend.model._supervisor._process._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            assert [run.result().status_code for run in runs] == [500] * 3
        assert served.post("/api/generate", SHORT).json()["response"] == expected
        assert served.metric("mllama_loads_total") == 2
        assert is_free(served)


def test_a_bug_in_one_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on; what comes after them has the model loaded again."""
    tokenize = LoadedModel.tokenize

    def wrong(self: LoadedModel, text: str, **more: Any) -> list[int]:
        return {}["secret of the house"] if text == "wrong" else tokenize(self, text, **more)  # type: ignore[no-any-return]

    monkeypatch.setattr(LoadedModel, "tokenize", wrong)
    with running(ServerSettings(port=0, parallel=2)) as served:
        limited = endless(stream=False) | {"options": {"temperature": 0, "num_predict": 400}}
        with ThreadPoolExecutor(2) as pool:
            run = pool.submit(served.client().post, "/api/generate", json=limited)
            wait_for(lambda: served.metric(PROCESSING) == 1)
            answer = served.post("/api/generate", {**SHORT, "prompt": "wrong", "raw": True})
            assert answer.status_code == 500 and "secret" not in answer.text
            assert served.post("/api/generate", SHORT).is_success
            assert run.result().json()["eval_count"] == 400
        assert served.metric("mllama_loads_total") == 2


def test_an_error_of_one_request_is_its_own(together: Running) -> None:
    long = {**SHORT, "prompt": "word " * 6000}
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(together.client().post, "/api/chat", json=question("wide.png"))
        assert together.post("/api/generate", long).status_code == 400
        assert run.result().is_success
    assert together.metric("mllama_loads_total") == 1


def test_models_change_only_when_nobody_uses_them(together: Running) -> None:
    """A model that needs the room waits for the replies of the other one, and comes before later ones."""
    settings = ServerSettings(port=0, parallel=2, memory=1000)
    limited = endless(stream=False) | {"options": {"temperature": 0, "num_predict": 300}}
    with running(settings, plan=lambda card, _: Need({"CPU": 600})) as served, ThreadPoolExecutor(4) as pool:

        def ask(body: dict[str, Any]) -> tuple[int, float]:
            answer = served.client().post("/api/generate", json=body)
            return answer.status_code, time.monotonic()

        first = pool.submit(ask, limited)
        wait_for(lambda: served.metric(PROCESSING) == 1)
        other = pool.submit(ask, {**SHORT, "model": "other"})
        time.sleep(0.1)
        last = pool.submit(ask, SHORT)
        results = [run.result() for run in (first, other, last)]
        assert [status for status, _ in results] == [200] * 3
        assert results[0][1] <= results[1][1] <= results[2][1]
        assert [one["name"] for one in served.get("/api/ps").json()["models"]] == ["demo:latest"]


def test_unload_and_keep_alive_wait_for_the_last_one(
    together: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded() -> list[str]:
        return [one["name"] for one in together.get("/api/ps").json()["models"]]

    computes, go, compute = threading.Event(), threading.Event(), Engine._compute

    def held(self: Engine, job: Job, loaded: Loaded) -> None:
        if not computes.is_set():  # the first one
            computes.set()
            assert go.wait(60)
        compute(self, job, loaded)

    monkeypatch.setattr(Engine, "_compute", held)
    options = {"temperature": 0, "num_predict": 200}
    limited = endless(stream=False, keep_alive=0) | {"options": options}
    for body in ({"model": "demo", "keep_alive": 0}, {**SHORT, "keep_alive": 0}):
        computes.clear()
        go.clear()
        with ThreadPoolExecutor(2) as pool:
            run = pool.submit(together.client().post, "/api/generate", json=limited)
            assert computes.wait(60)
            assert together.post("/api/generate", body).is_success
            assert loaded() == ["demo:latest"]
            go.set()
            assert run.result().json()["eval_count"] == 200
        wait_for(lambda: loaded() == [])
        assert together.post("/api/generate", SHORT).is_success
        assert loaded() == ["demo:latest"]


def test_images_of_the_next_request_are_encoded_while_it_waits(
    monkeypatch: pytest.MonkeyPatch, expected: Callable[..., str]
) -> None:
    encoded: list[str] = []
    encode = Scheduler.encode

    def spy(self: Scheduler, *args: Any) -> Any:
        encoded.append(threading.current_thread().name)
        return encode(self, *args)

    monkeypatch.setattr(Scheduler, "encode", spy)
    with running(ServerSettings(port=0, parallel=2)) as served, ThreadPoolExecutor(2) as pool:
        with sent(served, "/api/generate", endless()), sent(served, "/api/generate", endless()):
            wait_for(lambda: served.metric(PROCESSING) == 2)
            waits = pool.submit(served.client().post, "/api/chat", json=question("apple.png"))
            wait_for(lambda: encoded)
            gone = pool.submit(served.client().post, "/api/chat", json=question("wide.png", model="other"))
            assert served.metric(PROCESSING) >= 2
        answer = waits.result()
        assert answer.json()["message"]["content"] == expected("apple.png", "Describe this image.")
        assert gone.result().is_success
        assert encoded == ["mllama-ahead", "mllama-reply"]
        assert served.metric('mllama_images_total{source="encoded"}') == 2
        assert served.metric('mllama_images_total{source="memory"}') == 0


def test_the_end_while_an_image_is_encoded_ahead(slow: Path) -> None:
    """Nothing of it stays, and a client that goes away stops it."""
    offers = (Offer("slow:latest", str(slow)),)
    form = endless("slow")
    with running(
        ServerSettings(port=0, parallel=2, grace=0.1), offers=offers, given={"n_ctx": 16_384}
    ) as served:
        with sent(served, "/api/generate", form), sent(served, "/api/generate", form):
            wait_for(lambda: served.metric(PROCESSING) == 2)
            talks = served.service.engine._models._loaded["slow:latest"].talks
            assert talks is not None
            for _ in range(2):
                with sent(served, "/api/chat", slow_image(True)):
                    wait_for(lambda: talks._is_ahead)
                wait_for(lambda: not talks._is_ahead, 3)
            late = sent(served, "/api/chat", slow_image(True))
            late.__enter__()
            wait_for(lambda: talks._is_ahead)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert not any(thread.name == "mllama-ahead" for thread in threading.enumerate())
    late.__exit__(None, None, None)


def test_a_time_limit_ends_one_of_several(slow: Path) -> None:
    settings = ServerSettings(port=0, time_limit=0.5, parallel=2)
    offers = (Offer("slow:latest", str(slow)), *DEMO)
    with running(settings, offers=offers, given={"n_ctx": 512}) as served, ThreadPoolExecutor(2) as pool:
        late = pool.submit(served.client().post, "/api/chat", json=slow_image(False))
        assert served.post("/api/generate", SHORT).is_success
        assert late.result().status_code == 504
        assert served.metric('mllama_cancelled_total{reason="time"}') == 1


def test_a_signal_lets_all_that_run_end() -> None:
    body = endless(stream=False) | {"options": {"temperature": 0, "num_predict": 600}}
    with process("-m", "demo", "--shutdown-grace", "60", "--parallel", "2", "-t", "1") as (child, url):
        with ThreadPoolExecutor(3) as pool:

            def ask(_: int) -> httpx.Response:
                return httpx.post(f"{url}/api/generate", json=body, timeout=60)

            runs = [pool.submit(ask, i) for i in range(3)]
            wait_for(
                lambda: (
                    "processing 2.0" in (text := httpx.get(f"{url}/metrics").text) and "queued 1.0" in text
                )
            )
            child.terminate()
            assert sorted(run.result().status_code for run in runs) == [200, 200, 503]
            assert sorted(run.result().json().get("eval_count", 0) for run in runs) == [0, 600, 600]
        assert child.wait(60) == 0
        assert child.stderr is not None and child.stderr.read() == ""


def test_the_grace_has_an_end_for_all() -> None:
    with process("-m", "demo", "--shutdown-grace", "0.2", "-c", "0", OLLAMA_NUM_PARALLEL="2") as (child, url):

        def last_line(_: int) -> Any:
            with httpx.stream("POST", f"{url}/api/generate", json=endless(), timeout=60) as answer:
                return [json.loads(line) for line in answer.iter_lines()][-1]

        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(last_line, i) for i in range(2)]
            wait_for(lambda: "processing 2.0" in httpx.get(f"{url}/metrics").text)
            time.sleep(0.3)
            child.terminate()
            assert [run.result() for run in runs] == [{"error": "the server is stopping"}] * 2
        assert child.wait(60) == 0


def test_many_clients_that_go_away() -> None:
    with running(ServerSettings(port=0, max_queue=64, parallel=4)) as served:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(lambda seed: one_client(served, seed, 8), range(8))) > 20
        wait_for(lambda: is_free(served))
        assert served.metric("mllama_loads_total") == 1
        assert served.post("/api/generate", SHORT).is_success


def test_how_many_by_default(together: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    card = together.service.catalog.find("demo")
    settings = Opening({"n_ctx": 1024}, tuned=False).settings(card)
    for n_cpus, n in ((1, 1), (7, 1), (8, 4), (64, 4)):
        monkeypatch.setattr("mllama_gguf.server.models.usable_cpus", lambda n_cpus=n_cpus: n_cpus)
        assert need_of(card, settings).parallel == n
    assert need_of(card, settings, 3).parallel == 3
    one, five = (need_of(card, settings, n).n_bytes["CPU"] for n in (1, 5))
    assert five - one > 3_000_000  # four more conversations of 1024 cells
    assert from_environment({"OLLAMA_NUM_PARALLEL": "3"}) == {"parallel": 3}
    assert from_environment({"OLLAMA_NUM_PARALLEL": "0"}) == {}
    for wrong in ("-1", "x", "256", "1e3", "٣"):
        with pytest.raises(RequestError, match="OLLAMA_NUM_PARALLEL"):
            from_environment({"OLLAMA_NUM_PARALLEL": wrong})


@pytest.mark.parametrize(("most", "n"), [(99, 16), (16, 16), (15, 8), (5, 4), (1, 1), (0, 1)])
def test_as_many_as_fit_on_a_gpu(
    together: Running, monkeypatch: pytest.MonkeyPatch, most: int, n: int
) -> None:
    """The plan says how many have room, with all layers there."""
    card = together.service.catalog.find("demo")
    settings = Opening({"n_gpu_layers": "auto"}, tuned=False).settings(card)
    asked: list[int] = []

    def plan(*_: Any, parallel: int, n_gpu_layers: int, **more: Any) -> Plan:
        asked.append(parallel)
        assert n_gpu_layers == -1
        memory = DeviceMemory("GPU", 0, 0, parallel, 0, 0, 0, 0)
        return Plan(1, 1, (), {}, (Setting(-1, (memory,), ("GPU",) if parallel > most else ()),), parallel)

    gpu = Device("GPU", "a GPU", "gpu", 1, 1)
    monkeypatch.setattr("mllama_gguf.server.models.devices", lambda: [gpu])
    monkeypatch.setattr("mllama_gguf.server.models.make_plan", plan)
    need = need_of(card, settings)
    assert need.parallel == n and bool(need.lacking) == (most == 0)
    assert asked == [i for i in (16, 8, 4, 2, 1) if i >= n]
