"""How many threads may compute: bounded everywhere, in one line that says the bound."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from helpers import TinyFiles, noisy_image

from mllama_gguf import Mllama, RequestError
from mllama_gguf import cpus as module
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import LocalModel
from mllama_gguf.backend.rpc import serve
from mllama_gguf.cli.main import run
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.convert.quantize import quantize
from mllama_gguf.cpus import MAX_THREADS, check_threads, usable_cpus
from mllama_gguf.store.resolve import BUNDLED
from mllama_gguf.tune import saved

Files = Callable[[str], TinyFiles]
Captured = pytest.CaptureFixture[str]
DEMO = BUNDLED["demo"]
TOO_MANY = (MAX_THREADS + 1, 20000, 999999, 2**31 - 1, 2**31, 2**64, -1)
IMAGE = str(Path(__file__).parents[1] / "examples" / "apple.png")


@pytest.mark.parametrize("number", [*TOO_MANY, 0, True, 1.5, "2", None])
def test_what_is_no_number_of_threads(number: object) -> None:
    with pytest.raises(RequestError, match=f"n_threads must be a whole number from 1 to {MAX_THREADS}"):
        check_threads(number)


def test_numbers_of_threads() -> None:
    import numpy as np

    for number in (1, 2, MAX_THREADS, np.int64(3)):
        check_threads(number)


def test_a_machine_with_more_cpus_than_ggml_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4096)), raising=False)
    assert module.usable_cpus() == module.default_threads(2**40) == MAX_THREADS


@pytest.mark.parametrize("number", TOO_MANY)
def test_python(number: int, tiny_files: Files, tmp_path: Path) -> None:
    files = tiny_files("square")
    checkpoint = tiny.make_checkpoint(files.arch, tmp_path / "hf")
    with Mllama(files.one, n_ctx=64) as model:
        for use in (
            lambda: Mllama(files.one, n_threads=number),
            lambda: Mllama(files.one, n_threads=number, n_gpu_layers="auto"),
            lambda: model.image_encoder(number),
            lambda: quantize(files.one, tmp_path / "q.gguf", "q8_0", n_threads=number),
            lambda: convert(checkpoint, tmp_path / "c.gguf", n_threads=number),
            lambda: serve("127.0.0.1", 1, n_threads=number),
        ):
            with pytest.raises(RequestError, match=f"(from 1 to|at most) {MAX_THREADS}.*not {number}"):
                use()


def test_the_library(tiny_files: Files) -> None:
    callbacks = Callbacks(load())
    model = LocalModel(tiny_files("square").text, None, callbacks)
    with pytest.raises(RequestError, match=f"n_threads is 999999; at most {MAX_THREADS} are possible"):
        model.open_context(callbacks, n_ctx=64, n_threads=999999)
    context = model.open_context(callbacks, n_ctx=64, n_threads=1)
    with context.handle as pointer:
        context.native.lib.mllama_set_n_threads(pointer, 999999)
    context.native.lib.mllama_rpc_serve(b"127.0.0.1:1", context.native.ffi.NULL, 999999, 1, [0])
    context.close()
    model.close()


@pytest.mark.parametrize(
    "command",
    [
        ["caption", IMAGE],
        ["plan", "demo"],
        ["tune", IMAGE],
        ["worker"],
        ["quantize", str(DEMO), "out.gguf", "--type", "q8_0"],
        ["convert", "hf", "-o", "out.gguf"],
    ],
    ids=lambda command: command[0],
)
def test_the_command_line(command: list[str], capsys: Captured) -> None:
    for number in ("999999", "20000", "0", str(2**64)):
        assert run([*command, "-t", number]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and (f"1<=x<={MAX_THREADS}" in err or f"from 1 to {MAX_THREADS}" in err)


def test_tuned_settings(capsys: Captured) -> None:
    saved.write_tuned("key", {"n_threads": 2}, {})
    path = saved.config_path()
    path.write_text(path.read_text().replace('"n_threads": 2', '"n_threads": 999999'))
    with pytest.raises(RequestError, match=f"from 1 to {MAX_THREADS}"):
        saved.write_tuned("key", {"n_threads": 999999}, {})
    assert saved.read_tuned(lambda: "key") == {}


def test_as_many_as_possible_answer(tiny_files: Files) -> None:
    """Far more threads than CPUs; each waits for all others after every operation."""
    path = tiny_files("square").one
    with Mllama(path, n_ctx=64) as few, Mllama(path, n_ctx=64, n_threads=8 * usable_cpus()) as many:
        assert many.caption(noisy_image(1), max_tokens=2) == few.caption(noisy_image(1), max_tokens=2)
