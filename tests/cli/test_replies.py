"""What is asked about images: the options of replies, limits of images, images from pipes."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import elsewhere

from mllama_gguf import ImageError, Mllama, RequestError, TimeLimitError
from mllama_gguf.batch.captions import CaptionOptions, caption_image
from mllama_gguf.cli.main import run
from mllama_gguf.decode.options import ReplyOptions
from mllama_gguf.store.defaults import Defaults
from mllama_gguf.vision.loading import load_image

Captured = pytest.CaptureFixture[str]
APPLE = Path(__file__).parents[2] / "examples" / "apple.png"


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[CaptionOptions]:
    """The options with which `mllama caption` asked."""
    seen: list[CaptionOptions] = []

    def begin(model: Any, image: Any, asked: CaptionOptions) -> None:
        seen.append(asked)
        raise RequestError("not asked")

    monkeypatch.setattr("mllama_gguf.batch.captions.begin_caption", begin)
    return seen


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        ("--top-k 5", "top_k", 5),
        ("--top-p 0.5", "top_p", 0.5),
        ("--min-p 0", "min_p", 0.0),
        ("--repeat-penalty 1.2", "repeat_penalty", 1.2),
        ("--presence-penalty -1", "presence_penalty", -1.0),
        ("--frequency-penalty 2", "frequency_penalty", 2.0),
        ("--seed 7", "seed", 7),
        ("--temp 0.5", "temperature", 0.5),
    ],
)
def test_sampling_options(args: str, name: str, value: Any, options: list[CaptionOptions]) -> None:
    assert run(["caption", str(APPLE), *args.split()]) == 1
    assert getattr(options[0].reply_options(Defaults()).sampling, name) == value
    assert getattr(options[0].reply_options(Defaults({name: 0.25})).sampling, name) == value


def test_all_together(options: list[CaptionOptions]) -> None:
    assert run(["caption", str(APPLE), "--stop", "red", "--stop", "\n", "-n", "3", "--time-limit", "9"]) == 1
    (asked,) = options
    found = asked.reply_options(Defaults({"max_tokens": 99, "stop": ("x",)}))
    assert (found.max_tokens, found.stops, asked.time_limit) == (3, ("red", "\n"), 9.0)
    assert asked.reply_options(Defaults()) == ReplyOptions.checked({"max_tokens": 3, "stop": ["red", "\n"]})


def test_stop(capsys: Captured) -> None:
    assert run(["caption", str(APPLE), "--stop", " apple"]) == 0
    assert capsys.readouterr().out == "a red\n"


def test_begin(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["caption", str(APPLE), "--begin", "a red"]) == 0
    assert capsys.readouterr().out == "a red apple\n"
    assert run(["caption", str(APPLE), "--begin", "a red", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["caption"] == "a red apple"
    assert run(["caption", str(APPLE), "--begin", "a red", "--prefix", "> ", "--out", "c.jsonl"]) == 0
    assert json.loads(Path("c.jsonl").read_text())["caption"] == "> a red apple"
    assert run(["caption", str(APPLE), "--begin", "a", "--regex", "[a-z]+"]) == 1
    assert "begin cannot be used with a schema, a grammar or a regex" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        "--top-k -1",
        "--top-p 2",
        "--min-p x",
        "--repeat-penalty 0",
        "--presence-penalty 3",
        "--time-limit 0",
        "--time-limit nan",
        "--max-pixels 0",
        "--max-pixels -5",
        "--max-pixels 5x",
        "--max-pixels 99999999999999999999",
        "--stop=",
    ],
)
def test_values_that_are_refused(args: str, capsys: Captured) -> None:
    assert run(["caption", str(APPLE), *args.split()]) in (1, 2)
    said = capsys.readouterr()
    assert said.err.startswith("Error: ") and said.err.count("\n") == 1 and said.out == ""
    assert args.split()[0].split("=")[0].lstrip("-").replace("-", "_") in said.err.replace("-", "_")


# ---- limits of images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["caption", "preprocess"])
def test_max_pixels(command: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run([command, str(APPLE), "--max-pixels", "100"]) == 1
    assert "pixels" in capsys.readouterr().err
    monkeypatch.setenv("MLLAMA_MAX_PIXELS", "100")
    assert run([command, str(APPLE)]) == 1
    assert run([command, str(APPLE), "--max-pixels", "1M"]) == 0
    monkeypatch.setenv("MLLAMA_MAX_PIXELS", "1M")
    assert run([command, str(APPLE)]) == 0
    monkeypatch.setenv("MLLAMA_MAX_PIXELS", "many")
    assert run([command, str(APPLE)]) == 1
    assert (
        "Error: MLLAMA_MAX_PIXELS: 'many' is not a number of pixels, as in 200000000 or 200M\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("words", ["many", "0", "-5", "1e6", "9" * 30])
def test_a_variable_that_is_no_number_stops_a_batch(
    words: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLLAMA_MAX_PIXELS", words)
    assert run(["caption", str(APPLE), "--out", "c.jsonl"]) == 1
    assert "Error: MLLAMA_MAX_PIXELS: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_limits_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.png").write_bytes(APPLE.read_bytes()[:-400])
    Path("whole.png").write_bytes(APPLE.read_bytes())
    assert run(["caption", "cut.png", "whole.png", "--out", "a.jsonl"]) == 3
    assert run(["caption", "cut.png", "whole.png", "--out", "a.jsonl", "--allow-truncated"]) == 0
    assert not Path("errors.jsonl").exists()
    assert run(["caption", "cut.png", "whole.png", "--out", "b.jsonl", "--max-pixels", "99"]) == 3
    assert Path("errors.jsonl").read_text().count("the limit is 99 pixels") == 2


@pytest.mark.parametrize("command", ["caption", "preprocess"])
def test_allow_truncated(command: str, tmp_path: Path, capsys: Captured) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(APPLE.read_bytes()[:-400])
    assert run([command, str(cut)]) == 1
    assert run([command, str(cut), "--allow-truncated"]) == 0


def test_limits_in_python(tmp_path: Path) -> None:
    with Mllama.from_pretrained("demo") as model:
        with pytest.raises(ImageError, match="pixels"):
            caption_image(model, APPLE, CaptionOptions(max_pixels=100))
        for wrong in (0, -1, "many", 1.5, True, 2**63):
            with pytest.raises(RequestError, match="max_pixels must be a whole number"):
                CaptionOptions(max_pixels=wrong)  # type: ignore[arg-type]
            with pytest.raises(RequestError, match="max_pixels must be a whole number"):
                load_image(APPLE, max_pixels=wrong)  # type: ignore[arg-type]
        assert caption_image(model, APPLE, CaptionOptions()).text == "a red apple"


# ---- the time limit ----------------------------------------------------------------------------------------


def test_a_time_limit(slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    command = ["caption", str(APPLE), str(APPLE), "-m", str(slow), "--no-cache", "--time-limit", "0.2"]
    assert run(command) == 1
    said = capsys.readouterr()
    assert said.err == f"Error: {APPLE}: took longer than 0.2 seconds (the time limit)\n" * 2
    assert run(["caption", str(APPLE), "-m", str(slow), "--time-limit", "0.2", "--out", "c.jsonl"]) == 3
    assert "took longer than 0.2 seconds" in Path("errors.jsonl").read_text()
    assert '"TimeLimitError"' in Path("errors.jsonl").read_text()
    assert time.monotonic() - start < 30
    assert not Path("c.jsonl").read_text()


def test_a_time_limit_that_is_kept() -> None:
    with Mllama.from_pretrained("demo") as model:
        options = CaptionOptions(time_limit=60)
        assert caption_image(model, APPLE, options).text == "a red apple"
        assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer) and t.is_alive()]
        with pytest.raises(TimeLimitError, match="took longer than 2 seconds"):
            caption_image(model, APPLE, CaptionOptions(time_limit=2), spent=2)
        assert caption_image(model, APPLE, CaptionOptions(time_limit=1e300)).text == "a red apple"
    with pytest.raises(RequestError, match="time_limit"):
        CaptionOptions(time_limit=-1)


# ---- images from pipes -------------------------------------------------------------------------------------


def piped(data: bytes, line: str = "$MLLAMA caption -", cwd: str = "/") -> tuple[int, bytes, bytes]:
    command = line.replace("$MLLAMA", f"'{sys.executable}' -m mllama_gguf")
    done = subprocess.run(
        ["bash", "-c", command], **{**elsewhere(), "cwd": cwd}, input=data, capture_output=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_an_image_on_standard_input(tmp_path: Path) -> None:
    data = APPLE.read_bytes()
    for line in ("$MLLAMA caption -", "$MLLAMA caption /dev/stdin", "$MLLAMA caption <(cat)"):
        assert piped(data, line) == (0, b"a red apple\n", b""), line
    assert piped(base64.b64encode(data))[:2] == (0, b"a red apple\n")
    os.mkfifo(tmp_path / "fifo")
    line = f"cat '{APPLE}' > fifo & $MLLAMA caption - < fifo"
    assert piped(b"", line, str(tmp_path)) == (0, b"a red apple\n", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", b"standard input: is empty; an image is expected"),
        (
            b"a.png\nb.png\n",
            b"standard input: an image is expected, this is text; a list of images needs --out",
        ),
        (b"/photos/\xe7\x8c\xab.jpg\n", b"an image is expected, this is text"),
        (b"\xef\xbb\xbfa.png\r\nb.png\r\n", b"an image is expected, this is text"),
        (b"<html></html>", b"standard input: an HTML page"),
        (b"%PDF-1.4 x/y", b"standard input: a PDF document"),
        (b"\x89PNG\r\n\x1a\nbroken", b"standard input: "),
    ],
)
def test_what_is_no_image_on_standard_input(
    data: bytes, words: bytes, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(["caption", "-"]) == 1
    said = capsys.readouterr()
    assert words.decode() in said.err and said.err.count("\n") == 1 and said.out == ""


def test_standard_input_holds_one_image(capsys: Captured) -> None:
    assert run(["caption", "-", "-"]) == 2
    assert "standard input (-) holds one image" in capsys.readouterr().err
