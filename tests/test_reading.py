"""Pipes, sockets, folders and devices where a file is expected: one line, and nobody waits."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import tiny
from helpers import TinyFiles

from mllama_gguf import ImageError, Mllama, MllamaError
from mllama_gguf.cache.disk import SIZE_VARIABLE
from mllama_gguf.cli.main import run
from mllama_gguf.reading import open_regular, read_regular, read_text
from mllama_gguf.tune import saved

Captured = pytest.CaptureFixture[str]
Files = Callable[[str], TinyFiles]
APPLE = str(Path(__file__).parents[1] / "examples" / "apple.png")
KINDS = {"pipe": "a pipe", "socket": "a socket", "folder": "a folder", "zero": "a device", "stdin": "a"}
SECONDS = 20


class Late(BaseException):
    """Not an OSError, as TimeoutError is: nothing may take it for a file that cannot be read."""


@contextmanager
def within(seconds: int = SECONDS) -> Iterator[None]:
    """Fails if what is inside takes longer. Also ends a system call that waits."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise Late(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make(kind: str, path: Path) -> Path:
    """Something of that kind that is not a file, under this name or, for a device, another one."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
        os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zero":
        return Path("/dev/zero")
    elif kind == "linked pipe":
        if not path.with_name("pipe").exists():
            os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")  # the next one uses it too
    else:
        assert kind == "stdin"
        return Path("/dev/stdin")
    return path


@pytest.fixture
def piped_stdin() -> Iterator[None]:
    """Standard input is a pipe into which nobody writes."""
    reading, writing = os.pipe()
    before = os.dup(0)
    os.dup2(reading, 0)
    yield
    os.dup2(before, 0)
    for fd in (reading, writing, before):
        os.close(fd)


pytestmark = pytest.mark.usefixtures("piped_stdin")


@pytest.mark.parametrize("kind", [*KINDS, "linked pipe"])
def test_only_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "thing")
    for read in (open_regular, read_regular, read_text):
        with within(), pytest.raises(OSError, match=r"it is a \w+, not a file") as caught:
            read(path)
        assert str(KINDS.get(kind, "a pipe")) in (caught.value.strerror or "")
        assert caught.value.filename == str(path)
    if kind == "folder":
        with pytest.raises(IsADirectoryError):
            open_regular(path)


def test_files_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("ä\n", "utf-8")
    (tmp_path / "link").symlink_to(path)
    for name in (path, str(path), tmp_path / "link"):
        assert read_text(name) == "ä\n"
    with open_regular(path) as file:
        assert (file.read(1), os.get_inheritable(file.fileno())) == (b"\xc3", False)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")
    with pytest.raises(ValueError, match="null"):
        read_regular("a\0b")


def test_no_handle_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        with pytest.raises(OSError):
            open_regular(tmp_path / "pipe")
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


# ---- every place where a file is named ---------------------------------------------------------------------


def commands(thing: str) -> dict[str, list[str]]:
    """Command lines that want to read this."""
    return {
        "image": ["caption", thing],
        "model": ["caption", APPLE, "-m", thing],
        "mmproj": ["caption", APPLE, "--mmproj", thing],
        "verified model": ["caption", APPLE, "-m", thing, "--verify"],
        "prompt": ["caption", APPLE, "--prompt-file", thing],
        "list": ["caption", thing.replace(".gguf", ".txt"), "--out", "out.jsonl"],
        "image of a batch": ["caption", thing.replace(".gguf", ".png"), APPLE, "--out", "out.jsonl"],
        "schema": ["caption", APPLE, "--out", "out.jsonl", "--json-schema", thing],
        "verify": ["verify", thing],
        "lock": ["lock", "demo", "--file", thing],
        "info": ["info", thing],
        "info mmproj": ["info", "demo", thing],
        "plan": ["plan", thing],
        "trace": ["trace", APPLE, "-m", thing],
        "traced image": ["trace", thing],
        "tune": ["tune", thing],
        "tuned model": ["tune", APPLE, "-m", thing],
        "preprocess": ["preprocess", thing],
        "quantize": ["quantize", thing, "out.gguf", "--type", "q8_0"],
        "convert": ["convert", thing, "-o", "out.gguf"],
    }


# An image may be what a pipe brings, as in `caption /dev/stdin`: that waits for whoever writes.
PLACES = [(place, kind) for place in commands("") for kind in KINDS if (place, kind) != ("image", "stdin")]


@pytest.mark.parametrize(("place", "kind"), PLACES)
def test_commands(
    place: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    line = commands(str(tmp_path / "thing.gguf"))[place]
    name = next(Path(word) for word in line if "thing." in word)
    thing = make(kind, name)
    with within():
        code = run([str(thing) if word == str(name) else word for word in line])
    err = capsys.readouterr().err
    if (place, kind) == ("image of a batch", "folder"):
        assert code == 0 and os.path.exists("out.jsonl")  # a folder without images beside an image
        return
    assert code in (1, 2, 3) and "unexpected" not in err and "Traceback" not in err
    if place == "image of a batch" or (place == "list" and thing != name):  # a device is taken for an image
        assert code == 3 and (tmp_path / "errors.jsonl").read_text().count("\n") == 1
        return
    assert err.count("\n") == 1, err
    assert sorted(os.listdir()) == ([name.name] if thing == name else [])


def test_the_python_interface(tiny_files: Files, tmp_path: Path) -> None:
    files = tiny_files("square")
    for kind in KINDS:
        thing = make(kind, tmp_path / kind)
        for open_it in (lambda thing=thing: Mllama(thing), lambda thing=thing: Mllama(files.text, thing)):
            with within(), pytest.raises(MllamaError, match="not a file"):
                open_it()
        with Mllama(files.one, n_ctx=64) as model, within(), pytest.raises(ImageError):
            model.caption(thing)


def test_a_part_of_a_split_model(tiny_files: Files, tmp_path: Path) -> None:
    from layouts import write

    (first,) = write(tiny_files("square").arch, tmp_path, "B", split=50)
    second = next(path for path in sorted(tmp_path.glob("*.gguf")) if "-00002-" in path.name)
    second.unlink()
    os.mkfifo(second)
    with within(), pytest.raises(MllamaError, match="not a file"):
        Mllama(first)


# ---- files of our own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "folder", "linked pipe", "socket"])
def test_cache_entries(kind: str, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the cache becomes something else; the captions stay the same."""
    monkeypatch.delenv(SIZE_VARIABLE)
    path = tiny_files("square").one
    with Mllama(path, n_ctx=256) as model:
        expected = model.caption(APPLE, max_tokens=4)
    settings = {"n_ctx": 256, "image_cache": tmp_path / "cache"}
    for _ in range(2):
        with Mllama(path, **settings) as model:
            assert model.caption(APPLE, max_tokens=4) == expected
    entries = [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()]
    assert len(entries) >= 2
    for entry in entries:
        entry.unlink()
        make(kind, entry)
    with within(60), Mllama(path, **settings) as model:
        assert model.caption(APPLE, max_tokens=4) == expected


def test_tuned_settings(tmp_path: Path) -> None:
    path = saved.config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with within():
        assert saved.read_tuned(lambda: "key") == {}


def test_a_checkpoint_of_pipes(tiny_files: Files, tmp_path: Path, capsys: Captured) -> None:
    """Each of its files in turn."""
    checkpoint = tiny.make_checkpoint(tiny_files("square").arch, tmp_path / "hf")
    for name in sorted(file.name for file in checkpoint.iterdir()):
        copy = tmp_path / "copy"
        shutil.copytree(checkpoint, copy)
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with within():
            code = run(["convert", str(copy), "-o", str(tmp_path / "out.gguf")])
        err = capsys.readouterr().err
        assert code in (0, 1) and (code == 0 or (err.count("\n") == 1 and "not a file" in err)), (name, err)
        shutil.rmtree(copy)


def test_a_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "models.lock")
    with within():
        run(["models"])
        run(["caption", APPLE])
    capsys.readouterr()
