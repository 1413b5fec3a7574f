"""Which models are offered, under which names, and what their manifests say about replies."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyFiles
from serving import Running, running

from mllama_gguf.errors import RequestError
from mllama_gguf.server.catalog import FRESH_SECONDS, Catalog, Offer, canonical, offer_of, show_count
from mllama_gguf.server.problems import Refused
from mllama_gguf.store.resolve import BUNDLED

Files = Callable[[str], TinyFiles]
PREFIX = "application/vnd.ollama.image."
PARAMS = {"temperature": 0, "stop": ["apple"], "num_ctx": 600}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Ollama store with the demo model as llama3.2-vision, and nothing else on this machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLLAMA_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    blobs = tmp_path / "ollama" / "blobs"
    blobs.mkdir(parents=True)
    layers = []
    for kind, data in (
        ("model", BUNDLED["demo"].read_bytes()),
        ("params", json.dumps(PARAMS).encode()),
        ("system", b"You look at drawings."),
        ("license", b"A licence."),
    ):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / f"sha256-{digest}").write_bytes(data)
        layers.append({"mediaType": PREFIX + kind, "digest": f"sha256:{digest}", "size": len(data)})
    manifest = tmp_path / "ollama/manifests/registry.ollama.ai/library/llama3.2-vision/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": layers}))
    return tmp_path


def reply(served: Running, **more: Any) -> dict[str, Any]:
    body = {"model": "llama3.2-vision", "messages": [{"role": "user", "content": "hello"}], "stream": False}
    answer = served.post("/api/chat", {**body, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_every_model_of_this_machine_is_offered(store: Path) -> None:
    with running(offers=None) as served:
        tags = served.get("/api/tags").json()["models"]
        assert {one["name"] for one in tags} == {"demo:latest", "llama3.2-vision:latest"}
        (digest,) = [one["digest"] for one in tags if one["name"].startswith("llama")]
        manifest = next((store / "ollama" / "manifests").rglob("latest"))
        assert digest == hashlib.sha256(manifest.read_bytes()).hexdigest()
        for path in ("/v1/models/llama3.2-vision", "/v1/models/LLAMA3.2-Vision:latest"):
            assert served.get(path).status_code == 200


def test_what_a_manifest_says(store: Path) -> None:
    """Request over manifest over default."""
    with running(offers=None) as served:
        found = served.post("/api/show", {"model": "llama3.2-vision"}).json()
        assert found["system"] == "You look at drawings." and found["license"] == "A licence."
        assert 'stop                           "apple"' in found["parameters"]
        with_system = reply(served)["prompt_eval_count"]
        assert reply(served)["message"] == reply(served)["message"]  # temperature 0
        own = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]
        assert reply(served, messages=own)["prompt_eval_count"] < with_system
        (line,) = served.get("/api/ps").json()["models"]
        assert line["context_length"] == 600
        texts = {
            reply(served, options={"temperature": 5, "top_k": 0, "top_p": 1, "seed": i, "num_predict": 9})[
                "message"
            ]["content"]
            for i in range(3)
        }
        assert len(texts) > 1


def test_a_model_that_comes_later_is_found(store: Path) -> None:
    manifests = store / "ollama" / "manifests" / "registry.ollama.ai" / "library"
    catalog = Catalog(None)
    assert len(catalog.cards()) == 2
    (manifests / "llama3.2-vision" / "other").write_bytes((manifests / "llama3.2-vision/latest").read_bytes())
    with pytest.raises(Refused, match="vision:other' not found"):
        catalog.find("llama3.2-vision:other")  # one look a second
    time.sleep(1.1)
    assert catalog.find("llama3.2-vision:other").name == "llama3.2-vision:other"


def test_other_files_under_a_name_are_loaded_again(tmp_path: Path, tiny_files: Files) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_files("gqa").one.read_bytes())
    with running(offers=(Offer("x:latest", str(path)),)) as served:
        body = {"model": "x", "prompt": "the dog", "stream": False, "options": {"num_predict": 3}}
        assert served.post("/api/generate", body).status_code == 200
        other = tmp_path / "other"
        other.write_bytes(BUNDLED["demo"].read_bytes())
        os.replace(other, path)
        served.service.catalog.forget()
        assert served.post("/api/generate", body).status_code == 200
        assert served.metric("mllama_loads_total") == 2
        assert served.post("/api/show", {"model": "x"}).json()["details"]["parameter_size"] == "5.5M"
        path.unlink()
        served.service.catalog.forget()
        assert served.post("/api/generate", body).status_code == 404


def test_names() -> None:
    for words in ("X", "x:latest", "library/x", "registry.ollama.ai/library/x", "ollama:x", " x "):
        assert canonical(words) == "x:latest", words
    assert canonical("me/x:7b") == "me/x:7b"
    assert canonical("example.org/me/x") == "example.org/me/x:latest"


def test_offers(tmp_path: Path) -> None:
    for words, expected in (
        ("demo", ("demo:latest", "demo")),
        ("ollama:llama3.2-vision:11b", ("llama3.2-vision:11b", "ollama:llama3.2-vision:11b")),
        ("/models/My.Model.gguf", ("my.model:latest", "/models/My.Model.gguf")),
        ("hf:a/b/c.gguf", ("c:latest", "hf:a/b/c.gguf")),
        ("Vision:7b=/m/x.gguf", ("vision:7b", "/m/x.gguf")),
        ("me=hf:a/b/c.gguf", ("me:latest", "hf:a/b/c.gguf")),
        ("/m/a=b.gguf", ("a=b:latest", "/m/a=b.gguf")),
    ):
        found = offer_of(words)
        assert (found.name, found.reference) == expected, words
    with pytest.raises(RequestError, match="expected MODEL or NAME=MODEL"):
        offer_of("name=")


def test_counts() -> None:
    assert [show_count(n) for n in (7, 5_500_000, 10_670_000_000)] == ["7", "5.5M", "10.7B"]


def test_images_are_counted_by_where_they_came_from(folder: Path) -> None:
    from serving import image64

    from mllama_gguf.server.models import Opening

    message = {"role": "user", "content": "x", "images": [image64()]}
    body = {"model": "demo", "messages": [message], "stream": False}
    with running(opening=Opening({"n_threads": 1}, tuned=False)) as served:
        for _ in range(2):
            assert served.post("/api/chat", body).is_success
        assert served.metric('mllama_images_total{source="encoded"}') == 1
        assert served.metric('mllama_images_total{source="memory"}') == 1
        served.post("/api/chat", {"model": "demo", "messages": [], "keep_alive": 0})
        assert served.post("/api/chat", body).is_success
        assert served.metric('mllama_images_total{source="disk"}') == 1


def test_a_model_found_a_short_time_ago_is_found_without_a_look_at_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    catalog = Catalog([offer_of("demo")])
    assert catalog.recent("demo") is None  # nobody looked yet
    card = catalog.find("demo")
    assert catalog.recent("demo") is catalog.recent("DEMO:latest") is card
    assert catalog.recent("other") is catalog.recent("d" * 1000) is None
    catalog.forget()
    assert catalog.recent("demo") is None
    catalog.find("demo")
    later = time.monotonic() + FRESH_SECONDS
    monkeypatch.setattr("mllama_gguf.server.catalog.time.monotonic", lambda: later)
    assert catalog.recent("demo") is None
