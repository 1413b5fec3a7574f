"""Thousands of images: what is listed, what is kept, and what survives real signals and real limits."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import STOP_SECONDS, elsewhere, noisy_image
from PIL import Image

from mllama_gguf import BackendError, Mllama, RequestError
from mllama_gguf.batch.ahead import prefetch
from mllama_gguf.batch.captions import CaptionOptions
from mllama_gguf.batch.failures import ErrorLog
from mllama_gguf.batch.outputs import RecordFile
from mllama_gguf.batch.records import Record
from mllama_gguf.batch.run import MAX_LOSSES, caption_images
from mllama_gguf.batch.settings import SettingsFile
from mllama_gguf.batch.sidecars import Sidecars
from mllama_gguf.batch.sources import home_of, list_images
from mllama_gguf.cli.main import run

Captured = pytest.CaptureFixture[str]


def save(path: Path, seed: int, height: int = 40, width: int = 40) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy_image(seed, height, width)).save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 images, of which 7.png is 2.png again."""
    folder = tmp_path / "photos"
    for i in range(1, 13):
        save(folder / f"{i}.png", 2 if i == 7 else i)
    return folder


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "mllama_gguf", "caption", *map(str, args)]


def start(*args: object, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*args), **elsewhere(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_text(), newline=""), strict=True))
    return lines(path.read_text())


# ---- which images ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b/10.png",
        "b/2.png",
        "b/1.JPG",
        "b/notes.md",
        "b/.hidden.png",
        "b/.git/x.png",
        "b/c/3.webp",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders_are_listed_in_natural_order(tree: Path) -> None:
    assert list_images(["b"]) == ["b/1.JPG", "b/2.png", "b/10.png"]
    assert list_images(["b"], recursive=True) == ["b/1.JPG", "b/2.png", "b/10.png", "b/c/3.webp"]
    assert list_images(["b/10.png", "b/2.png", "b"]) == ["b/1.JPG", "b/2.png", "b/10.png"]


def test_patterns(tree: Path) -> None:
    assert list_images(["b/*"]) == ["b/1.JPG", "b/2.png", "b/10.png"]
    assert list_images(["**/*.webp"]) == ["b/c/3.webp"]
    (tree / "b" / "[1].png").touch()  # a name, not a pattern
    assert list_images(["b/[1].png"]) == ["b/[1].png"]
    with pytest.raises(RequestError, match=r"x\*.png: no image fits"):
        list_images(["x*.png"])


def test_lists_keep_their_order(tree: Path) -> None:
    (tree / "list.txt").write_bytes(b"b/10.png\r\n\nmissing.png\nb/2.png\n")
    assert list_images(["list.txt", "b/1.JPG"]) == ["b/1.JPG", "b/10.png", "missing.png", "b/2.png"]
    assert list_images(["-"], stdin=b"b/2.png\0a\nb.png\0\xff.png\0") == [
        "b/2.png",
        "a\nb.png",
        "\udcff.png",
    ]
    # blanks around a name are parts of it only where there is such a file
    assert list_images(["-"], stdin=b" b/2.png\nb/10.png \n none.png\n") == [
        "b/2.png",
        "b/10.png",
        " none.png",
    ]
    (tree / " b").mkdir()
    (tree / " b" / "2.png").touch()
    assert list_images(["-"], stdin=b" b/2.png\n") == [" b/2.png"]
    with pytest.raises(RequestError, match=r"none\.txt: this list of images cannot be read"):
        list_images(["none.txt"])


def test_what_is_no_image_is_left_out(tree: Path) -> None:
    for name in ("b/2.txt", "b/errors.jsonl"):
        (tree / name).touch()
    named = ["b/2.png", "b/2.txt", "b/errors.jsonl"]
    assert list_images(named, sidecar=".txt", exclude=["./b/errors.jsonl"]) == ["b/2.png"]
    for address in ("data:image/png;base64," + "A" * 9000, "file:///b/2.png", "HTTPS://example.org/a.png"):
        with pytest.raises(RequestError, match=r"^.{1,60}: with --out or --sidecar an image is a file$"):
            list_images(["-"], stdin=address.encode())
        with pytest.raises(RequestError, match=r"^.{1,60}: with --out or --sidecar an image is a file$"):
            list_images([address, "b/2.png"])
    with pytest.raises(RequestError, match=r"^standard input: no images there$"):
        list_images(["-"])
    with pytest.raises(RequestError, match=r"b/\.git: no images there; --recursive"):
        (tree / "b" / ".git" / "x.png").unlink()
        list_images(["b/.git"])


def test_home_of(tree: Path) -> None:
    found = [home_of(source) for source in ("b", "b/2.png", "b/**/*.png", "*.png", "-", "list.txt")]
    assert found == ["b", "b", "b", ".", ".", "."]


# ---- files -------------------------------------------------------------------------------------------------

RECORDS = [
    Record("a.png", 'says "no",\nthen\r\nnothing', "stop", 3, "00"),
    Record("b, c.png", "ünïcode", "length", 4, "01"),
    Record("\udcff.png", "", "stop", 0, "00", "a.png"),
]


@pytest.mark.parametrize("name", ["c.jsonl", "c.csv"])
def test_a_file_cut_anywhere_goes_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    file = RecordFile(path)
    for record in RECORDS:
        file.write(record)
    file.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        file = RecordFile(path)
        kept = list(file.records())
        assert kept == RECORDS[: len(kept)]
        for record in RECORDS[len(kept) :]:
            file.write(record)
        file.close()
        assert path.read_bytes() == whole
    assert len(kept) == len(RECORDS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c.jsonl", b'{\n  "model": "mine"\n}'),
        ("c.jsonl", b"not ours"),
        ("c.jsonl", b'{"image": "a.png", "text": "mine"}\n'),
        ("c.csv", b"name,price\napple,3\n"),
        ("c.csv", b"image,caption,finish_reason,tokens,sha256,duplicate_of\na.png,b,c\n"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(RequestError, match=rf"{name}: .*is not a file of captions"):
        RecordFile(path)
    assert path.read_bytes() == data


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "c.jsonl")
    with pytest.raises(RequestError, match="another run is writing it"):
        RecordFile(tmp_path / "c.jsonl")
    file.close()
    RecordFile(tmp_path / "c.jsonl").close()
    with pytest.raises(RequestError, match=r"c\.xml: captions go to a file called \.jsonl or \.csv"):
        RecordFile(tmp_path / "c.xml")
    with pytest.raises(RequestError, match="there is no folder"):
        RecordFile(tmp_path / "none" / "c.jsonl")


def test_images_that_would_share_a_caption_file() -> None:
    images = ["a/b.jpg", "a/c.jpg", "a/b.png"]
    refused = Sidecars(".txt", images).refused
    assert set(refused) == {"a/b.jpg", "a/b.png"}
    assert refused["a/b.jpg"].startswith("would share a/b.txt with a/b.png; use --sidecar-full-name")
    assert refused["a/b.png"].startswith("would share a/b.txt with a/b.jpg;")
    assert not Sidecars(".txt", images, full_name=True).refused
    with pytest.raises(RequestError, match=r"takes a suffix like \.txt, not 'txt'"):
        Sidecars("txt", ["a.png"])


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in (".mllama-0000000000000000.tmp", ".mllama-1.tmp", "mine.tmp"):
        (tmp_path / name).touch()
    list(Sidecars(".txt", [str(tmp_path / "a.png")]).records())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mllama-1.tmp", "mine.tmp"]


def test_the_error_log_keeps_the_last_failure_of_each(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path / "errors.jsonl")
    log.tidy(())
    for image, message in (("a", "1"), ("b", "2"), ("a", "3")):
        log.add({"image": image, "error": "ImageError", "message": message})
    with open(log.path, "a") as file:
        file.write('{"image": "c", "mess')  # killed
    log.add({"image": "d", "error": "ImageError", "message": "4"})
    log.tidy({"b"})
    assert [(entry["image"], entry["message"]) for entry in rows(log.path)] == [("a", "3"), ("d", "4")]
    log.tidy({"a", "d"})
    assert not log.path.exists()


# ---- decoding ahead ----------------------------------------------------------------------------------------


def test_prefetch_keeps_order_and_bounds() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(i: int) -> int:
        with lock:
            begun.append(i)
        time.sleep(0.002 * (i % 3))
        if i == 5:
            raise ValueError("five")
        return i * i

    taken = 0
    for i, future in prefetch(range(30), work, "test", threads=3, ahead=4):
        if i == 5:
            with pytest.raises(ValueError, match="five"):
                future.result()
        else:
            assert future.result() == i * i
        taken += 1
        with lock:
            assert max(begun) <= i + 4
    assert taken == 30
    assert sorted(begun) == list(range(30))


def test_prefetch_that_is_given_up_ends_its_threads() -> None:
    def threads() -> int:
        return sum(thread.name == "test" for thread in threading.enumerate())

    stream = prefetch(range(100), lambda i: i, "test", threads=3, ahead=4)
    next(stream)
    assert threads() >= 3
    stream.close()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


# ---- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.jsonl", "c.csv"])
def test_captions_in_one_file(photos: Path, name: str, capsys: Captured) -> None:
    out = photos / name
    args = ["caption", str(photos), "--out", str(out), "-n", "9"]
    assert run(args) == 0
    err = capsys.readouterr().err
    assert "12 images: 11 captioned, 1 duplicates" in err
    found = rows(out)
    assert [Path(row["image"]).name for row in found] == [f"{i}.png" for i in range(1, 13)]
    with Mllama.from_pretrained("demo") as model:
        assert [row["caption"] for row in found] == [
            model.caption(row["image"], max_tokens=9) for row in found
        ]
    assert found[6]["duplicate_of"] == str(photos / "2.png")
    assert found[6]["sha256"] == found[1]["sha256"]
    assert len({row["sha256"] for row in found}) == 11
    assert not (photos / "errors.jsonl").exists()

    before = out.read_bytes()
    assert run(args) == 0
    assert "12 images: 0 captioned, 12 done before" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_captions_beside_their_images(photos: Path, capsys: Captured) -> None:
    (photos / "3.txt").write_text("by hand\n")
    assert (
        run(["caption", str(photos), "--sidecar", ".txt", "-n", "9", "--prefix", "Look: ", "--suffix", "!"])
        == 0
    )
    with Mllama.from_pretrained("demo") as model:
        for i in (1, 2, 7):
            text = model.caption(photos / f"{i}.png", max_tokens=9)
            assert (photos / f"{i}.txt").read_text() == f"Look: {text}!\n"
    assert (photos / "3.txt").read_text() == "by hand\n"
    # What was captioned by an earlier run tells a duplicate too.
    (photos / "13.png").write_bytes((photos / "3.png").read_bytes())
    capsys.readouterr()
    args = ["--sidecar", ".txt", "-n", "9", "--prefix", "Look: ", "--suffix", "!"]
    assert run(["caption", str(photos), *args]) == 0
    assert "0 captioned, 1 duplicates, 12 done before" in capsys.readouterr().err
    assert (photos / "13.txt").read_text() == "by hand\n"


def test_limit_prompt_file_and_list(photos: Path, tmp_path: Path, capsys: Captured) -> None:
    prompt, listed = tmp_path / "prompt", tmp_path / "list.txt"
    prompt.write_text("What colour?\n")
    listed.write_text("".join(f"{photos}/{i}.png\n" for i in (5, 4, 3)))
    out = tmp_path / "c.jsonl"
    args = ["caption", str(listed), "--out", str(out), "--limit", "2", "-n", "5"]
    assert run([*args, "--prompt-file", str(prompt)]) == 0
    with Mllama.from_pretrained("demo") as model:
        expected = [model.caption(photos / f"{i}.png", "What colour?", max_tokens=5) for i in (5, 4)]
    assert [row["caption"] for row in rows(out)] == expected


def test_a_list_on_standard_input(photos: Path) -> None:
    out = photos / "c.jsonl"
    child = start("-", "--out", out, "-n", 4, stdin=subprocess.PIPE)
    _, err = child.communicate(f"{photos}/9.png\n{photos}/8.png\n", timeout=60)
    assert child.returncode == 0, err
    assert [Path(row["image"]).name for row in rows(out)] == ["9.png", "8.png"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--limit", "3"], "--limit needs --out or --sidecar"),
        (["--no-encode-ahead"], "--encode-ahead needs --out or --sidecar"),
        (["--out", "a.csv", "--sidecar", ".txt"], "exclude each other"),
        (["-p", "x", "--prompt-file", "y"], "exclude each other"),
    ],
)
def test_wrong_usage(photos: Path, args: list[str], words: str, capsys: Captured) -> None:
    assert run(["caption", str(photos / "1.png"), *args]) == 2
    assert words in capsys.readouterr().err


SCHEMA = {
    "type": "object",
    "properties": {"what": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
    "required": ["what", "sure"],
    "additionalProperties": False,
}


def test_json_of_a_schema(photos: Path, tmp_path: Path, capsys: Captured) -> None:
    path, out = tmp_path / "schema.json", tmp_path / "c.jsonl"
    path.write_text(json.dumps(SCHEMA))
    args = ["caption", str(photos), "--out", str(out), "--json-schema", str(path)]
    assert run([*args, "-n", "3"]) == 3  # too few tokens for any of them
    assert rows(out) == []
    assert {row["error"] for row in rows(tmp_path / "errors.jsonl")} == {"RequestError"}
    assert run([*args, "-n", "100"]) == 0
    assert not (tmp_path / "errors.jsonl").exists()
    for row in rows(out):
        value = json.loads(row["caption"])
        assert set(value) == {"what", "sure"}
        assert len(value["what"]) <= 12
        assert isinstance(value["sure"], bool)
    capsys.readouterr()
    for text, words in (
        ("{", "is not JSON"),
        ('{"type": "objekt"}', "'type' cannot be 'objekt'"),
        ('{"uniqueItems": true}', "'uniqueItems' cannot be obeyed"),
        ("[" * 100_000, "is not JSON"),
        ("3", "not an object"),
    ):
        path.write_text(text)
        assert run(args) == 1
        assert words in capsys.readouterr().err
    path.write_text(json.dumps(SCHEMA))
    assert run([*args, "--prefix", "x"]) == 1
    assert "prefix and suffix cannot be used with a JSON schema" in capsys.readouterr().err


def test_a_caption_that_is_cut() -> None:
    CaptionOptions().check("length")
    CaptionOptions(form={"type": "text"}).check("length")
    for options, words in (
        (CaptionOptions(schema=SCHEMA), "before its JSON was complete"),
        (CaptionOptions(form={"type": "regex", "regex": "[a-z]+"}), "before its form was complete"),
    ):
        options.check("stop")
        with pytest.raises(RequestError, match=words):
            options.check("length")
    with pytest.raises(RequestError, match="exclude each other"):
        CaptionOptions(schema=SCHEMA, form={"type": "text"})


def test_captions_of_an_expression_and_of_a_grammar(photos: Path, tmp_path: Path, capsys: Captured) -> None:
    out, grammar = tmp_path / "c.jsonl", tmp_path / "g.lark"
    grammar.write_text('start: "a " ("red" | "green") " thing"\n')
    for form in (["--regex", "(red|green) thing"], ["--grammar", str(grammar)]):
        assert run(["caption", str(photos), "--out", str(out), "--limit", "2", "--suffix", "!", *form]) == 0
        for row in rows(out):
            assert row["caption"].removeprefix("a ") in ("red thing!", "green thing!")
        out.unlink()
    capsys.readouterr()
    grammar.write_text("start: other\n")
    assert run(["caption", str(photos), "--out", str(out), "--grammar", str(grammar)]) == 3
    assert "the grammar cannot be obeyed" in capsys.readouterr().err
    for wrong, words in (
        (["--regex", "("], "not valid"),
        (["--grammar", str(tmp_path / "none.gbnf")], "none.gbnf"),
        (["--regex", "a", "--grammar", str(grammar)], "exclude each other"),
    ):
        assert run(["caption", str(photos), "--out", str(out), *wrong]) in (1, 2)
        assert words in capsys.readouterr().err


def test_events(photos: Path, capsys: Captured) -> None:
    (photos / "5.png").write_bytes(b"no image")
    assert run(["caption", str(photos), "--out", str(photos / "c.jsonl"), "-n", "5", "--json"]) == 3
    first, *middle, last = lines(capsys.readouterr().err)
    assert first == {"event": "start", "pictures": 12, "done_before": 0, "again": 0}
    assert Counter(event["event"] for event in middle) == {"caption": 11, "error": 1}
    assert (last["event"], last["captioned"], last["duplicates"], last["failed"]) == ("summary", 10, 1, 1)
    assert last["tokens"] == sum(event["tokens"] for event in middle if "seconds" in event)
    assert last["cached_tokens"] > 0  # the text before the image, from the second one on
    assert 0 < last["utilisation"] <= 1


def test_a_bar_on_a_terminal(photos: Path) -> None:
    (photos / "5.png").write_bytes(b"no image")
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command(photos, "--out", photos / "c.jsonl"), **elsewhere(TERM="xterm", COLUMNS="120"), stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # the terminal is gone
        pass
    os.close(ours)
    assert child.wait(timeout=30) == 3
    for words in (b"12/12", b" a minute", b"1 failed", b"not an image", b"12 images: 10 captioned"):
        assert words in shown


# ---- what goes wrong with one image ----------------------------------------------------------------------


def test_unreadable_images_are_noted_and_tried_again(photos: Path, capsys: Captured) -> None:
    good = (photos / "4.png").read_bytes()
    (photos / "4.png").write_bytes(good[: len(good) // 2])
    (photos / "6.png").write_bytes(b"")
    os.mkfifo(photos / "0.png")
    named = [str(photos / f"{i}.png") for i in range(14)]  # 13.png does not exist
    args = ["caption", *named, "--out", str(photos / "c.csv"), "-n", "5"]
    for _ in range(2):
        assert run(args) == 3
        assert capsys.readouterr().err.count("Error: ") == 4
        errors = rows(photos / "errors.jsonl")
        assert [Path(row["image"]).name for row in errors] == ["0.png", "4.png", "6.png", "13.png"]
        assert {row["error"] for row in errors} == {"ImageError"}
        assert len(rows(photos / "c.csv")) == 10
    (photos / "0.png").unlink()
    for i in (0, 4, 6, 13):
        (photos / f"{i}.png").write_bytes(good)
    assert run(args) == 0
    assert not (photos / "errors.jsonl").exists()
    assert len(rows(photos / "c.csv")) == 14


def test_a_context_that_is_too_small(photos: Path, capsys: Captured) -> None:
    args = ["caption", str(photos), "--out", str(photos / "c.jsonl")]
    assert run([*args, "-c", "4"]) == 3
    assert {row["error"] for row in rows(photos / "errors.jsonl")} == {"ContextFullError"}
    assert "raise n_ctx" in capsys.readouterr().err
    assert run(args) == 0


class Failing:
    """The demo model on a device that is lost at the given calls, counted over all that were opened."""

    def __init__(self, losses: set[int], openings: int) -> None:
        self.calls = 0
        self.opened = 0
        self._losses = losses
        self._openings = openings

    def open(self) -> Any:
        self.opened += 1
        if self.opened > self._openings:
            raise BackendError("no device")
        outer, model = self, Mllama.from_pretrained("demo")
        real = model.reply

        def lost_at_times(*args: Any, **kwargs: Any) -> Any:
            outer.calls += 1
            if outer.calls in outer._losses:
                raise BackendError("device lost")
            return real(*args, **kwargs)

        model.reply = lost_at_times  # type: ignore[method-assign]
        return model


@pytest.mark.parametrize(
    ("losses", "openings", "captioned", "failed", "stopped"),
    [
        ({3, 7}, 9, 9, 2, ""),
        ({3, 4}, 2, 2, 2, "cannot be opened again: no device"),
        ({3, 4, 5}, 9, 2, MAX_LOSSES, "failed 3 times in a row"),
    ],
)
def test_a_lost_device(
    photos: Path, losses: set[int], openings: int, captioned: int, failed: int, stopped: str
) -> None:
    failing = Failing(losses, openings)
    out, log = photos / "c.jsonl", ErrorLog(photos / "errors.jsonl")
    images, options = list_images([str(photos)]), CaptionOptions(max_tokens=4)
    output = RecordFile(out)
    summary = caption_images(images, output, failing.open, options, errors=log)
    output.close()
    assert (summary.captioned, summary.failed) == (captioned, failed)
    assert stopped in summary.stopped
    assert bool(summary.stopped) == bool(stopped)
    assert [row["error"] for row in rows(log.path)] == ["BackendError"] * failed
    output = RecordFile(out)
    again = caption_images(images, output, Failing(set(), 1).open, options, errors=log)
    output.close()
    assert again.failed == 0
    assert sorted(row["image"] for row in rows(out)) == sorted(images)
    assert not log.path.exists()


# ---- a full disk -------------------------------------------------------------------------------------------


def limited(n_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("name", ["c.jsonl", "c.csv"])
def test_a_full_disk_stops_without_a_torn_line(photos: Path, name: str, capsys: Captured) -> None:
    out = photos / name
    whole = photos.parent / name
    assert run(["caption", str(photos), "--out", str(whole), "-n", "5"]) == 0
    for size in (whole.stat().st_size // 2, 600):
        child = start(photos, "--out", out, "-n", 5, preexec_fn=limited(size))
        _, err = child.communicate(timeout=60)
        assert child.returncode == 3
        assert f"Error: stopped: cannot write {out}: File too large; run the same command again" in err
        assert "failed" not in err  # no image is at fault
        assert out.stat().st_size <= max(size, whole.stat().st_size // 2)
        assert whole.read_bytes().startswith(out.read_bytes())
        rows(out)
        assert not (photos / "errors.jsonl").exists()
    assert run(["caption", str(photos), "--out", str(out), "-n", "5"]) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_full_disk_and_captions_beside_their_images(photos: Path) -> None:
    child = start(photos, "--sidecar", ".txt", "-n", 5, preexec_fn=limited(2))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 3
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert line.startswith(f"Error: stopped: cannot write {photos}/")
    assert not [path for path in photos.iterdir() if path.suffix in (".txt", ".tmp", ".jsonl")]


def full(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """A call of the system that finds the disk full after so many times."""
    left = [after]

    def limited(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*args, **more)

    return limited


@pytest.mark.parametrize(
    ("after", "how"),
    [
        (0, ["--out", "c.jsonl"]), (2, ["--out", "c.jsonl", "--overwrite"]),
        (0, ["--out", "c.csv"]), (1, ["--out", "c.csv", "--existing", "append"]),
        (0, ["--sidecar", ".txt"]), (3, ["--sidecar", ".xmp", "--overwrite"]),
    ],
)  # fmt: skip
def test_no_space_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, how: list[str], after: int
) -> None:
    """One line that names the file and the way out; what was written stays, and nothing empty."""
    for i in range(3):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "1.png").write_bytes(b"broken")  # that cannot be noted either
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full(os.fsync, after))
        assert run(["caption", ".", *how, "-n", "2"]) in (1, 3)
    said = capsys.readouterr().err
    words = r"Error: (stopped: )?cannot write \S+: the disk is full; make room, or write to another disk"
    assert len(re.findall(words, said)) == 1, said
    assert [path.name for path in tmp_path.iterdir() if not path.stat().st_size] == []
    assert not list(tmp_path.glob("*.tmp"))
    with monkeypatch.context() as patched:
        patched.setattr(SettingsFile, "write", full(SettingsFile.write, 0))
        assert run(["caption", ".", "--out", "other.jsonl", "-n", "2"]) == 1
    assert ".other.jsonl.mllama.json: the disk is full" in capsys.readouterr().err
    assert not Path("other.jsonl").exists()
    assert run(["caption", ".", *how, "-n", "2"]) == 3  # continues
    assert [row["image"] for row in rows(tmp_path / "errors.jsonl")] == ["./1.png"]


def test_a_folder_that_cannot_be_written(photos: Path, tmp_path: Path) -> None:
    """An image whose caption file is a folder fails alone."""
    (photos / "4.txt").mkdir()
    child = start(photos, "--sidecar", ".txt", "-n", 5)
    child.communicate(timeout=60)
    assert child.returncode == 3
    assert [Path(row["image"]).name for row in rows(photos / "errors.jsonl")] == ["4.png"]
    assert len([path for path in photos.glob("*.txt") if path.is_file()]) == 11


# ---- signals -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images; a tenth are duplicates, three are broken."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(40):
        save(folder / f"{i}.png", i - 5 if i % 10 == 9 else i)
    for i in (13, 22, 36):
        (folder / f"{i}.png").write_bytes(b"broken")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder; those that keep settings have the time of the run in them."""
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".json"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("how", ["c.jsonl", "c.csv", "sidecar", "overwrite c.jsonl", "overwrite sidecar"])
def test_killed_at_any_moment(many: Path, tmp_path: Path, how: str) -> None:
    """Killed a few times, then left alone: every file is as if nothing had happened."""

    def begin(folder: Path) -> list[object]:
        folder.mkdir()
        for path in many.iterdir():
            os.link(path, folder / path.name)
        target = (
            ["--sidecar", ".txt"] if "sidecar" in how else ["--out", "c.jsonl" if "jsonl" in how else "c.csv"]
        )
        args: list[object] = [".", *target, "-n", 6, "--json"]
        if "overwrite" in how:
            before = start(*args, "-p", "Something else", cwd=folder)
            before.communicate(timeout=60)
            assert before.returncode == 3
            args.append("--overwrite")
        return args

    def start(*args: object, cwd: Path) -> subprocess.Popen[str]:
        more = {**elsewhere(), "cwd": cwd}
        return subprocess.Popen(command(*args), **more, stderr=subprocess.PIPE, text=True)

    calm = tmp_path / "calm"
    child = start(*begin(calm), cwd=calm)
    child.communicate(timeout=60)
    assert child.returncode == 3

    rough = tmp_path / "rough"
    args = begin(rough)
    old = contents(rough)
    done: Counter[str] = Counter()
    chance = random.Random(how)
    kills = 0
    while True:
        child = start(*args, cwd=rough)
        assert child.stderr is not None
        wanted = chance.randint(1, 9)  # captions before the kill
        seen = 0
        for line in child.stderr:
            event = json.loads(line)
            if event["event"] == "caption":
                done[event["image"]] += 1
                seen += 1
            if seen == wanted and kills < 4:
                time.sleep(chance.random() * 0.05)
                child.kill()
                break
        for line in child.stderr:  # what was said before the kill arrived
            if line.endswith("\n") and json.loads(line)["event"] == "caption":
                done[json.loads(line)["image"]] += 1
        child.stderr.close()
        if child.wait(timeout=30) != -signal.SIGKILL:
            break
        kills += 1
        for name in ("c.jsonl", "c.csv"):
            if (rough / name).exists():
                rows(rough / name)  # valid at any time
                if "overwrite" in how:
                    assert (rough / name).read_bytes() == old[name]
        for path in rough.glob("*.txt"):
            assert path.read_bytes() in (old.get(path.name), (calm / path.name).read_bytes())
    assert child.returncode == 3
    assert kills >= 3
    assert contents(rough) == contents(calm)
    assert set(done.values()) == {1}  # nothing twice
    assert len(done) >= 37 - kills  # a kill may come between a caption and the word of it


def interrupted(child: subprocess.Popen[str]) -> str:
    child.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, err = child.communicate(timeout=30)
    assert time.monotonic() - begin < STOP_SECONDS
    assert child.returncode == 130, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("ahead", ["--encode-ahead", "--no-encode-ahead"])
def test_ctrl_c(many: Path, tmp_path: Path, ahead: str, capsys: Captured) -> None:
    out = tmp_path / "c.jsonl"
    child = start(many, "--out", out, "--json", "-n", 6, ahead)
    assert child.stderr is not None
    for _ in range(8):
        child.stderr.readline()
    err = interrupted(child)
    last = lines(err)[-1]
    assert last["event"] == "summary"
    assert last["interrupted"] is True
    assert len(rows(out)) == last["captioned"] + last["duplicates"] > 0
    assert run(["caption", str(many), "--out", str(out), "-n", "6"]) == 3
    assert len(rows(out)) == 37


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image that takes seconds to decode."""
    path = tmp_path_factory.mktemp("huge") / "huge.png"
    Image.fromarray(np.zeros((13000, 13000, 4), np.uint8)).save(path, compress_level=1)
    yield str(path)
    os.unlink(path)


def test_ctrl_c_while_an_image_is_decoded(huge: str, tmp_path: Path) -> None:
    child = start(huge, "--out", tmp_path / "c.jsonl", "--json")
    assert child.stderr is not None
    assert "start" in child.stderr.readline()
    time.sleep(0.7)
    assert child.poll() is None
    interrupted(child)
    assert (tmp_path / "c.jsonl").read_bytes() == b""
