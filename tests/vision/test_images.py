"""Images that several threads ask for: each is computed once, and never waited for in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import Aborted, BackendError, ImageEmbedding, Mllama
from mllama_gguf.backend.context import LocalContext

Files = Callable[[str], TinyFiles]


@pytest.fixture
def model(tiny_files: Files) -> Iterator[Mllama]:
    with Mllama(tiny_files("gqa").one, n_ctx=512, n_threads=1) as opened:
        yield opened


class Slow:
    """Encoding takes a while; these calls, counted from 1, fail with `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, *fail: int) -> None:
        self.calls = 0
        self.begun = threading.Event()
        real = LocalContext.encode

        def encode(context: LocalContext, *args: Any) -> Any:
            self.calls += 1
            number = self.calls
            self.begun.set()
            time.sleep(0.2)
            if error is not None and number in fail:
                raise error
            return real(context, *args)

        monkeypatch.setattr(LocalContext, "encode", encode)


def together(*encode: Callable[[], ImageEmbedding]) -> list[ImageEmbedding | Exception]:
    """What threads get that ask at the same time."""
    found: list[ImageEmbedding | Exception] = []

    def work(ask: Callable[[], ImageEmbedding]) -> None:
        try:
            found.append(ask())
        except Exception as e:
            found.append(e)

    threads = [threading.Thread(target=work, args=(ask,)) for ask in encode]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_an_image_is_encoded_once(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with model.image_encoder() as one, model.image_encoder() as two:
        found = together(
            lambda: model.encode_image(noisy_image(1)),
            lambda: one.encode(noisy_image(1)),
            lambda: two.encode(noisy_image(1)),
        )
        assert len({id(embedding) for embedding in found}) == 1
        assert slow.calls == 1
        together(lambda: one.encode(noisy_image(2)), lambda: two.encode(noisy_image(3)))
        assert slow.calls == 3


@pytest.mark.parametrize("error", [BackendError("device lost"), Aborted("stopped")])
def test_after_a_failure_another_thread_encodes(
    model: Mllama, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    slow = Slow(monkeypatch, error, 1)
    with model.image_encoder() as one, model.image_encoder() as two:
        found = together(*[lambda e=e: e.encode(noisy_image(1)) for e in (one, two)])  # type: ignore[misc]
        assert slow.calls == 2
        assert {type(result) for result in found} == {type(error), ImageEmbedding}


def test_waiting_is_stopped(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with model.image_encoder() as one, model.image_encoder() as two:

        def stopped() -> ImageEmbedding:
            assert slow.begun.wait(20)
            threading.Timer(0.05, two.stop).start()
            return two.encode(noisy_image(1))

        found = together(lambda: one.encode(noisy_image(1)), stopped)
        assert {type(result) for result in found} == {Aborted, ImageEmbedding}
    assert slow.calls == 1
    assert not model._shared.images._running


def test_a_callback_asks_for_the_image_that_is_computed(tiny_files: Files) -> None:
    asked: list[ImageEmbedding] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "encode" and done == total and not asked:
            asked.append(encoder.encode(noisy_image(1)))

    with Mllama(tiny_files("gqa").one, n_ctx=512, n_threads=1, progress=progress) as model:
        with model.image_encoder() as encoder:
            found = model.encode_image(noisy_image(1))
        assert np.array_equal(found.states, asked[0].states)
        assert not model._shared.images._running


def test_what_an_encoder_made_is_our_own(model: Mllama) -> None:
    """Its key names its content, whichever thread made it; nobody else's does."""
    with model.image_encoder() as encoder:
        ours = encoder.encode(noisy_image(1))
    assert model._shared.images._is_own(ours)
    assert not model._shared.images._is_own(ImageEmbedding(ours.states, ours.aspect_ratio_id, ours.key))
