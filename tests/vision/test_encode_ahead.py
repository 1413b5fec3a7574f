"""Images encoded in another thread, while the one before is captioned: the same results, in every case."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import STOP_SECONDS, TinyFiles, elsewhere, noisy_image
from PIL import Image

from mllama_gguf import (
    Aborted,
    BackendError,
    BusyError,
    ImageEmbedding,
    ImageError,
    Mllama,
    MllamaError,
    OutOfMemoryError,
    RequestError,
    preprocess_image,
)
from mllama_gguf.backend.context import LocalContext
from mllama_gguf.batch.ahead import ENCODED_AHEAD
from mllama_gguf.batch.captions import CaptionOptions
from mllama_gguf.batch.failures import ErrorLog
from mllama_gguf.batch.outputs import RecordFile
from mllama_gguf.batch.run import Summary, caption_images
from mllama_gguf.cache.disk import DIRECTORY_VARIABLE, SIZE_VARIABLE
from mllama_gguf.cache.folder import NAME
from mllama_gguf.cli.main import run
from mllama_gguf.convert.huggingface import convert

Files = Callable[[str], TinyFiles]


@pytest.fixture
def model(tiny_files: Files) -> Iterator[Mllama]:
    with Mllama(tiny_files("gqa").one, n_ctx=512, n_threads=1) as opened:
        yield opened


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which images were encoded, in order."""
    names: list[str] = []
    real = LocalContext.encode

    def encode(self: LocalContext, *args: Any) -> Any:
        names.append(threading.current_thread().name)
        return real(self, *args)

    monkeypatch.setattr(LocalContext, "encode", encode)
    return names


# ---- the encoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
@pytest.mark.parametrize(("arch", "type"), [("square", "f32"), ("gqa", "f32"), ("wide", "bf16")])
def test_embeddings_are_those_of_the_model(
    tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, type: str, kernel: str
) -> None:
    """To the bit, whatever the threads."""
    monkeypatch.setenv("MLLAMA_CPU_KERNEL", kernel)
    path = tiny_files(arch).one
    if type != "f32":
        checkpoint = tiny.make_checkpoint(tiny.ARCHS[arch], tmp_path / "hf")
        (path,) = convert(checkpoint, tmp_path / "model.gguf", type=type, single_file=True)
    images = [noisy_image(1), noisy_image(2, 30, 200)]
    for flash_attn in (True, False):
        with Mllama(path, n_threads=2, flash_attn=flash_attn) as one:
            expected = [one.encode_image(image) for image in images]
        with Mllama(path, n_threads=2, flash_attn=flash_attn) as two, two.image_encoder(1) as encoder:
            found = [encoder.encode(image) for image in images]
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.key, ours.aspect_ratio_id) == (theirs.key, theirs.aspect_ratio_id)
            assert np.array_equal(ours.states, theirs.states)


def test_both_at_once(model: Mllama) -> None:
    images = [noisy_image(i) for i in range(6)]
    expected = [model.encode_image(image) for image in images]
    captions = [model.caption(image, max_tokens=30) for image in expected]
    model.reset()
    found: list[ImageEmbedding] = []
    with model.image_encoder() as encoder:
        thread = threading.Thread(target=lambda: found.extend(encoder.encode(image) for image in images))
        thread.start()
        assert [model.caption(image, max_tokens=30) for image in expected] == captions
        thread.join()
    assert all(np.array_equal(a.states, b.states) for a, b in zip(found, expected, strict=True))


def test_what_is_known_is_not_computed_again(model: Mllama, calls: list[str]) -> None:
    tiles = preprocess_image(
        noisy_image(1), tile_size=model.hparams.image_size, max_tiles=model.hparams.max_tiles
    )
    with model.image_encoder() as encoder:
        one = encoder.encode(tiles)
        assert model.encode_image(tiles) is one
        two = model.encode_image(noisy_image(2))
        assert encoder.encode(noisy_image(2)) is two
        assert encoder.encode(two) is two
    assert len(calls) == 2


def test_images_are_checked(model: Mllama) -> None:
    with model.image_encoder() as encoder:
        with pytest.raises(ImageError, match="TiledImage of"):
            encoder.encode(preprocess_image(noisy_image(1), tile_size=14, max_tiles=4))
        with pytest.raises(ImageError):
            encoder.encode(b"no image")


def test_where_there_is_no_encoder(tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one, isolate=True) as model:
        assert model.encoder_threads == 0
        with pytest.raises(RequestError, match="computes in another process"):
            model.image_encoder()
    with Mllama(tiny_files("gqa").text) as model:
        assert model.encoder_threads == 0
        with pytest.raises(RequestError, match="without vision encoder"):
            model.image_encoder()
    with pytest.raises(MllamaError, match="closed"):
        _ = model.encoder_threads


@pytest.mark.parametrize("n_threads", [0, -1, True, 2**31])
def test_threads_out_of_range(model: Mllama, n_threads: int) -> None:
    with pytest.raises(RequestError, match="n_threads must be"):
        model.image_encoder(n_threads)


def test_threads_that_are_left(tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for n_threads in (None, 2, 5):
        with Mllama(tiny_files("gqa").one, n_threads=n_threads) as model:
            assert model.n_threads == (n_threads or 1)  # a small model
            for cpus in (1, 2, 3, 16):
                monkeypatch.setattr("mllama_gguf.cpus.usable_cpus", lambda cpus=cpus: cpus)
                found[n_threads, cpus] = model.encoder_threads
                with model.image_encoder() as encoder:
                    assert encoder.n_threads == max(1, model.encoder_threads)
    assert [found[None, cpus] for cpus in (1, 2, 3, 16)] == [0, 1, 1, 1]
    assert [found[2, cpus] for cpus in (1, 2, 3, 16)] == [0, 0, 1, 2]
    assert [found[5, cpus] for cpus in (1, 2, 3, 16)] == [0, 0, 0, 5]


def encoding(encode: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that encodes, well into it, and what it raises."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            encode()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    return thread, raised


@pytest.mark.parametrize("how", ["stop", "close", "close the model", "abort"])
def test_an_encode_is_stopped(slow: Path, how: str) -> None:
    stop = False
    with Mllama(slow, n_ctx=512, abort=lambda: stop) as model:
        encoder = model.image_encoder()
        thread, raised = encoding(lambda: encoder.encode(noisy_image(1, 900, 900)))
        begin = time.monotonic()
        if how == "abort":
            stop = True
        else:
            {"stop": encoder.stop, "close": encoder.close, "close the model": model.close}[how]()
        thread.join(20)
        assert time.monotonic() - begin < STOP_SECONDS
        assert [type(e) for e in raised] == [Aborted]
        stop = False
        if how == "abort":
            assert not encoder.stopped
            return
        with pytest.raises(Aborted, match="was stopped"):
            encoder.encode(noisy_image(2))
        encoder.close()
        encoder.close()


def test_a_callback_of_an_encoder_never_waits_for_itself(slow: Path) -> None:
    with Mllama(slow, n_ctx=512) as model:
        encoder = model.image_encoder(1)
        raised: list[Exception] = []

        def stop() -> bool:
            for use in (lambda: encoder.encode(noisy_image(2)), encoder.close, model.close):
                try:
                    use()
                except BusyError as e:
                    raised.append(e)
            return True

        with pytest.raises(Aborted):
            encoder.encode(noisy_image(1, 900, 900), stop)
        assert len(raised) >= 3 and len(raised) % 3 == 0
        assert not encoder.stopped


# ---- batches -----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """10 images, of which 3.png and 4.png are 2.png again, and 6.png is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        Image.fromarray(
            noisy_image(2 if i in (3, 4) else i, 40, 40 + 10 * (0 if i in (3, 4) else i % 3))
        ).save(path)
    for i in (3, 4):
        paths[i].write_bytes(paths[2].read_bytes())
    paths[6].write_bytes(b"broken")
    return [str(path) for path in paths]


class Batch:
    """Runs batches with a tiny model; each begins with a new output unless it continues.

    caption: called with the model's `reply` and its arguments, in its place
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self._path = path
        self.out = folder / "c.jsonl"
        self.errors = ErrorLog(folder / "errors.jsonl")
        self.events: list[dict[str, Any]] = []
        self.models: list[Mllama] = []
        self.settings: dict[str, Any] = {"image_cache": False}
        self.caption: Callable[..., Any] = lambda create, *args, **kwargs: create(*args, **kwargs)

    def open(self) -> Mllama:
        for model in self.models:
            model.close()
        model = Mllama(self._path, n_ctx=512, n_threads=1, **self.settings)
        self.models.append(model)
        model.reply = partial(self.caption, model.reply)  # type: ignore[method-assign]
        return model

    def run(self, images: list[str], ahead: bool | None, *, goes_on: bool = False) -> Summary:
        if not goes_on:
            for path in (self.out, self.errors.path):
                path.unlink(missing_ok=True)
        self.events.clear()
        self.models.clear()
        output = RecordFile(self.out)
        try:
            return caption_images(
                images,
                output,
                self.open,
                CaptionOptions(max_tokens=12),
                errors=self.errors,
                report=self.events.append,
                encode_ahead=ahead,
            )
        finally:
            output.close()
            for model in self.models:
                model.close()

    def kept(self) -> tuple[bytes, bytes]:
        """The captions and the failures."""
        return self.out.read_bytes(), self.errors.path.read_bytes() if self.errors.path.exists() else b""

    def failed(self) -> list[tuple[str, str]]:
        return [(Path(e["image"]).stem, e["error"]) for e in self.events if e["event"] == "error"]


@pytest.fixture
def batch(tmp_path: Path, tiny_files: Files) -> Batch:
    return Batch(tmp_path, tiny_files("gqa").one)


def cpus(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr("mllama_gguf.cpus.usable_cpus", lambda: n)


def test_records_are_the_same(photos: list[str], batch: Batch, calls: list[str]) -> None:
    expected = None
    for ahead in (False, True):
        calls.clear()
        summary = batch.run(photos, ahead)
        assert (summary.captioned, summary.duplicates, summary.failed) == (7, 2, 1)
        assert Counter(calls) == {"mllama-encode" if ahead else "MainThread": 7}  # each content once
        assert expected in (None, batch.kept())
        expected = batch.kept()
    batch.run(photos[:5], True)
    batch.run(photos, False, goes_on=True)
    assert batch.kept() == expected
    batch.run(photos[:5], False)
    batch.run(photos, True, goes_on=True)
    assert batch.kept() == expected


def test_when_it_is_on(
    photos: list[str], batch: Batch, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n_cpus, thread in ((1, "MainThread"), (2, "mllama-encode")):
        calls.clear()
        cpus(monkeypatch, n_cpus)
        batch.run(photos[:3], None)
        assert set(calls) == {thread}
    calls.clear()
    batch.settings["isolate"] = True
    assert batch.run(photos[:3], None).captioned == 3
    assert not calls
    with pytest.raises(RequestError, match="computes in another process"):
        batch.run(photos[:3], True)


def test_without_room_for_an_encoder(
    photos: list[str], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def image_encoder(*args: object) -> None:
        raise OutOfMemoryError("no room")

    monkeypatch.setattr(Mllama, "image_encoder", image_encoder)
    cpus(monkeypatch, 2)
    assert batch.run(photos[:3], None).captioned == 3
    with pytest.raises(OutOfMemoryError):
        batch.run(photos[:3], True)


def test_so_many_are_encoded_ahead(photos: list[str], batch: Batch, calls: list[str]) -> None:
    distinct = [*photos[:3], *photos[7:]]
    counts: list[int] = []

    def caption(create: Any, *args: Any, **kwargs: Any) -> Any:
        if not counts:
            deadline = time.monotonic() + 20
            while len(calls) < 1 + ENCODED_AHEAD and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)  # for one more, which must not come
        counts.append(len(calls))
        return create(*args, **kwargs)

    batch.caption = caption
    assert batch.run(distinct, True).captioned == len(distinct)
    assert counts[0] == 1 + ENCODED_AHEAD == 3
    assert all(n <= i + 1 + ENCODED_AHEAD for i, n in enumerate(counts))
    assert set(calls) == {"mllama-encode"}


class Failing:
    """Encoding fails at these calls, counted from 1 over both threads, or over one."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, error: BaseException, *calls: int, only: str = ""
    ) -> None:
        self.threads: list[str] = []
        real = LocalContext.encode

        def encode(context: LocalContext, *args: Any) -> Any:
            name = threading.current_thread().name
            self.threads.append(name)
            n = self.threads.count(only) if only else len(self.threads)
            if n in calls and name == (only or name):
                raise error
            return real(context, *args)

        monkeypatch.setattr(LocalContext, "encode", encode)


@pytest.mark.parametrize("error", [RequestError("no"), ImageError("no"), BackendError("device lost")])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_failed_encode_is_that_of_its_image(
    photos: list[str], batch: Batch, monkeypatch: pytest.MonkeyPatch, error: MllamaError, ahead: bool
) -> None:
    distinct = [*photos[:3], *photos[7:]]
    failing = Failing(monkeypatch, error, 4)
    summary = batch.run(distinct, ahead)
    assert batch.failed() == [("7", type(error).__name__)]
    assert (summary.captioned, summary.stopped) == (5, "")
    assert len(batch.models) == 1 + isinstance(error, BackendError)
    assert len(failing.threads) == 6
    assert batch.run(distinct, ahead, goes_on=True).captioned == 1
    assert not batch.errors.path.exists()


def test_a_lost_device_is_opened_with_its_encoder(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One image fails, though nothing can be encoded until the loop comes to it."""
    many = [str(tmp_path / f"{i}.png") for i in range(20)]
    for i, path in enumerate(many):
        Image.fromarray(noisy_image(i)).save(path)
    batch.run(many, False)
    expected = batch.kept()[0].splitlines()
    threads: list[str] = []
    real = LocalContext.encode

    def encode(context: LocalContext, *args: Any) -> Any:
        threads.append(threading.current_thread().name)
        if len(threads) >= 3 and len(batch.models) == 1:
            raise BackendError("device lost")
        return real(context, *args)

    monkeypatch.setattr(LocalContext, "encode", encode)
    summary = batch.run(many, True)
    assert (summary.captioned, summary.failed, len(batch.models)) == (19, 1, 2)
    assert batch.kept()[0].splitlines() == expected[:2] + expected[3:]
    assert threads[-1] == "mllama-encode"  # the new one's
    assert threads.count("MainThread") <= ENCODED_AHEAD


def test_a_lost_device_while_a_caption_is_written(photos: list[str], batch: Batch) -> None:
    batch.run(photos, False)
    expected = batch.kept()[0].splitlines()

    def caption(create: Any, *args: Any, **kwargs: Any) -> Any:
        if len(batch.models) == 1:
            raise BackendError("device lost")
        return create(*args, **kwargs)

    batch.caption = caption
    summary = batch.run(photos, True)
    assert (summary.captioned, summary.duplicates, summary.failed) == (6, 2, 2)
    assert batch.failed() == [("0", "BackendError"), ("6", "ImageError")]
    assert batch.kept()[0].splitlines() == expected[1:]


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemoryError("no room")])
def test_memory_for_one_at_a_time(
    photos: list[str], batch: Batch, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What finds no room ahead is encoded by the loop."""
    batch.run(photos, False)
    expected = batch.kept()
    failing = Failing(monkeypatch, error, 1, 3, only="mllama-encode")
    assert batch.run(photos, True).captioned == 7
    assert batch.kept() == expected
    assert Counter(failing.threads) == {"mllama-encode": 7, "MainThread": 2}


def test_an_abort_in_the_encoder_ends_the_run(photos: list[str], batch: Batch) -> None:
    batch.settings["abort"] = lambda: threading.current_thread().name == "mllama-encode"
    real = LocalContext.encode

    def asked(context: LocalContext, *args: Any) -> Any:
        if context._callbacks.on_abort():  # a tiny image is done before it is asked
            raise Aborted("stopped")
        return real(context, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalContext, "encode", asked)
        summary = batch.run(photos, True)
    assert summary.interrupted
    assert summary.captioned == 0


def test_seconds(photos: list[str], batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalContext.encode

    def encode(context: LocalContext, *args: Any) -> Any:
        time.sleep(0.05)
        return real(context, *args)

    monkeypatch.setattr(LocalContext, "encode", encode)  # what the loop waits for, most of the time
    for ahead in (False, True):
        summary = batch.run(photos, ahead)
        seconds = summary.seconds
        made = [e["seconds"] for e in batch.events if e["event"] == "caption" and "seconds" in e]
        assert len(made) == 7
        for phase in ("encode", "prompt", "decode"):
            assert all(s[phase] > 0 for s in made)
            assert seconds[phase] == pytest.approx(sum(s[phase] for s in made))
        assert seconds["prompt"] + seconds["decode"] < seconds["busy"]
        assert seconds["busy"] <= sum(seconds[phase] for phase in ("encode", "prompt", "decode")) + 1e-9
        # On a busy machine who waits wakes late, and then the next image is encoded already.
        assert seconds["busy"] + seconds["wait"] <= 1.5 * seconds["total"]
        assert seconds["encode"] > 0.35
        assert 0 < summary.utilisation <= 1


def test_the_disk_cache(
    photos: list[str], batch: Batch, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SIZE_VARIABLE)
    entries, captions = [], []
    for ahead in (False, True):
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / f"cache {ahead}"))
        folder = tmp_path / f"cache {ahead}" / NAME
        batch.settings["image_cache"] = True
        batch.run(photos, ahead)
        captions.append(batch.kept())
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        entries.append(
            {name: data for name, data in found.items() if not name.endswith((".weights", ".TAG"))}
        )
    assert captions[1] == captions[0]
    assert entries[1] == entries[0]
    kinds = Counter(Path(name).suffix for name in entries[1])
    assert kinds == {".states": 7, ".image_kv": 7, ".prefix_kv": 1}

    filled = []
    real = LocalContext.image_fill

    def image_fill(context: LocalContext, states: Any) -> int:
        filled.extend(not isinstance(s, int) for s in states)
        return real(context, states)

    monkeypatch.setattr(LocalContext, "image_fill", image_fill)
    calls.clear()
    batch.run(photos, True)
    assert batch.kept() == captions[0]
    assert (len(calls), filled) == (0, [])
    # image_kv alone: nothing is encoded for what is not asked for.
    for path in folder.glob("*.states"):
        path.unlink()
    batch.run(photos, True)
    assert batch.kept() == captions[0]
    assert not calls
    # States alone: read, not computed.
    for name, data in entries[1].items():
        (folder / name).write_bytes(data)
    for path in folder.glob("*.image_kv"):
        path.unlink()
    filled.clear()
    batch.run(photos, True)
    assert batch.kept() == captions[0]
    assert (len(calls), filled) == (0, [True] * 7)
    assert len(list(folder.glob("*.image_kv"))) == 7


# ---- the command -------------------------------------------------------------------------------------------


def test_the_setting_does_not_begin_anew(photos: list[str], tmp_path: Path) -> None:
    """--overwrite finds what a run with another setting has done."""
    out = tmp_path / "c.jsonl"
    args = ["caption", *photos, "--out", str(out), "-n", "4"]
    assert run([*args, "--encode-ahead"]) == 3
    expected = out.read_bytes()
    for n, setting in enumerate(([], ["--encode-ahead"], ["--no-encode-ahead"]), 1):
        child = subprocess.run(
            [sys.executable, "-c", KILLED, *args, "--overwrite", *setting],
            **elsewhere(),
            capture_output=True,
            text=True,
        )
        assert child.returncode == -signal.SIGKILL, child.stderr
        (partial,) = tmp_path.glob(".mllama-*.partial.jsonl")
        records = [json.loads(line) for line in partial.read_bytes().splitlines()]
        old = [record.pop("existing") for record in records]  # the caption that it replaces
        assert records == [json.loads(line) for line in expected.splitlines()[:n]]
        assert old == [record["caption"] for record in records]
    assert run([*args, "--overwrite", "--encode-ahead"]) == 3
    assert out.read_bytes() == expected


# Dies with its first caption.
KILLED = """
import os, signal, sys
from mllama_gguf.batch import outputs as records
from mllama_gguf.cli.main import run
write = records.RecordFile.write
def dying(self, record):
    write(self, record)
    os.kill(os.getpid(), signal.SIGKILL)
records.RecordFile.write = dying
run(sys.argv[1:])
"""


def test_ctrl_c_while_an_image_is_encoded_ahead(slow: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(noisy_image(i, 900, 900)).save(path)
    out = tmp_path / "c.jsonl"
    command = [sys.executable, "-m", "mllama_gguf", "caption", *paths, "-m", str(slow), "-c", "512"]
    child = subprocess.Popen(
        [*command, "--out", str(out), "--json", "--encode-ahead"],
        **elsewhere(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    assert '"event": "start"' in child.stderr.readline()
    time.sleep(0.7)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, err = child.communicate(timeout=30)
    assert time.monotonic() - begin < STOP_SECONDS
    assert child.returncode == 130, err
    (summary,) = err.splitlines()
    assert '"interrupted": true' in summary
    assert out.read_bytes() == b""
