"""Conversations that compute together: the same texts, and each on its own when it is stopped or wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllama_gguf import (
    Aborted,
    BackendError,
    BusyError,
    ContextFullError,
    Conversation,
    LoadedModel,
    MllamaError,
    RequestError,
)
from mllama_gguf.decode.scheduler import CHUNK, Scheduler
from mllama_gguf.decode.slots import MAX_SLOTS

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = [str(EXAMPLES / f"{name}.png") for name in ("apple", "wide", "tall", "apple-and-cat")]
Open = Callable[..., Conversation]


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with LoadedModel.from_pretrained("demo", image_cache=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def captions(model: LoadedModel) -> dict[str, str]:
    """Of each image, alone."""
    with model.conversation() as one:
        return {image: one.caption(image) for image in IMAGES}


@pytest.fixture
def scheduler(model: LoadedModel) -> Iterator[Scheduler]:
    made = model.scheduler()
    yield made
    made.close()


def in_threads(work: Callable[[int], Any], n: int) -> list[Any]:
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, range(n)))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_same_texts(model: LoadedModel, scheduler: Scheduler, captions: dict[str, str], n: int) -> None:
    talks = [model.conversation(scheduler=scheduler) for _ in range(n)]

    def talk(i: int) -> list[tuple[str, str]]:
        order = [IMAGES[(i + k) % len(IMAGES)] for k in range(6)]
        return [(image, talks[i].caption(image)) for image in order]

    for said in in_threads(talk, n):
        for image, text in said:
            assert text == captions[image]
    for one in talks:
        one.close()


def test_steps_are_shared(model: LoadedModel, scheduler: Scheduler) -> None:
    """Four replies of 40 tokens take far fewer than 160 steps."""
    talks = [model.conversation(scheduler=scheduler) for _ in range(4)]
    ready = threading.Barrier(4)

    def talk(i: int) -> int:
        reply = talks[i].reply(
            image=IMAGES[i], temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=i, max_tokens=40
        )
        ready.wait()
        reply.read()
        return reply.stats.completion_tokens

    n_tokens = sum(in_threads(talk, 4))
    assert scheduler.n_steps < n_tokens


def test_one_is_cancelled_and_the_others_go_on(
    model: LoadedModel, scheduler: Scheduler, captions: dict[str, str]
) -> None:
    other, one = (model.conversation(scheduler=scheduler) for _ in range(2))
    long = one.reply(image=IMAGES[0], **endless(model, max_tokens=3000))
    next(long)

    def read(_: int) -> None:
        with pytest.raises(Aborted):
            long.read()

    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read, 0)
        assert other.caption(IMAGES[1]) == captions[IMAGES[1]]
        long.cancel()
        assert other.caption(IMAGES[2]) == captions[IMAGES[2]]
        reading.result(60)
    assert one.caption(IMAGES[3]) == captions[IMAGES[3]]  # it stays usable


def endless(model: LoadedModel, **options: Any) -> dict[str, Any]:
    """Options of a reply that continues."""
    bias = dict.fromkeys(model.stop_ids, -100.0)
    return {"temperature": 5.0, "top_k": 0, "min_p": 0.0, "seed": 1, "logit_bias": bias, **options}


def test_abort_before_anything_is_computed(model: LoadedModel, scheduler: Scheduler) -> None:
    with model.conversation(scheduler=scheduler, abort=lambda: True) as one, pytest.raises(Aborted):
        one.caption(IMAGES[0])
    with model.conversation(scheduler=scheduler) as other:
        assert other.caption(IMAGES[0]) == "a red apple"


def test_a_wrong_request_is_its_own(
    model: LoadedModel, scheduler: Scheduler, captions: dict[str, str]
) -> None:
    small, other = model.conversation(scheduler=scheduler, n_ctx=40), model.conversation(scheduler=scheduler)

    def talk(i: int) -> str:
        if i:
            return other.caption(IMAGES[1])
        with pytest.raises(ContextFullError):
            small.caption(IMAGES[0], "x " * 100)
        return small.caption(IMAGES[0], "", max_tokens=3)

    assert in_threads(talk, 2)[1] == captions[IMAGES[1]]


def test_a_long_prompt_goes_in_pieces(model: LoadedModel, scheduler: Scheduler) -> None:
    """So that a reply that runs never waits for all of it."""
    one, other = (model.conversation(scheduler=scheduler) for _ in range(2))
    prompt = list(range(10, 110)) * 15
    expected = model.conversation().logits(prompt)
    run = other.reply(image=IMAGES[0], **endless(model, max_tokens=2000))
    next(run)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [piece for piece, _ in zip(run, range(300), strict=False)])
        before = scheduler.n_steps
        logits = one.logits(prompt)
        steps = scheduler.n_steps - before
        reading.result(60)
    run.close()
    assert steps >= 3  # 1,500 tokens alone are three batches of 512
    assert CHUNK < 512
    error = abs(logits - expected).max() / abs(expected).max()
    assert error < 1e-3  # F16 caches; in F32: tests/native/test_many.py


@pytest.mark.parametrize(("n_tokens", "n_steps"), [(2, 1), (128, 1), (129, 2), (300, 2)])
def test_a_newcomer_takes_few_steps(scheduler: Scheduler, n_tokens: int, n_steps: int) -> None:
    """128 tokens of its prompt in a step with seven others, and what is left when these have ended."""
    context = scheduler.context
    numbers = [context.sequence_new(512) for _ in range(8)]

    def decode(i: int) -> None:
        scheduler.decode(numbers[i], [5] * (1 if i else n_tokens), -1, 0, "last", bool)

    with ThreadPoolExecutor(8) as pool:
        with scheduler.exclusive(bool):
            done = [pool.submit(decode, i) for i in range(8)]
            while len(scheduler._waiting) < 8:
                time.sleep(0.001)
        for one in done:
            one.result(30)
    assert scheduler.n_steps == n_steps


def test_images_are_encoded_once_and_their_slots_shared(model: LoadedModel, scheduler: Scheduler) -> None:
    talks = [model.conversation(scheduler=scheduler) for _ in range(4)]
    in_threads(lambda i: talks[i].caption(IMAGES[0]), 4)
    assert len(scheduler.slots) == 1
    for one in talks:
        one.reset()
    assert len(scheduler.slots) == 1


def test_more_images_in_use_than_slots(
    model: LoadedModel, scheduler: Scheduler, captions: dict[str, str]
) -> None:
    """A slot that a conversation may go on with is not given to another."""
    talks = [model.conversation(scheduler=scheduler) for _ in range(8)]
    runs = []
    for i, one in enumerate(talks):
        run = one.reply(image=IMAGES[i % 4], prompt=f"Describe this image. {i}", max_tokens=30)
        next(run)
        runs.append(run)
    assert all(isinstance(run.read(), str) for run in runs)


def test_one_thread_a_conversation(model: LoadedModel, scheduler: Scheduler) -> None:
    one = model.conversation(scheduler=scheduler)
    with one.exclusive(), ThreadPoolExecutor(1) as pool, pytest.raises(BusyError):
        pool.submit(one.caption, IMAGES[0]).result(60)


def test_the_end(model: LoadedModel) -> None:
    scheduler = model.scheduler()
    one = model.conversation(scheduler=scheduler)
    scheduler.close()
    scheduler.close()
    with pytest.raises(MllamaError):
        one.caption(IMAGES[0])
    one.close()
    with LoadedModel.from_pretrained("demo", image_cache=False) as other:
        kept = other.conversation(scheduler=other.scheduler())
        kept.caption(IMAGES[0])
    with pytest.raises(MllamaError, match="closed"):
        kept.caption(IMAGES[0])


def test_what_it_cannot_do(model: LoadedModel, scheduler: Scheduler) -> None:
    with pytest.raises(RequestError, match="n_threads"):
        model.conversation(scheduler=scheduler, n_threads=1)
    one = model.conversation(scheduler=scheduler)
    with pytest.raises(RequestError, match="cannot be shown"):
        one.tap(lambda name, values: False).__enter__()


def test_in_a_child_process(captions: dict[str, str]) -> None:
    with LoadedModel.from_pretrained("demo", image_cache=False, isolate=True) as model:
        scheduler = model.scheduler()
        talks = [model.conversation(scheduler=scheduler) for _ in range(3)]
        assert in_threads(lambda i: talks[i].caption(IMAGES[i]), 3) == [
            captions[image] for image in IMAGES[:3]
        ]


def test_the_image_cache(captions: dict[str, str], folder: Path) -> None:
    for _ in range(2):
        with LoadedModel.from_pretrained("demo") as model:
            scheduler = model.scheduler()
            talks = [model.conversation(scheduler=scheduler) for _ in range(4)]
            said = in_threads(lambda i, talks=talks: talks[i].caption(IMAGES[i]), 4)  # type: ignore[misc]
            assert said == [captions[image] for image in IMAGES]
    assert any(folder.iterdir())


def test_a_lost_process_is_never_another_s_sequence(captions: dict[str, str]) -> None:
    """Numbers of sequences count from 1 again in the next process, where they are others'."""
    with LoadedModel.from_pretrained("demo", image_cache=False, isolate=True) as model:
        scheduler = model.scheduler()
        talks = [model.conversation(scheduler=scheduler) for _ in range(3)]
        runs = [one.reply(image=IMAGES[i], **endless(model, max_tokens=50)) for i, one in enumerate(talks)]
        for run in runs:
            next(run)
        old = talks[0].context
        model._backend.model._supervisor._process._child.kill()  # type: ignore[attr-defined]
        with pytest.raises(BackendError):
            runs[1].read()
        assert talks[1].caption(IMAGES[1]) == captions[IMAGES[1]]  # has the first number of the new process
        for lost in (
            lambda: old.decode([5], -1, 0),
            lambda: old.truncate(1),
            lambda: old.prefix_kv_get(1),
            lambda: old.prefix_kv_set(1, old.prefix_kv_get(1)),
        ):
            with pytest.raises(BackendError, match="lost"):
                lost()
        for run in (runs[0], runs[2]):
            with pytest.raises(BackendError, match="lost"):
                run.read()
        assert in_threads(lambda i: talks[i].caption(IMAGES[i]), 3) == [captions[i] for i in IMAGES[:3]]


def test_a_callback_never_waits_for_itself(model: LoadedModel, scheduler: Scheduler) -> None:
    """What a thread computes calls back in that thread."""
    other = model.conversation(scheduler=scheduler)
    uses: list[Callable[[], object]] = [
        scheduler.memory,
        scheduler.close,
        lambda: other.create_chat_completion([{"role": "user", "content": "x"}], max_tokens=1),
        lambda: model.conversation(scheduler=scheduler),
    ]
    with scheduler.exclusive(bool):
        for use in uses:
            with pytest.raises(BusyError, match="a callback cannot"):
                use()

    class Encoder:
        def encode(self, pixels: Any, aspect_ratio_id: int) -> Any:
            for use in (lambda: scheduler.encode(pixels, 1, bool), scheduler.close):
                with pytest.raises(BusyError, match="a callback cannot"):
                    use()
            return pixels

        def close(self) -> None:
            pass

    scheduler._encoder = Encoder()  # type: ignore[assignment]
    assert scheduler.encode(np.zeros(3, np.float32), 1, bool).shape == (3,)
    assert other.create_chat_completion([{"role": "user", "content": "x"}], max_tokens=1)


def test_a_context_that_takes_long_to_open(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks meanwhile whether to stop."""
    opened = model._backend.open_context

    def slowly(callbacks: Any, **more: Any) -> Any:
        assert not callbacks.on_abort()
        return opened(callbacks, **more)

    monkeypatch.setattr(
        type(model._backend), "open_context", lambda self, *args, **more: slowly(*args, **more)
    )
    model.scheduler().close()


def test_a_closed_conversation_holds_no_image(model: LoadedModel, scheduler: Scheduler) -> None:
    for i in range(MAX_SLOTS + 3):
        with model.conversation(scheduler=scheduler) as one:
            one.caption(np.full((32, 32, 3), i, np.uint8), max_tokens=1)
    assert len(scheduler.slots) <= MAX_SLOTS


def test_a_prompt_goes_on_beside_replies_that_fill_the_batch() -> None:
    n_batch = 2
    with LoadedModel.from_pretrained("demo", image_cache=False, n_batch=n_batch) as model:
        scheduler = model.scheduler()
        ended, began = threading.Event(), threading.Barrier(n_batch + 1)

        def reply(number: int) -> None:
            began.wait()
            for _ in range(500):
                if ended.is_set():
                    break
                scheduler.decode(number, [5], -1, 0, "last", bool)
            else:
                raise AssertionError("the prompt waited until the reply ended")

        newcomer, *numbers = [scheduler.context.sequence_new(512) for _ in range(n_batch + 1)]
        with ThreadPoolExecutor(n_batch) as pool:
            replies = [pool.submit(reply, number) for number in numbers]
            began.wait()
            scheduler.decode(newcomer, [5] * 20, -1, 0, "last", bool)
            ended.set()
            for one in replies:
                one.result()
        scheduler.close()
