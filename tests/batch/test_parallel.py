"""Images that are captioned together: the same captions in the same order, whatever happens to one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import elsewhere, noisy_image
from PIL import Image

from mllama_gguf import BackendError, Mllama
from mllama_gguf.batch import together
from mllama_gguf.batch.captions import CaptionOptions, caption_image
from mllama_gguf.batch.failures import ErrorLog
from mllama_gguf.batch.outputs import RecordFile
from mllama_gguf.batch.run import MAX_LOSSES, caption_images
from mllama_gguf.batch.sources import list_images
from mllama_gguf.batch.summary import Busy, Summary
from mllama_gguf.cli.main import run

BAD = 5  # the image that cannot be read


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images, of which 7 and 8 are 6 again, 16 is 1, and 5 is none."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(1, 17):
        seed = {7: 6, 8: 6, 16: 1}.get(i, i)
        Image.fromarray(noisy_image(seed, 40, 40 + 300 * (seed % 3 == 0))).save(folder / f"{i}.png")
    (folder / f"{BAD}.png").write_bytes(b"no image")
    return folder


def opened() -> Mllama:
    return Mllama.from_pretrained("demo", image_cache=False)


def captioned(
    photos: Path, out: Path, open_model: Any = opened, **more: Any
) -> tuple[Summary, list[dict[str, Any]], list[str]]:
    """Summary, rows, and the images in the order of the reports."""
    events: list[str] = []
    output = RecordFile(out)
    options = more.pop("options", CaptionOptions(max_tokens=12, seed=1))
    summary = caption_images(
        list_images([str(photos)]),
        output,
        open_model,
        options,
        errors=ErrorLog(out.with_name("errors.jsonl")),
        report=lambda event: events.append(event.get("image", "")),
        **more,
    )
    output.close()
    return summary, [json.loads(line) for line in out.read_text().splitlines()], events


@pytest.fixture(scope="module")
def alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return captioned(photos, tmp_path_factory.mktemp("alone") / "c.jsonl")[1]


@pytest.mark.parametrize(("n", "encode_ahead"), [(2, False), (4, None), (16, True)])
def test_the_same_file(
    photos: Path, alone: list[dict[str, Any]], tmp_path: Path, n: int, encode_ahead: bool | None
) -> None:
    summary, found, events = captioned(photos, tmp_path / "c.jsonl", parallel=n, encode_ahead=encode_ahead)
    assert found == alone
    assert (summary.captioned, summary.duplicates, summary.failed) == (12, 3, 1)
    assert [one for one in events if one and not one.endswith(f"/{BAD}.png")] == [
        row["image"] for row in found
    ]
    seconds = summary.seconds
    assert 0 < seconds["busy"] <= seconds["total"] + 0.01 and seconds["wait"] <= seconds["total"]


def test_captions_of_several_are_computed_in_common_steps(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more at the same time than were asked for."""
    running, most, lock = 0, 0, threading.Lock()

    def spy(*args: Any, **more: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return caption_image(*args, **more)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(together, "caption_image", spy)
    captioned(photos, tmp_path / "c.jsonl", parallel=3, encode_ahead=False)
    assert most == 3


class Guilty:
    """Opens the demo model, whose device is lost with some images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, captions: set[str]) -> None:
        self.opened = 0
        self._lost: set[int] = set()
        reply = Mllama.reply

        def lost_with_some(conversation: Any, messages: Any, **more: Any) -> Any:
            key = messages[0]["content"][0]["image"].sha256
            if self.opened in self._lost or key in captions:
                self._lost.add(self.opened)  # for all
                raise BackendError("device lost")
            return reply(conversation, messages, **more)

        monkeypatch.setattr("mllama_gguf.decode.answers.Answers.reply", lost_with_some)

    def open(self) -> Mllama:
        self.opened += 1
        return opened()


def pixels(photos: Path, *numbers: int) -> set[str]:
    options = CaptionOptions()
    with opened() as model:
        return {
            options.prepare(str(photos / f"{i}.png"), model.hparams, model.max_tiles).sha256 for i in numbers
        }


def test_only_the_image_that_loses_the_device_fails(
    photos: Path, alone: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guilty = Guilty(monkeypatch, pixels(photos, 3, 12))
    summary, found, _ = captioned(photos, tmp_path / "c.jsonl", guilty.open, parallel=4, encode_ahead=False)
    assert (summary.failed, summary.stopped) == (3, "")
    assert found == [row for row in alone if not row["image"].endswith(("/3.png", "/12.png"))]
    monkeypatch.undo()
    summary, found, _ = captioned(photos, tmp_path / "c.jsonl", parallel=4)
    assert summary.failed == 1 and sorted(map(str, found)) == sorted(map(str, alone))


def test_a_device_that_always_fails_stops_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guilty = Guilty(monkeypatch, pixels(photos, *(i for i in range(1, 17) if i != BAD)))
    summary, found, _ = captioned(photos, tmp_path / "c.jsonl", guilty.open, parallel=4, encode_ahead=False)
    assert "failed 3 times in a row" in summary.stopped and found == []
    assert guilty.opened <= MAX_LOSSES + 2
    assert not any(thread.name.startswith("mllama-caption") for thread in threading.enumerate())


def test_a_time_limit_is_per_image(photos: Path, tmp_path: Path) -> None:
    # No reply is written before the limit is noticed.
    schema = {"type": "array", "items": {"enum": ["apple"]}, "minItems": 400}
    options = CaptionOptions(max_tokens=2000, schema=schema, time_limit=1e-4)
    summary, found, _ = captioned(photos, tmp_path / "c.jsonl", parallel=3, options=options)
    assert summary.failed == 16 and found == []
    kinds = {json.loads(line)["error"] for line in (tmp_path / "errors.jsonl").read_text().splitlines()}
    assert kinds == {"TimeLimitError", "ImageError"}


def test_a_context_that_is_too_small(photos: Path, tmp_path: Path) -> None:
    summary, _, _ = captioned(
        photos, tmp_path / "c.jsonl", lambda: Mllama.from_pretrained("demo", n_ctx=8), parallel=3
    )
    assert summary.failed == 16


def test_abort_ends_all(photos: Path, tmp_path: Path) -> None:
    end = threading.Event()

    def stops(event: dict[str, Any]) -> None:
        if event["event"] == "caption":
            end.set()

    output = RecordFile(tmp_path / "c.jsonl")
    summary = caption_images(
        list_images([str(photos)]),
        output,
        lambda: Mllama.from_pretrained("demo", image_cache=False, abort=end.is_set),
        CaptionOptions(max_tokens=60),
        errors=ErrorLog(tmp_path / "errors.jsonl"),
        report=stops,
        parallel=4,
    )
    output.close()
    assert summary.interrupted and 0 < summary.captioned < 12


def test_ctrl_c_and_the_same_command_again(
    photos: Path, alone: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.jsonl"
    args = ["caption", str(photos), "--out", str(out), "-n", "12", "--seed", "1", "--parallel", "3", "--json"]
    command = [sys.executable, "-m", "mllama_gguf", *args]
    with subprocess.Popen(command, **elsewhere(), stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for _ in range(3):
            child.stderr.readline()
        child.send_signal(signal.SIGINT)
        err = child.stderr.read()
        assert child.wait(30) in (130, 3), err  # 3: it was done already
    assert "Traceback" not in err
    kept = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert kept == [row["image"] for row in alone][: len(kept)]
    assert run(args) == 3
    assert [json.loads(line)["caption"] for line in out.read_text().splitlines()] == [
        row["caption"] for row in alone
    ]
    assert run(["caption", str(photos / "1.png"), "--parallel", "2"]) == 2
    assert "--parallel needs --out or --sidecar" in capsys.readouterr().err


def test_busy_counts_time_once() -> None:
    seconds = dict.fromkeys(("encode", "prompt", "decode", "busy", "wait"), 0.0)
    busy = Busy(seconds)
    for span in ((0.0, 4.0), (1.0, 3.0), (2.0, 6.0), (8.0, 9.0)):
        busy.captioned(span, {"decode": span[1] - span[0]})
    assert seconds["busy"] == 7.0 and seconds["decode"] == 11.0
    busy.encoded((5.0, 8.5))
    assert seconds["busy"] == 9.0  # 6 to 8 is new and seconds["encode"] == 3.5
