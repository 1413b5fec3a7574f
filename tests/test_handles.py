"""Objects of one process: copying is refused, a forked process is told, threads never use what is freed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyFiles, elsewhere, noisy_image

import mllama_gguf
from mllama_gguf import Mllama, MllamaError, RequestError, handles
from mllama_gguf.errors import CopyError
from mllama_gguf.handles import FoundOnce, Handle, OneProcess, finalize

Files = Callable[[str], TinyFiles]
FORK_SECONDS = 60


def in_fork(work: Callable[[], object]) -> int:
    """Run something in a forked process. Returns its exit code: 0 if it went well, minus the signal that
    ended it, SIGALRM if it hung. Its prints and its traceback go to this process's streams."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(FORK_SECONDS)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def refused() -> Iterator[None]:
    """What is inside is refused in a forked process, in words that say what to do."""
    with pytest.raises(MllamaError, match="was forked; open it in the child"):
        yield


@pytest.fixture(scope="module")
def model(tiny_files: Files) -> Iterator[Mllama]:
    with Mllama(tiny_files("square").one, n_threads=2, n_ctx=256) as model:
        model.caption(noisy_image(1), max_tokens=2)  # the threads have been started
        yield model


# ---- the handle --------------------------------------------------------------------------------------------


class Memory:
    """Stands for the C side: notes what is freed."""

    def __init__(self) -> None:
        self.freed: list[str] = []

    def handle(self, name: str, needs: Handle | None = None) -> Handle:
        return Handle(f"this {name}", name, self.freed.append, needs)


def test_a_handle_is_freed_once_by_its_last_user() -> None:
    memory = Memory()
    handle = memory.handle("model")
    with handle as pointer, handle:
        assert pointer == "model"
        handle.close()
        handle.close()
        assert memory.freed == [] and handle.closed
        with pytest.raises(MllamaError, match="this model is closed"), handle:
            pass
    assert memory.freed == ["model"]
    handle.close()
    assert memory.freed == ["model"]


def test_a_handle_is_freed_after_those_that_need_it() -> None:
    memory = Memory()
    model = memory.handle("model")
    contexts = [memory.handle(f"context {i}", needs=model) for i in range(2)]
    model.close()
    contexts[0].close()
    assert memory.freed == ["context 0"]
    contexts[1].close()
    assert memory.freed == ["context 0", "context 1", "model"]
    with pytest.raises(MllamaError, match="this model is closed"):
        memory.handle("context 2", needs=model)


def test_dropped_objects_are_freed_in_order() -> None:
    memory = Memory()
    model = memory.handle("model")
    context = memory.handle("context", needs=model)
    del model
    assert memory.freed == []
    del context
    assert memory.freed == ["context", "model"]


def test_a_forked_process_frees_nothing() -> None:
    memory = Memory()
    handle = memory.handle("model")
    owner = OneProcess()
    released: list[int] = []
    finalizer = finalize(owner, released.append, 1)

    def child() -> None:
        with refused(), handle:
            pass
        handle.close()
        finalizer()
        assert (memory.freed, released) == ([], [])
        assert owner.is_inherited

    assert in_fork(child) == 0
    assert not owner.is_inherited
    with handle:
        pass
    handle.close()
    finalizer()
    assert (memory.freed, released) == (["model"], [1])


# ---- copies ------------------------------------------------------------------------------------------------


def objects_of(model: Mllama) -> dict[str, Any]:
    """Everything in a model that holds memory of C, threads or a process."""
    from mllama_gguf.text.sampling import Sampler, SamplingOptions

    return {
        "Mllama": model,
        "LocalModel": model._backend.model,
        "LocalContext": model._conversation.context,
        "Vocab": model._vocab,
        "Handle": model._vocab.handle,
        "Session": model._conversation.session,
        "Sampler": Sampler(model._vocab, model.vocab_size, SamplingOptions(), []),
        "Reply": model.reply([{"role": "user", "content": "x"}]),
    }


COPIES: dict[str, Callable[[Any], object]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "old pickle": lambda thing: pickle.dumps(thing, 0),
    "in a list": lambda thing: copy.deepcopy([thing]),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_refused_with_words(model: Mllama, way: str) -> None:
    for name, thing in objects_of(model).items():
        with pytest.raises(CopyError, match=rf"an? {name} cannot be copied or pickled"):
            COPIES[way](thing)
    with model.image_encoder(1) as encoder, pytest.raises(CopyError, match="an ImageEncoder cannot"):
        COPIES[way](encoder)
    assert model.tokenize("still usable")


def test_a_copy_error_is_of_both_kinds() -> None:
    assert issubclass(CopyError, MllamaError) and issubclass(CopyError, TypeError)


def test_an_isolated_model_is_not_copied(tiny_files: Files) -> None:
    with Mllama(tiny_files("square").text, n_ctx=64, isolate=True) as model:
        for thing in (
            model,
            model._backend.model,
            model._conversation.context,
            model._backend.model._supervisor,
        ):  # type: ignore[attr-defined]
            for way in COPIES.values():
                with pytest.raises(CopyError):
                    way(thing)


# ---- forks -------------------------------------------------------------------------------------------------


def test_a_forked_process_is_told(model: Mllama) -> None:
    stream = model.caption(noisy_image(1), max_tokens=3, stream=True)
    next(stream)
    encoder = model.image_encoder(1)
    messages = [{"role": "user", "content": "x"}]
    uses: list[Callable[[], object]] = [
        lambda: model.caption(noisy_image(1)),
        lambda: model.create_chat_completion(messages),
        lambda: model.logits([1]),
        lambda: model.tokenize("x"),
        lambda: model.detokenize([1]),
        lambda: model.encode_image(noisy_image(2)),
        lambda: model.image_encoder(),
        lambda: model.memory(),
        lambda: model.reset(),
        lambda: model.tap(lambda name, values: False),
        lambda: model.layout,
        lambda: model.repairs,
        lambda: model.encoder_threads,
        lambda: next(stream),
        lambda: encoder.encode(noisy_image(2)),
        lambda: model._conversation.context.n_past,
        lambda: list(model._backend.model.tensors()),
    ]

    def child() -> None:
        for use in uses:
            with refused():
                use()
        encoder.close()
        model.close()

    assert in_fork(child) == 0
    assert isinstance(next(stream), str)  # the parent's continues
    assert encoder.encode(noisy_image(2)).n_tiles > 1
    encoder.close()


def test_a_forked_process_opens_its_own(model: Mllama, tiny_files: Files) -> None:
    """After the parent has computed with two threads, which the child does not have."""
    expected = model.caption(noisy_image(3), max_tokens=4)

    def child() -> None:
        with Mllama(tiny_files("square").one, n_threads=2, n_ctx=256) as own:
            assert own.caption(noisy_image(3), max_tokens=4) == expected

    assert in_fork(child) == 0
    assert in_fork(lambda: in_fork(child) or child()) == 0  # a child's child
    assert model.caption(noisy_image(3), max_tokens=4) == expected


def test_a_fork_while_another_thread_computes(model: Mllama, tiny_files: Files) -> None:
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            model.caption(noisy_image(4), max_tokens=8)

    thread = threading.Thread(target=compute)
    thread.start()

    def child() -> None:
        with refused():
            model.caption(noisy_image(1))
        with Mllama(tiny_files("square").one, n_threads=2, n_ctx=256) as own:
            own.caption(noisy_image(1), max_tokens=2)

    try:
        assert [in_fork(child) for _ in range(5)] == [0] * 5
    finally:
        done.set()
        thread.join()


class Captions:
    """As a data set of torch: the workers of its loader get it by a fork."""

    def __init__(self, model: Mllama) -> None:
        self.model = model

    def __getitem__(self, index: int) -> str:
        return self.model.caption(noisy_image(index), max_tokens=2)


def test_the_workers_of_a_pool_are_told(model: Mllama) -> None:
    captions = Captions(model)
    with multiprocessing.get_context("fork").Pool(2) as pool, pytest.raises(CopyError, match="a Mllama"):
        pool.map(captions.__getitem__, range(2))
    global shared
    shared = captions  # what a fork hands on without pickling
    with multiprocessing.get_context("fork").Pool(2) as pool, refused():
        pool.map(use_shared, range(4))
    shared = None


shared: Captions | None = None


def use_shared(index: int) -> str:
    assert shared is not None
    return shared[index]


def test_a_forked_process_leaves_the_parents_engine_alone(tiny_files: Files) -> None:
    with Mllama(tiny_files("square").text, n_ctx=64, isolate=True) as model:
        expected = model.logits([1, 2])
        process = model._backend.model._supervisor._process  # type: ignore[attr-defined]

        def child() -> None:
            for use in (lambda: model.logits([1]), lambda: model.memory(), lambda: model.repairs):
                with refused():
                    use()
            model.close()
            model._backend.model._supervisor.close()  # type: ignore[attr-defined]

        assert in_fork(child) == 0
        assert process.alive
        assert (model.logits([1, 2]) == expected).all()


ENDS = """
import os, sys
from mllama_gguf import Mllama
model = Mllama({path!r}, n_ctx=64, isolate={isolate}, n_threads=2)
expected = model.logits([1, 2])
child = os.fork()
if child == 0:
    {end}
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (model.logits([1, 2]) == expected).all()
print("well")
"""


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("end", ["sys.exit()", "del model; import gc; gc.collect(); os._exit(0)"])
def test_a_forked_process_ends_by_itself(tiny_files: Files, isolate: bool, end: str) -> None:
    """With finalizers, or with the garbage collector: neither takes anything from the parent."""
    script = ENDS.format(path=str(tiny_files("square").text), isolate=isolate, end=end)
    # From 3.12 on Python warns of every fork of a process with threads.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FORK_SECONDS, **elsewhere())
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


# ---- threads -----------------------------------------------------------------------------------------------


def use_until_error(work: Callable[[], object], begun: threading.Barrier, errors: list[MllamaError]) -> None:
    begun.wait()
    try:
        while True:
            work()
    except MllamaError as e:
        errors.append(e)


def test_threads_use_an_object_that_another_closes(tiny_files: Files) -> None:
    """An answer or an error, never freed memory."""
    path = tiny_files("square").one
    text = "the quick brown fox " * 2000
    for _ in range(8):
        model = Mllama(path, n_ctx=64, n_threads=1)
        begun = threading.Barrier(5)
        errors: list[MllamaError] = []
        uses: list[Callable[[], object]] = [
            lambda model=model: model.tokenize(text),
            lambda model=model: model.detokenize(range(64)),
            lambda model=model: (model.layout, model.repairs, model.encoder_threads, model.n_ctx),
            lambda model=model: model.caption(noisy_image(1), max_tokens=2),
        ]

        threads = [threading.Thread(target=use_until_error, args=(work, begun, errors)) for work in uses]
        for thread in threads:
            thread.start()
        begun.wait()
        while not model._closed:
            try:
                model.close()
            except MllamaError as e:
                assert "is in use" in str(e)
        for thread in threads:
            thread.join(FORK_SECONDS)
        assert len(errors) == 4 and not any(thread.is_alive() for thread in threads)
        assert all("closed" in str(e) or "is in use" in str(e) for e in errors)


def test_a_closed_object_answers_with_an_error(tiny_files: Files) -> None:
    model = Mllama(tiny_files("square").one, n_ctx=64)
    encoder = model.image_encoder(1)
    native, context, vocab = model._backend.model, model._conversation.context, model._vocab
    model.close()
    for use in (
        lambda: model.layout,
        lambda: model.repairs,
        lambda: model.tokenize("x"),
        lambda: list(native.tensors()),
        lambda: native.size,
        lambda: context.n_ctx,
        lambda: context.decode([1], -1, 0),
        lambda: vocab.tokenize("x"),
        lambda: vocab.piece(1),
        lambda: encoder.encode(noisy_image(1)),
    ):
        with pytest.raises((MllamaError, RequestError)):
            use()
    for thing in (model, native, context, vocab, encoder):
        thing.close()


def test_what_is_found_once_needs_no_lock() -> None:
    """A child that is forked while another thread finds a value finds it itself."""
    begun, go = threading.Event(), threading.Event()

    class Slow:
        found = 0

        @FoundOnce
        def value(self) -> int:
            """Five."""
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                go.wait(FORK_SECONDS)
            self.found += 1
            return 5

    assert Slow.value.__doc__ == "Five."
    shared, mine = Slow(), Slow()
    thread = threading.Thread(target=lambda: shared.value)
    thread.start()
    try:
        assert begun.wait(FORK_SECONDS)

        def child() -> None:
            assert shared.value + mine.value + mine.value == 15 and mine.found == 1

        assert in_fork(child) == 0
    finally:
        go.set()
        thread.join()
    assert shared.value == 5 and shared.found == 1


def test_a_lock_of_a_module_is_free_in_a_child() -> None:
    """Whoever held it is not there."""
    from mllama_gguf.backend import library, precision
    from mllama_gguf.batch import xmp
    from mllama_gguf.text import aside
    from mllama_gguf.vision import decoding

    locks = [
        library._loading,
        precision._lock,
        xmp._registry,
        aside._starting,
        decoding._quiet._lock,
        decoding._unlimited._lock,
    ]
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            go.wait(FORK_SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(FORK_SECONDS)

        def child() -> None:
            for lock in locks:
                with lock:
                    pass
            assert aside.aside(lambda: 5, name="five") == 5

        assert in_fork(child) == 0
    finally:
        go.set()
        thread.join()


def test_every_lock_of_a_module_is_such_a_one() -> None:
    """But for the server's: it is never forked."""
    package = Path(mllama_gguf.__file__).parent
    for path in sorted(set(package.rglob("*.py")) - set((package / "server").iterdir())):
        for line in path.read_text("utf-8").splitlines():
            assert not re.match(r"_?\w+ = threading\.(R?Lock|Condition)\(", line), f"{path}: {line}"


# ---- the end of Python -------------------------------------------------------------------------------------

DAEMONS = """
import sys, threading, time
import numpy as np
from mllama_gguf import Mllama

def forever(work):
    while True:
        work()

image = np.zeros((40, 40, 3), np.uint8)
models = [Mllama(sys.argv[1], n_ctx=256, n_threads=2) for _ in range(2)]
scheduler = models[0].scheduler()
talk = models[0].conversation(scheduler=scheduler)
for work in (
    lambda: models[0].caption(image, max_tokens=50),
    lambda: models[1].caption(image, max_tokens=50, temperature=1.0, grammar="root ::= [a-z]*"),
    lambda: talk.caption(image, max_tokens=50),
    lambda: models[0].tokenize("word " * 200_000),
):
    threading.Thread(target=forever, args=[work], daemon=True).start()
time.sleep(0.7)
print("well", flush=True)
"""


def test_python_ends_while_daemons_compute(tiny_files: Files) -> None:
    """Nothing is freed under their hands, and nobody sees an error of theirs."""
    command = [sys.executable, "-c", DAEMONS, str(tiny_files("square").one)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FORK_SECONDS, **elsewhere())
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


def test_python_waits_for_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for threads that are inside: not for what is open, nor for the copies in a forked process."""
    memory = Memory()
    model = memory.handle("model")
    context = memory.handle("context", needs=model)
    monkeypatch.setattr(handles, "_handles", {model, context})
    monkeypatch.setattr(handles, "_ending", False)  # as it is afterwards

    def end() -> float:
        begin = time.monotonic()
        handles._end()
        handles._ending = False
        return time.monotonic() - begin

    monkeypatch.setattr(handles, "END_SECONDS", 1.0)
    assert end() < 0.8
    with context:
        assert end() >= 1.0
        assert in_fork(lambda: end() < 0.8 or os._exit(3)) == 0
    inside, go = threading.Event(), threading.Event()

    def use() -> None:
        with model:
            inside.set()
            go.wait(FORK_SECONDS)

    monkeypatch.setattr(handles, "END_SECONDS", 20.0)
    monkeypatch.setattr(handles, "_freeze_at_end", lambda: None)  # this thread is not a daemon
    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(FORK_SECONDS)
    threading.Timer(0.1, go.set).start()
    assert 0.05 < end() < 19.0
    thread.join()
    context.close()
    model.close()
    assert memory.freed == ["context", "model"]
