"""Names, Ollama's stores, models.lock, downloads and their checks, against a real server that misbehaves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import layouts
import pytest
import tiny
from helpers import TinyFiles, answering, elsewhere, without_rights
from model_server import COMMIT, ModelServer, serve
from stores import in_store

from mllama_gguf import DownloadError, Mllama, MllamaError, ModelError, RequestError
from mllama_gguf.cli.main import run
from mllama_gguf.inspect.inventory import closed_stores, inventory, look, names
from mllama_gguf.store import download
from mllama_gguf.store.lockfile import SHIPPED, locked_models, read_lock, write_locked
from mllama_gguf.store.manifest import parse_manifest
from mllama_gguf.store.pull import lock, pull
from mllama_gguf.store.references import HubRef, OllamaRef
from mllama_gguf.store.resolve import BUNDLED, ModelFiles, resolve
from mllama_gguf.store.verify import require_verified, verify

Captured = pytest.CaptureFixture[str]
DATA = random.Random(1).randbytes(3_000_001)
SHA256 = hashlib.sha256(DATA).hexdigest()
DEMO = BUNDLED["demo"]
EXAMPLE = str(Path(__file__).parents[2] / "examples" / "apple.png")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for each test: no model of this machine is seen or touched."""
    for name in ("MLLAMA_MODEL", "MLLAMA_MMPROJ", "MLLAMA_LOCK", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("MLLAMA_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.001)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    with serve() as running:
        monkeypatch.setenv("HF_ENDPOINT", f"http://{running.address}")
        yield running


def tag(server: ModelServer) -> str:
    return f"ollama:{server.address}/library/m:1"


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("ollama:llama3.2-vision", "registry.ollama.ai/library/llama3.2-vision/latest"),
        ("ollama:llama3.2-vision:11b", "registry.ollama.ai/library/llama3.2-vision/11b"),
        ("ollama:me/mine:v1", "registry.ollama.ai/me/mine/v1"),
        ("ollama:host.example:5000/me/mine", "host.example:5000/me/mine/latest"),
    ],
)
def test_ollama_names(words: str, path: str) -> None:
    ref = OllamaRef.parse(words)
    assert ref.path == path
    assert OllamaRef.parse(str(ref)) == ref


@pytest.mark.parametrize(
    "words",
    [
        "",
        "..",
        "../../etc/passwd",
        "a/../b",
        "a:..",
        "a:../b",
        "/etc/passwd",
        "a/b/c/d",
        "a:",
        ".a",
        "a\\b",
        "a b",
    ],
)
def test_ollama_names_that_are_refused(words: str) -> None:
    with pytest.raises(ModelError, match=r"is not a model's name"):
        resolve(f"ollama:{words}")


@pytest.mark.parametrize(
    "words", ["", "a", "a/b", "a/b/../c", "a/../b", "../a/b", "a/b//c", "a/b@../c", "a/b/.c"]
)
def test_hub_names_that_are_refused(words: str) -> None:
    with pytest.raises(ModelError, match=r"is not a file's name"):
        resolve(f"hf:{words}")


def test_plain_http_is_for_this_machine_alone() -> None:
    assert OllamaRef.parse("ollama:127.0.0.1:9/a/b").url.startswith("http://")
    assert OllamaRef.parse("ollama:127.0.0.1.example/a/b").url.startswith("https://")
    assert OllamaRef.parse("ollama:b").url == "https://registry.ollama.ai/v2/library/b"


def test_the_default_model(monkeypatch: pytest.MonkeyPatch, tiny_files: Callable[[str], TinyFiles]) -> None:
    assert resolve().text == DEMO
    monkeypatch.setenv("MLLAMA_MODEL", str(tiny_files("gqa").one))
    assert resolve().text == tiny_files("gqa").one
    with Mllama.from_pretrained() as model:
        assert model.model_path == tiny_files("gqa").one


def test_a_folder_is_not_taken_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "llama3.2-vision-11b", "other"):
        (tmp_path / name).mkdir()
    assert resolve("demo").text == DEMO
    with pytest.raises(ModelError, match="is not on this machine; fetch it"):
        resolve("llama3.2-vision-11b")
    assert resolve("other").text == Path("other")  # opening it says what is wrong
    (tmp_path / "other").rmdir()
    (tmp_path / "other").write_bytes(b"GGUF")
    assert resolve("other").text == Path("other")


@pytest.mark.parametrize("name", ["ollama:nothing", "hf:a/b/c.gguf", "llama3.2-vision-11b"])
def test_a_model_that_is_not_here(name: str, capsys: Captured) -> None:
    assert run(["caption", EXAMPLE, "-m", name]) == 1
    assert capsys.readouterr().err == f"Error: {name} is not on this machine; fetch it: mllama pull {name}\n"


def test_a_name_that_nothing_has(capsys: Captured) -> None:
    assert run(["pull", "nothing"]) == 1
    assert "no model is called 'nothing'" in capsys.readouterr().err
    with pytest.raises(ModelError, match=r"no such file, nor a model's name"):
        resolve("nothing")


# ---- Ollama's store ----------------------------------------------------------------------------------------


def test_caption_from_ollamas_store(home: Path, capsys: Captured) -> None:
    (blob,) = in_store(home / "ollama", "ollama:llama3.2-vision", ("model", DEMO.read_bytes()))
    assert run(["caption", EXAMPLE, "-m", "ollama:llama3.2-vision", "--verify"]) == 0
    assert capsys.readouterr().out == "a red apple\n"
    assert resolve("ollama:llama3.2-vision").paths == (blob,)
    assert run(["info", "ollama:llama3.2-vision"]) == 0
    assert str(blob) in capsys.readouterr().out


def test_two_blobs_in_a_home(home: Path, tiny_files: Callable[[str], TinyFiles]) -> None:
    tiny = tiny_files("gqa")
    parts = (
        ("model", tiny.text.read_bytes()),
        ("projector", tiny.mmproj.read_bytes()),
        ("license", b"words"),
    )
    blobs = in_store(home / ".ollama/models", "ollama:host.example/me/old:x", *parts)
    assert resolve("ollama:host.example/me/old:x").paths == tuple(blobs[:2])
    with Mllama.from_pretrained("ollama:host.example/me/old:x", verify=True, n_ctx=256) as model:
        assert model.hparams.has_vision


def test_the_store_that_is_whole_wins(home: Path) -> None:
    (first,) = in_store(home / "ollama", "ollama:m", ("model", b"one"))
    (second,) = in_store(home / ".ollama/models", "ollama:m", ("model", b"two"))
    assert resolve("ollama:m").text == first
    first.write_bytes(b"longer than it was")
    assert resolve("ollama:m").text == second
    second.unlink()
    with pytest.raises(
        ModelError, match=r"its blob sha256-\w+ is missing or not of 3 bytes; .*mllama pull ollama:m"
    ):
        resolve("ollama:m")


@pytest.mark.parametrize(
    "layer",
    [
        {"digest": "sha256:../../../../etc/passwd", "size": 1},
        {"digest": "sha256:" + "a" * 63, "size": 1},
        {"digest": "sha256:" + "A" * 64, "size": 1},
        {"digest": "md5:" + "a" * 64, "size": 1},
        {"digest": "sha256:" + "a" * 64 + "/..", "size": 1},
        {"digest": "sha256:" + "a" * 64, "size": -1},
        {"digest": "sha256:" + "a" * 64, "size": "1"},
        {"digest": "sha256:" + "a" * 64, "size": 2**63},
        {"digest": None, "size": 1},
        {"size": 1},
        {"digest": "Z" * 100_000, "size": 1},
        {"digest": "sha256:" + "a" * 64, "size": "Z" * 100_000},
        {"digest": "sha256:" + "a" * 64, "size": 10**4000},
        {"mediaType": "application/vnd.ollama.image.adapter", "size": 10**4000},
    ],
)
def test_manifests_that_are_refused(layer: dict[str, object]) -> None:
    words = json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", **layer}]}).encode()
    with pytest.raises(ModelError, match=r"m.json: ") as raised:
        parse_manifest(words, "m.json")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "words", [b"", b"[]", b"{}", b'{"layers": 1}', b'{"layers": [1]}', b'{"layers": []}', b"\xff"]
)
def test_manifests_that_are_none(words: bytes) -> None:
    with pytest.raises(ModelError, match=r"m.json: "):
        parse_manifest(words, "m.json")


def test_an_adapter_of_an_absurd_size() -> None:
    layer = {"mediaType": "application/vnd.ollama.image.adapter", "size": 10**400}
    with pytest.raises(ModelError, match=r"m.json: has an adapter layer \(LoRA\), which"):
        parse_manifest(json.dumps({"layers": [layer]}).encode(), "m.json")


def test_a_store_that_is_closed(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = Path(folder) / "models"
        in_store(store, "ollama:m", ("model", b"m"))
        monkeypatch.setenv("OLLAMA_MODELS", str(store))
        monkeypatch.setenv("MLLAMA_DOWNLOADS", f"{folder}/none")
        monkeypatch.setenv("HOME", folder)
        monkeypatch.chdir(store)
        store.chmod(0)
        try:
            with without_rights():
                with pytest.raises(ModelError, match=r"this user may not read it \(permission denied\)"):
                    resolve("ollama:m")
                assert [name for name, _ in names()] == ["demo"]
                assert store in closed_stores()
                with pytest.raises(ModelError, match=r"m.gguf: Permission denied$"):
                    resolve(store / "m.gguf")
                assert resolve("demo").text == DEMO
        finally:
            store.chmod(0o755)


# ---- pull from a registry ----------------------------------------------------------------------------------


def test_pull(server: ModelServer, home: Path) -> None:
    server.add_model("library/m/1", ("model", DATA), ("projector", b"p"), ("license", b"words"))
    seen: list[tuple[str, int, int]] = []
    files = pull(tag(server), lambda *step: seen.append(step))
    assert [path.read_bytes() for path in files.paths] == [DATA, b"p"]
    assert ("download", len(DATA), len(DATA)) in seen
    licence = f"sha256-{hashlib.sha256(b'words').hexdigest()}"
    assert files_in(home / "downloads") == sorted(["1", licence, *(p.name for p in files.paths)])
    n_requests = len(server.requests)
    assert pull(tag(server)) == files
    assert len(server.requests) == n_requests + 1  # the manifest


@pytest.mark.parametrize("kind", ["a file", "a link", "a hard link", "a pipe", "a folder"])
def test_a_pull_replaces_nothing_but_a_manifest(server: ModelServer, home: Path, kind: str) -> None:
    server.add_model("library/m/1", ("model", DATA))
    place = home / "downloads" / "manifests" / server.address / "library" / "m" / "1"
    place.parent.mkdir(parents=True)
    mine = home / "mine.txt"
    mine.write_text("my words")
    if kind == "a file":
        place.write_text('["my list"]')
    elif kind == "a pipe":
        os.mkfifo(place)
    elif kind == "a folder":
        place.mkdir()
    else:
        (place.symlink_to if kind == "a link" else place.hardlink_to)(mine)
    before = place.stat()
    with pytest.raises((RequestError, ModelError)) as raised:
        pull(tag(server))
    assert "\n" not in str(raised.value) and place.name in str(raised.value)
    assert server.gets("blobs") == []
    assert mine.read_text() == "my words" and place.stat().st_mtime_ns == before.st_mtime_ns


def test_a_manifest_without_an_end(server: ModelServer, home: Path) -> None:
    server.add_model("library/m/1", ("model", DATA))
    good = pull(tag(server))
    server.manifests["library/m/1"] = server.manifests["library/m/1"].ljust(2 << 20)
    for ask in (pull, lock):
        with pytest.raises(DownloadError, match=r"/manifests/1\): the server sends more than 1048576 bytes"):
            ask(tag(server))
    assert resolve(tag(server)) == good
    assert server.encodings == {"identity"}  # a small answer could become a large one


def test_only_models_that_run_here_are_fetched(server: ModelServer, home: Path, capsys: Captured) -> None:
    other = [
        ({"model_family": "llama"}, "llama"),
        ({"model_family": "llama", "model_families": ["llama", "clip", 3, []]}, "llama, clip"),
        ({"model_families": ["\x1b" * 2000]}, "\\x1b"),
    ]
    for config, family in other:
        server.add_model("library/m/1", ("model", DATA), config=json.dumps(config).encode())
        with pytest.raises(ModelError, match=r"is a model of the family .*; only mllama runs here") as raised:
            pull(tag(server))
        assert f" of the family {family}" in str(raised.value) and len(str(raised.value)) < 300
        assert server.gets(SHA256) == []
    assert run(["pull", tag(server)]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {tag(server)} is a model of the family ")
    assert not (home / "downloads/manifests").exists() or not files_in(home / "downloads/manifests")
    for config in ({}, {"model_family": "mllama"}, {"model_families": ["llama", "mllama"]}, {"x": 1}):
        server.add_model("library/m/1", ("model", DATA), config=json.dumps(config).encode())
        assert pull(tag(server)).text.read_bytes() == DATA


def test_what_ollama_has_is_not_fetched(server: ModelServer, home: Path) -> None:
    (blob,) = in_store(home / "ollama", "ollama:other", ("model", DATA))
    server.add_model("library/m/1", ("model", DATA))
    assert pull(tag(server)).text == blob
    assert server.gets("blobs") == []


@pytest.mark.parametrize("there", [b"", DATA[:-1], DATA + b"x"])
def test_a_blob_of_the_wrong_size_is_replaced(
    server: ModelServer, home: Path, there: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_model("library/m/1", ("model", DATA))
    place = home / "downloads/blobs" / f"sha256-{SHA256}"
    place.parent.mkdir(parents=True)
    place.write_bytes(there)
    server.refuse = [0, 404]  # the manifest comes, the blob does not
    with pytest.raises(DownloadError):
        pull(tag(server))
    assert place.read_bytes() == there  # whole or not at all
    assert pull(tag(server)).text.read_bytes() == DATA
    assert f"{place}: has {len(there)} bytes instead of {len(DATA)}" in caplog.text
    assert len(caplog.text.splitlines()) == 2
    pull(tag(server))
    assert len(caplog.text.splitlines()) == 2


def test_dropped_connections_are_resumed(server: ModelServer) -> None:
    server.add_model("library/m/1", ("model", DATA))
    manifest = len(server.manifests["library/m/1"])
    server.drop_after = [manifest, 1_200_000, 0, 900_000]
    assert pull(tag(server)).text.read_bytes() == DATA
    ranges = server.gets("blobs")
    assert ranges[0] is None
    assert len(ranges) == 4
    assert ranges[1] == ranges[2] == "bytes=1200000-"
    assert ranges[3] == "bytes=2100000-"


def test_a_second_call_resumes(server: ModelServer, home: Path) -> None:
    server.add_model("library/m/1", ("model", DATA))
    partial = home / "downloads/partial" / f"sha256-{SHA256}"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(DATA[:1_500_000])
    assert pull(tag(server)).text.read_bytes() == DATA
    assert server.gets("blobs") == ["bytes=1500000-"]


@pytest.mark.parametrize("n_bytes", [len(DATA), len(DATA) + 5])
def test_a_partial_file_that_is_whole_or_too_long(server: ModelServer, home: Path, n_bytes: int) -> None:
    server.add_model("library/m/1", ("model", DATA))
    partial = home / "downloads/partial" / f"sha256-{SHA256}"
    partial.parent.mkdir(parents=True)
    partial.write_bytes((DATA + b"x" * 5)[:n_bytes])
    assert pull(tag(server)).text.read_bytes() == DATA
    assert len(server.gets("blobs")) == (n_bytes > len(DATA))


def test_a_server_without_ranges(server: ModelServer) -> None:
    server.add_model("library/m/1", ("model", DATA))
    server.ranges = False
    server.drop_after = [len(server.manifests["library/m/1"]), 1_200_000]
    assert pull(tag(server)).text.read_bytes() == DATA


def test_a_connection_that_never_holds(server: ModelServer, home: Path) -> None:
    server.add_model("library/m/1", ("model", DATA))
    server.drop_after = [len(server.manifests["library/m/1"]), 1000, *[0] * 20]
    with pytest.raises(DownloadError, match=r"5 times; the part that arrived is kept: run the command"):
        pull(tag(server))
    assert files_in(home / "downloads") == [f"sha256-{SHA256}"]
    assert (home / "downloads/partial" / f"sha256-{SHA256}").read_bytes() == DATA[:1000]


def test_nobody_answers(server: ModelServer) -> None:
    with pytest.raises(DownloadError, match=r"the connection failed .*5 times"):
        pull("ollama:127.0.0.1:1/library/m:1")


@pytest.mark.parametrize("from_a_part", [False, True])
def test_wrong_bytes(server: ModelServer, home: Path, from_a_part: bool) -> None:
    server.add_model("library/m/1", ("model", DATA))
    server.blobs[SHA256] = DATA[:-1] + b"?"
    partial = home / "downloads/partial" / f"sha256-{SHA256}"
    if from_a_part:
        partial.parent.mkdir(parents=True)
        partial.write_bytes(DATA[:1000])
    with pytest.raises(DownloadError, match=rf"sha256 .* instead of {SHA256}; it was thrown away"):
        pull(tag(server))
    assert files_in(home / "downloads") == []


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"?"])
def test_wrong_length(server: ModelServer, home: Path, data: bytes) -> None:
    server.add_model("library/m/1", ("model", DATA))
    server.blobs[SHA256] = data
    with pytest.raises(DownloadError, match=rf"the server has {len(data)} bytes, it must be {len(DATA)}"):
        pull(tag(server))
    assert not (home / "downloads/blobs" / f"sha256-{SHA256}").exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "does not have it"), (401, "not public"), (403, "not public"), (418, "answers 418")],
)
def test_refusals(server: ModelServer, status: int, words: str, capsys: Captured) -> None:
    server.always = status
    assert run(["pull", tag(server)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Error: {tag(server)} (http://{server.address}/v2/library/m/manifests/1): ")
    assert words in err
    assert err.count("\n") == len(server.requests) == 1


def test_passing_trouble_of_the_server(server: ModelServer) -> None:
    server.add_model("library/m/1", ("model", DATA))
    server.refuse = [500, 503, 429]
    assert pull(tag(server)).text.read_bytes() == DATA
    server.always = 500
    with pytest.raises(DownloadError, match=r"500 Internal Server Error, 5 times"):
        pull(tag(server))


def test_redirects(server: ModelServer) -> None:
    server.add_model("library/m/1", ("model", DATA))
    with serve() as other:
        other.blobs = server.blobs
        server.redirect_to = f"http://localhost:{other.address.partition(':')[2]}"
        assert pull(tag(server)).text.read_bytes() == DATA
        assert len(other.gets("blobs")) == 1


def test_the_body_of_a_redirect_is_not_read(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    server.add_model("library/m/1", ("model", DATA))
    with serve() as other:
        other.blobs = server.blobs
        server.redirect_to, server.redirect_bytes = f"http://{other.address}", 1 << 40
        assert pull(tag(server)).text.read_bytes() == DATA


def test_redirects_without_an_end(server: ModelServer) -> None:
    server.add_model("library/m/1", ("model", DATA))
    server.redirect_to = f"http://{server.address}"
    with pytest.raises(DownloadError, match=f"sha256:{SHA256}: the server redirects more than 20 times"):
        pull(tag(server))


def test_a_redirect_to_plain_http_elsewhere(server: ModelServer) -> None:
    server.add_model("library/m/1", ("model", DATA))
    server.redirect_to = "http://models.example"
    with pytest.raises(DownloadError, match=r"models.example.* the connection is not encrypted"):
        pull(tag(server))


@pytest.mark.parametrize(
    "answer",
    [
        b"Z" * 90_000,
        b"HTTP/1.1 400 " + b"Z" * 60_000,
        b"HTTP/1.1 302 x\r\nLocation: http://a/" + b"z" * 60_000,
    ],
)
def test_what_a_server_says_is_cut(answer: bytes) -> None:
    with answering(answer + b"\r\n\r\n") as address, pytest.raises(DownloadError) as raised:
        pull(f"ollama:{address}/library/m:1")
    assert len(str(raised.value)) < 700


def test_no_room(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_model("library/m/1", ("model", DATA))
    usage = shutil.disk_usage("/")._replace(free=len(DATA) + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        DownloadError, match=r"not enough room: .* set MLLAMA_DOWNLOADS to a folder on another disk"
    ):
        pull(tag(server))
    assert server.gets("blobs") == []


def test_the_disk_fills_up(server: ModelServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_model("library/m/1", ("model", DATA))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DownloadError, match=r"the disk is full; free some room and run the command again to resume"
    ):
        pull(tag(server))
    assert not (home / "downloads/blobs" / f"sha256-{SHA256}").exists()


def test_two_pulls_at_once(server: ModelServer) -> None:
    server.add_model("library/m/1", ("model", DATA))
    pull_it = [sys.executable, "-m", "mllama_gguf", "pull", tag(server)]
    server.gate = threading.Event()
    server.gate.set()
    both = [subprocess.Popen(pull_it, **elsewhere(), stderr=subprocess.PIPE) for _ in range(2)]
    server.gate.clear()
    while len(server.gets("manifests")) < 2 and all(p.poll() is None for p in both):
        time.sleep(0.01)
    server.gate.set()
    for one in both:
        _, err = one.communicate(timeout=60)
        assert one.returncode == 0, err
    assert len(server.gets("blobs")) == 1


# ---- the hub -----------------------------------------------------------------------------------------------


def test_pull_from_the_hub(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.hub_files["me/repo/dir/m.gguf"] = DATA
    path = pull("hf:me/repo/dir/m.gguf").text
    assert path.read_bytes() == DATA
    assert path.is_relative_to(Path("hub").absolute())
    assert resolve("hf:me/repo/dir/m.gguf").text == path
    assert [result.ok for result in verify(resolve("hf:me/repo/dir/m.gguf"))] == [True]
    path.resolve().write_bytes(b"x" + DATA[1:])
    with pytest.raises(ModelError, match=r"damaged or not the published file"):
        require_verified(resolve("hf:me/repo/dir/m.gguf"))


def test_a_file_of_the_hub_with_another_hash(server: ModelServer, home: Path) -> None:
    server.hub_files["me/repo/m.gguf"] = DATA
    server.hub_sha256["me/repo/m.gguf"] = "0" * 64
    with pytest.raises(DownloadError, match=rf"sha256 {SHA256} instead of {'0' * 64}; it was thrown away"):
        pull("hf:me/repo/m.gguf")
    assert [p for p in (home / "hub").rglob("*") if p.name in ("m.gguf", "0" * 64)] == []


def test_a_gated_repository(server: ModelServer, capsys: Captured) -> None:
    server.always, server.error_code = 403, "GatedRepo"
    assert run(["pull", "hf:me/repo/m.gguf"]) == 1
    err = capsys.readouterr().err
    assert f"http://{server.address}/me/repo, then set HF_TOKEN" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "EntryNotFound", r"does not have it \(404\)$"),
        (404, "RepoNotFound", "set HF_TOKEN"),
        (401, "RepoNotFound", "set HF_TOKEN"),
        (403, None, "set HF_TOKEN"),
        (500, None, "answers 500, each time"),
    ],
)
def test_refusals_of_the_hub(
    server: ModelServer, status: int, code: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server.always, server.error_code = status, code
    with pytest.raises(DownloadError, match=words):
        pull("hf:me/repo/m.gguf")


def test_the_hub_drops_the_connection(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server.hub_files["me/repo/m.gguf"] = DATA
    server.drop_after = [1_000_000]
    assert pull("hf:me/repo/m.gguf").text.read_bytes() == DATA
    assert len(server.gets("m.gguf")) == 2


# ---- models.lock -------------------------------------------------------------------------------------------


def test_the_shipped_lock_file() -> None:
    models = read_lock(SHIPPED)
    published = [file.sha256[:8] for name, model in models.items() if name != "demo" for file in model.files]
    assert published == ["9999d473", "11f27400", "ece5e659", "652e85aa", "622429e8"]
    for name, model in models.items():
        if name != "demo":
            assert model.licence is not None
            assert model.licence.notice.startswith("Built with Llama.")
    assert [result.ok for result in verify(resolve("demo"))] == [True]
    # The package may be installed elsewhere; in the repository there is one file with two
    # names, or two files where links are not kept.
    assert (Path(__file__).parents[2] / "models.lock").read_bytes() == SHIPPED.read_bytes()


def entry(source: str = "ollama:m", **file: object) -> str:
    fields = {"role": "model", "sha256": SHA256, **file}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())
    return f'version = 1\n[models.m]\nsource = "{source}"\n[[models.m.files]]\n{lines}\n'


@pytest.mark.parametrize(
    "words",
    [
        "version = 2",
        "no toml",
        entry(sha256="../../etc/passwd"),
        entry(sha256=SHA256[:-1]),
        entry(role="other"),
        entry(size=-1),
        entry(size=10**400),
        entry(source="ollama:../../x"),
        entry(source="/etc"),
        entry(source="bundled", file="../../../etc/passwd"),
        entry(source="hf:me/repo"),
        entry(source="hf:me/repo", file="../../x"),
        entry(source="hf:me/repo", file="/etc/passwd"),
        entry(source="hf:../..", file="x"),
        entry() + "[models.m.parameters]\nn_gpu_layers = 1\n",
        f"version = '{'Z' * 100_000}'",
        f"version = 1\n[models.{'Z' * 100_000}]\n",
        entry(source="Z" * 100_000),
        entry(source="ollama:" + "Z" * 100_000),
        entry(source="hf:" + "Z" * 100_000),
        entry(sha256="Z" * 100_000),
        entry() + f"[models.m.parameters]\n{'Z' * 100_000} = 1\n",
    ],
)
def test_lock_files_that_are_refused(home: Path, words: str) -> None:
    (home / "models.lock").write_text(words)
    with pytest.raises(ModelError, match=r"^models.lock: ") as raised:
        resolve("m")
    assert len(str(raised.value)) < 700


def test_a_copy_of_the_shipped_lock_file_can_grow(home: Path, server: ModelServer) -> None:
    mine = home / "models.lock"
    mine.write_text("# mine\n" + SHIPPED.read_text())
    server.add_model("library/m/1", ("model", DATA))
    assert run(["lock", tag(server)]) == 0
    assert read_lock(mine).keys() == read_lock(SHIPPED).keys() | {"m-1"}
    assert resolve("demo").text.samefile(DEMO)
    mine.write_text(mine.read_text().replace("demo.gguf", "other.gguf"))
    with pytest.raises(ModelError, match=r"^models.lock: models.demo: 'bundled' is not a source"):
        read_lock(Path("models.lock"))


def test_a_lock_file_with_a_byte_order_mark_can_grow(home: Path, server: ModelServer) -> None:
    mine = home / "models.lock"
    mine.write_text(entry(), "utf-8-sig")
    server.add_model("library/m/1", ("model", DATA))
    assert run(["lock", tag(server)]) == 0
    assert list(read_lock(mine)) == ["m", "m-1"]


def test_pull_a_locked_model(server: ModelServer, home: Path, capsys: Captured) -> None:
    server.add_blob(DATA)
    (home / "models.lock").write_text(entry(f"ollama:{server.address}/library/m", size_about=3_000_000))
    assert run(["pull", "m"]) == 0
    assert SHA256 in capsys.readouterr().out
    assert resolve("m").text.read_bytes() == DATA
    assert server.gets("manifests") == []


def test_lock_and_pull_from_the_hub(server: ModelServer, home: Path) -> None:
    server.hub_files = {"me/repo/m.gguf": DATA, "me/repo/v.gguf": b"vision"}
    assert run(["lock", "hf:me/repo/m.gguf", "--mmproj", "hf:me/repo/v.gguf", "--name", "mine"]) == 0
    mine = read_lock(home / "models.lock")["mine"]
    assert mine.source == f"hf:me/repo@{COMMIT}"
    assert [file.size for file in mine.files] == [len(DATA), 6]
    assert [path.read_bytes() for path in pull("mine").paths] == [DATA, b"vision"]
    assert resolve(f"hf:me/repo@{COMMIT}/m.gguf").mmproj == resolve("mine").mmproj is not None


def test_lock_a_tag_and_fill_in_a_size(server: ModelServer, home: Path) -> None:
    server.add_model("library/m/1", ("model", DATA), ("projector", b"p"))
    assert run(["lock", tag(server)]) == 0
    locked = read_lock(home / "models.lock")["m-1"]
    assert [(file.role, file.size) for file in locked.files] == [("model", len(DATA)), ("mmproj", 1)]

    (home / "models.lock").write_text(
        "# mine\n" + entry(f"ollama:{server.address}/library/m:1", size_about=1)
    )
    assert run(["lock", "m"]) == 0
    assert (home / "models.lock").read_text().startswith("# mine\n")
    assert locked_models()["m"].model.size == len(DATA)
    server.add_model("library/m/1", ("model", b"newer"))
    assert lock("m").model.sha256 == SHA256
    assert lock("m", update=True).model.size == 5


def test_a_lock_file_keeps_its_licence(home: Path) -> None:
    model = read_lock(SHIPPED)["llama3.2-vision-11b-leafspark"]
    write_locked(home / "new.lock", model)
    again = read_lock(home / "new.lock")[model.name]
    assert (again.licence, again.files, again.source) == (model.licence, model.files, model.source)


# ---- verify, models ----------------------------------------------------------------------------------------


def test_verify(home: Path, capsys: Captured) -> None:
    (blob,) = in_store(home / "ollama", "ollama:m", ("model", DATA))
    assert run(["verify", "ollama:m"]) == 0
    assert f"{blob}: ok" in capsys.readouterr().out
    blob.write_bytes(b"x" + DATA[1:])
    assert run(["verify", "ollama:m"]) == run(["verify", str(blob)]) == 1
    assert (
        capsys.readouterr().out.count(f"MISMATCH  sha256:{hashlib.sha256(b'x' + DATA[1:]).hexdigest()}") == 2
    )
    assert run(["caption", EXAMPLE, "-m", "ollama:m", "--verify"]) == 1
    assert "damaged or not the published file" in capsys.readouterr().err
    (home / "other.gguf").write_bytes(DATA)
    assert run(["verify", "other.gguf"]) == 1
    assert capsys.readouterr().out == f"other.gguf: unknown  sha256:{SHA256}\n"


def test_models(
    home: Path, tiny_files: Callable[[str], TinyFiles], server: ModelServer, capsys: Captured
) -> None:
    tiny = tiny_files("gqa")
    in_store(
        home / "ollama",
        "ollama:mine",
        ("model", tiny.text.read_bytes()),
        ("projector", tiny.mmproj.read_bytes()),
    )
    in_store(home / "ollama", "ollama:damaged", ("model", b"GGUF"))
    server.hub_files["me/repo/m.gguf"] = tiny.one.read_bytes()
    pull("hf:me/repo/m.gguf")
    found = {model.name: model for model in inventory()}
    assert set(found) == {"demo", "ollama:mine:latest", "ollama:damaged:latest", "hf:me/repo/m.gguf"}
    mine = found["ollama:mine:latest"]
    assert (mine.place, mine.layout, mine.fits, mine.problem) == ("ollama", "canonical", True, None)
    assert mine.size == tiny.text.stat().st_size + tiny.mmproj.stat().st_size
    assert found["hf:me/repo/m.gguf"].place == "hub"
    assert "truncated" in (found["ollama:damaged:latest"].problem or "")
    assert run(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    usable = ["ollama:mine:latest", "hf:me/repo/m.gguf", "demo"]
    assert [row["name"] for row in rows] == [*usable, "ollama:damaged:latest"]


def test_a_broken_lock_file_hides_nothing_else(home: Path, capsys: Captured) -> None:
    (home / "models.lock").write_text("broken [")
    in_store(home / "ollama", "ollama:mine", ("model", DEMO.read_bytes()))
    for command, words in (
        (["models"], "ollama:mine:latest"),
        (["verify", "demo"], "ok"),
        (["pull", "demo"], "demo.gguf"),
        (["caption", EXAMPLE], "a red apple"),
        (["caption", EXAMPLE, "-m", "ollama:mine"], "a red apple"),
    ):
        assert run(command) == 0, command
        said = capsys.readouterr()
        assert words in said.out
        assert said.err.count("\n") <= 1 and "Error" not in said.err
        if command[0] in ("models", "verify"):
            assert said.err.startswith("Warning: models.lock: is not a lock file")
    assert run(["pull", "llama3.2-vision-11b"]) == 1
    assert capsys.readouterr().err.startswith("Error: models.lock: is not a lock file")


def test_a_model_larger_than_memory(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("mllama_gguf.inspect.inventory.available_memory", lambda: 1)
    assert run(["models"]) == 0
    assert "more than the available memory" in capsys.readouterr().out


def layout_of(*paths: Path) -> str | None:
    """As `mllama models` shows it."""
    files = ModelFiles("x", paths[0], paths[1] if len(paths) > 1 else None)
    return look("x", "bundled", files).layout


def test_the_layout_of_our_files(tiny_files: Callable[[str], TinyFiles]) -> None:
    tiny = tiny_files("gqa")
    assert layout_of(tiny.one) == "canonical"
    assert layout_of(tiny.text, tiny.mmproj) == "canonical"
    assert layout_of(tiny.text) == "text only"


def test_the_layouts_of_others(tmp_path: Path) -> None:
    arch = tiny.ARCHS["gqa"]
    assert layout_of(*layouts.write(arch, tmp_path, "A")) == "A"
    assert layout_of(*layouts.write(arch, tmp_path, "B")) == "B"
    nameless = layouts.write(arch, tmp_path, "canonical", without=(layouts.CONVERTER_KEY,))
    assert layout_of(*nameless) == "unknown"


def test_hub_names_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MllamaError, match=r"pip install 'mllama_gguf\[hub\]'"):
        resolve("hf:me/repo/m.gguf")
    assert str(HubRef.parse("hf:a/b@c/d/e.gguf")) == "hf:a/b@c/d/e.gguf"
