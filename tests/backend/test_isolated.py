"""Several contexts in one child process: each is its own, and they take turns."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import STOP_SECONDS, TinyFiles

from mllama_gguf import Aborted, BackendError, BusyError, MllamaError, RequestError
from mllama_gguf.backend.base import Context, Model
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.isolated import IsolatedModel
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import open_model
from mllama_gguf.backend.supervisor import Supervisor

Files = Callable[[str], TinyFiles]


def callbacks(**options: Any) -> Callbacks:
    return Callbacks(load(), **options)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor((), 300.0)
    yield made
    made.close()


@pytest.fixture
def model(supervisor: Supervisor, tiny_files: Files) -> IsolatedModel:
    return IsolatedModel(supervisor, tiny_files("gqa").one, None, callbacks())


def child(supervisor: Supervisor) -> int:
    assert supervisor._process is not None
    return supervisor._process._child.pid


def logits(context: Context, *tokens: int) -> Any:
    return context.decode(tokens, -1, 0)[0]


def open_context(model: Model, **options: Any) -> Context:
    # a cache in F16 would round sums that differ in their last bit to different numbers
    return model.open_context(callbacks(**options), n_ctx=64, n_threads=1, type_k="f32", type_v="f32")


@pytest.fixture
def expected(tiny_files: Files) -> Callable[..., Any]:
    """The logits of tokens in a fresh context of this process."""
    model = open_model(tiny_files("gqa").one, None, callbacks=callbacks())

    def compute(*tokens: int) -> Any:
        context = open_context(model)
        try:
            return logits(context, *tokens)
        finally:
            context.close()

    return compute


def test_each_has_its_own_caches(model: IsolatedModel, expected: Callable[..., Any]) -> None:
    one, two = open_context(model), open_context(model)
    logits(one, 1, 2)
    assert (one.n_past, two.n_past) == (2, 0)
    assert np.array_equal(logits(two, 5), expected(5))
    # Another number of tokens at a time is rounded otherwise.
    np.testing.assert_allclose(logits(one, 3), expected(1, 2, 3), rtol=0, atol=2e-5)
    one.clear()
    assert (one.n_past, two.n_past) == (0, 1)


def test_threads_take_turns(model: IsolatedModel, expected: Callable[..., Any]) -> None:
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        context = open_context(model)
        for token in range(1, 21):
            found[number] = logits(context, token, number)
        context.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(1, 4):
        tokens = [t for token in range(1, 21) for t in (token, number)]
        np.testing.assert_allclose(found[number], expected(*tokens), rtol=0, atol=2e-5)


def test_after_a_loss_each_is_opened_again(
    supervisor: Supervisor, model: IsolatedModel, expected: Callable[..., Any]
) -> None:
    one, two = open_context(model), open_context(model)
    logits(one, 1)
    logits(two, 1)
    epoch = one.epoch
    os.kill(child(supervisor), signal.SIGKILL)
    with pytest.raises(BackendError, match="SIGKILL; the next call starts a new process"):
        logits(one, 2)
    assert two.n_past == 0
    assert one.epoch == two.epoch == epoch + 1
    assert np.array_equal(logits(one, 2), expected(2))
    assert np.array_equal(logits(two, 3), expected(3))


def test_closed_contexts_leave_the_child(supervisor: Supervisor, model: IsolatedModel) -> None:
    contexts = [open_context(model) for _ in range(4)]
    assert supervisor._process is not None
    assert supervisor._process.contexts == {1, 2, 3, 4}
    contexts[0].close()
    contexts[0].close()
    with pytest.raises(MllamaError, match="closed"):
        logits(contexts[0], 1)
    assert supervisor._process.contexts == {2, 3, 4}
    del contexts[1:3]
    gc.collect()
    logits(contexts[1], 1)
    assert supervisor._process.contexts == {4}
    supervisor.close()
    for use in (lambda: logits(contexts[1], 1), lambda: open_context(model), model.tensors):
        with pytest.raises(MllamaError, match="this model is closed"):
            use()
    contexts[1].close()


def test_what_cannot_be_opened_leaves_nothing(supervisor: Supervisor, model: IsolatedModel) -> None:
    for settings in ({"type_v": "q8_0", "flash_attn": False}, {"n_threads": 10**6}):
        with pytest.raises(RequestError):
            model.open_context(callbacks(), n_ctx=64, **settings)  # type: ignore[arg-type]
    assert supervisor._process is not None
    assert supervisor._process.contexts == set()
    assert supervisor._contexts == {}
    pid = child(supervisor)
    assert logits(open_context(model), 1).shape
    assert child(supervisor) == pid


def test_the_same_files_wherever_this_process_is(
    tmp_path: Path, tiny_files: Files, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny_files("gqa").one, tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    model = IsolatedModel(supervisor, "model.gguf", None, callbacks())
    context = open_context(model)
    monkeypatch.chdir("/")
    os.kill(child(supervisor), signal.SIGKILL)
    with pytest.raises(BackendError):
        logits(context, 1)
    assert logits(context, 1).shape == (model.hparams.vocab_size,)


def test_a_callback_cannot_use_the_child_that_computes(model: IsolatedModel) -> None:
    other = open_context(model)
    raised: list[Exception] = []

    def progress(phase: str, done: int, total: int) -> None:
        try:
            logits(other, 1)
        except Exception as e:
            raised.append(e)

    context = open_context(model, progress=progress)
    h = model.hparams
    context.encode(np.zeros((1, 3, h.image_size, h.image_size), np.float32), 1)
    assert {type(e) for e in raised} == {BusyError}
    assert logits(other, 1).shape == (h.vocab_size,)


def test_waiting_for_a_turn_is_stopped(slow: Path, supervisor: Supervisor) -> None:
    model = IsolatedModel(supervisor, slow, None, callbacks())
    stop = False
    busy, waiting = open_context(model, abort=lambda: stop), open_context(model, abort=lambda: True)
    h = model.hparams
    pixels = np.zeros((4, 3, h.image_size, h.image_size), np.float32)
    ended: list[Exception] = []

    def encode() -> None:
        try:
            busy.encode(pixels, 6)
        except Exception as e:
            ended.append(e)

    thread = threading.Thread(target=encode)
    thread.start()
    time.sleep(0.5)
    begin = time.monotonic()
    with pytest.raises(Aborted):
        logits(waiting, 1)
    assert time.monotonic() - begin < STOP_SECONDS
    assert thread.is_alive()
    stop = True
    thread.join(10)
    assert [type(e) for e in ended] == [Aborted]


class Odd:
    """Can be sent, and not be read: the child has no such class."""

    def __reduce__(self) -> Any:
        return (_odd, ())


def _odd() -> Odd:
    raise AttributeError("no such class here")


def test_a_request_that_the_child_cannot_read(supervisor: Supervisor, model: IsolatedModel) -> None:
    first = child(supervisor)
    with pytest.raises(BackendError, match="cannot read a request: "):
        supervisor.call(callbacks(), "", "devices", (Odd(),))
    assert supervisor.call(callbacks(), "", "devices")
    assert child(supervisor) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_lost_processes_leave_no_descriptors(supervisor: Supervisor, model: IsolatedModel) -> None:
    found = set()
    for _ in range(4):
        context = open_context(model)
        logits(context, 1)
        found.add(len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)
        os.kill(child(supervisor), signal.SIGKILL)
        with pytest.raises(BackendError):
            logits(context, 2)
        gc.collect()
    assert max(found) - min(found) <= 1  # of the last one


def test_a_tap_that_raises_costs_no_caches(supervisor: Supervisor, model: IsolatedModel) -> None:
    context, first = open_context(model), child(supervisor)
    logits(context, 1, 2)

    def tap(name: str, values: Any) -> bool:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), context.tap(tap):
        logits(context, 3)
    assert child(supervisor) == first and context.n_past >= 2


def test_closed_while_it_starts(supervisor: Supervisor, tiny_files: Files) -> None:
    started = threading.Event()
    raised: list[BaseException] = []

    def work() -> None:
        started.set()
        try:
            supervisor.open_model(callbacks(), tiny_files("gqa").one, None)
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(20)
    time.sleep(0.05)
    supervisor.close()
    thread.join(60)
    assert len(raised) == 1 and isinstance(raised[0], MllamaError)
    assert supervisor._process is None
