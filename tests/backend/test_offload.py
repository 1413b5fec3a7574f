"""Devices and engines in a child process, without a device but the CPU. tests/rpc has the rest."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import TinyFiles, elsewhere, noisy_image

from mllama_gguf import BackendError, Mllama, RequestError
from mllama_gguf.backend.library import load
from mllama_gguf.cli.main import run
from mllama_gguf.settings import Settings

Files = Callable[[str], TinyFiles]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": ["CPU"]}, "device CPU is not a GPU"),
        ({"devices": ["Voodoo"]}, "no device 'Voodoo'; there are: .*CPU"),
        ({"vision_device": "Voodoo"}, "no device 'Voodoo'"),
        ({"tensor_split": [1, 1]}, "tensor_split has 2 shares for 0 devices"),
        ({"tensor_split": "ab"}, "tensor_split must be a list of numbers .* not 'ab'"),
        ({"main_gpu": 0}, "main_gpu is 0; there are 0 devices"),
        ({"main_gpu": -1}, "main_gpu must be a whole number of at least 0"),
        ({"rpc_servers": "localhost"}, "'localhost' is not host:port"),
        ({"rpc_servers": ["a:1", "a:1"]}, "named twice"),
        ({"rpc_servers": "a:99999"}, "'a:99999' is not host:port"),
        ({"isolate": True, "rpc_timeout": 0}, "rpc_timeout must be seconds above 0, not 0"),
        ({"isolate": True, "rpc_timeout": math.nan}, "rpc_timeout must be seconds"),
        ({"isolate": True, "devices": ["Voodoo"]}, "no device 'Voodoo'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str, tiny_files: Files) -> None:
    # No GPU at all, whatever this machine has.
    none: dict[str, Any] = {"devices": []} if settings.keys() & {"tensor_split", "main_gpu"} else {}
    with pytest.raises(RequestError, match=words):
        Mllama(tiny_files("gqa").one, **none, **settings)


def test_workers() -> None:
    assert Settings(rpc_servers="10.0.0.1:50052, box:1").rpc_servers == ("10.0.0.1:50052", "box:1")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="17 workers; at most 16"):
        Settings(rpc_servers=tuple(f"box:{port}" for port in range(1, 18)))


@pytest.mark.parametrize("words", [["--rpc", "box"], ["-ts", "1,x"], ["--main-gpu", "-1"]])
def test_wrong_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["caption", "x.png", *words]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_without_rpc_one_line_says_how_to_get_it(tiny_files: Files) -> None:
    if load().lib.mllama_rpc_available():
        words = "worker 127.0.0.1:1 .*refuses the connection"
    else:
        words = "has no RPC; run: CMAKE_ARGS=.*GGML_RPC=ON.* --no-cache-dir"
    with pytest.raises(BackendError, match=words):
        Mllama(tiny_files("gqa").one, rpc_servers="127.0.0.1:1")


@pytest.fixture
def isolated(tiny_files: Files) -> Any:
    with Mllama(tiny_files("gqa").one, isolate=True, n_ctx=256) as model:
        yield model


def child_of(model: Mllama) -> int:
    pid: int = model._backend.model._supervisor._process._child.pid  # type: ignore[attr-defined]
    return pid


def test_a_child_process_gives_the_same(isolated: Mllama, tiny_files: Files) -> None:
    with Mllama(tiny_files("gqa").one, n_ctx=256) as model:
        expected = model.encode_image(noisy_image(0)).states, model.logits([1, 2, 3]), model.memory()
    assert np.array_equal(isolated.encode_image(noisy_image(0)).states, expected[0])
    assert np.array_equal(isolated.logits([1, 2, 3]), expected[1])
    assert isolated.memory() == expected[2]
    assert isolated.hparams == model.hparams


def test_a_dead_engine_is_one_error_and_the_next_call_starts_another(isolated: Mllama) -> None:
    tokens = [1, 2, 3, 4]
    first, _ = isolated._conversation.session.feed(tokens)
    pid = child_of(isolated)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BackendError, match=r"ended with SIGKILL; the next call starts a new process"):
        isolated._conversation.session.feed(tokens)
    again, reused = isolated._conversation.session.feed(tokens)
    assert reused == 0 and np.array_equal(again, first)
    assert child_of(isolated) != pid


def test_callbacks_errors_come_out(tiny_files: Files) -> None:
    def fail(phase: str, done: int, total: int) -> None:
        if phase == "encode":
            raise ZeroDivisionError("of mine")

    with Mllama(tiny_files("gqa").one, isolate=True, n_ctx=256, progress=fail) as model:
        pid = child_of(model)
        with pytest.raises(ZeroDivisionError, match="of mine"):
            model.encode_image(noisy_image(0))
        assert model.logits([1, 2]).shape[0] == 2
        assert child_of(model) == pid, "the child went on living"


def test_errors_of_the_child_keep_their_type(isolated: Mllama) -> None:
    with pytest.raises(RequestError, match="no image in slot 9"):
        isolated._conversation.context.decode([1], 9, 1)
    assert isolated.logits([1]).shape[0] == 1


def test_the_child_outlives_the_thread_that_made_it(tiny_files: Files) -> None:
    made: list[Mllama] = []
    thread = threading.Thread(
        target=lambda: made.append(Mllama(tiny_files("gqa").one, isolate=True, n_ctx=256))
    )
    thread.start()
    thread.join()
    with made[0] as model:
        assert model.logits([1]).shape[0] == 1


def test_no_child_outlives_its_parent(tiny_files: Files) -> None:
    code = (
        "import sys, time; from mllama_gguf import Mllama; "
        "model = Mllama(sys.argv[1], isolate=True, n_ctx=256); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_files("gqa").one)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **elsewhere(),
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"open\n"
        parent.kill()
        # The child inherited stderr: it ends when the last holder is gone.
        _, words = parent.communicate(timeout=10)
        assert words == b""
