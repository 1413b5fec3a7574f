"""The caches' bookkeeping, over a context that only writes down what it is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mllama_gguf.embedding import ImageEmbedding
from mllama_gguf.errors import BackendError, ContextFullError, RequestError
from mllama_gguf.session import MAX_SLOTS, Session

IMAGE, VOCAB = 9, 9


class Context:
    """Stands in for the C context: knows what every cached token saw, computes logits from that."""

    def __init__(self) -> None:
        self.hparams = SimpleNamespace(image_token_id=IMAGE, vocab_size=VOCAB)
        self.n_ctx = 12
        self.epoch = 0
        self.cache: list[tuple[Any, ...]] = []
        self.slots: dict[int, list[float]] = {}
        self.decoded: list[list[int]] = []
        self.before_decode: Callable[[], None] = lambda: None
        self.after_decode: Callable[[], None] = lambda: None
        self._next_slot = 0

    @property
    def n_past(self) -> int:
        return len(self.cache)

    def image_fill(self, states: Sequence[npt.NDArray[np.float32]]) -> int:
        self._next_slot += 1
        self.slots[self._next_slot] = [float(s[0, 0, 0]) for s in states]
        return self._next_slot

    def image_free(self, slot: int) -> None:
        del self.slots[slot]

    def decode(
        self, tokens: Sequence[int], slot: int, n_visible: int, logits: str
    ) -> npt.NDArray[np.float32]:
        self.before_decode()
        seen = () if slot < 0 else tuple(self.slots[slot][:n_visible])
        assert len(seen) == n_visible
        rows = []
        for token in tokens:
            self.cache.append((token, *seen))
            rows.append(np.full(VOCAB, hash(tuple(self.cache)) % 1000003, np.float32))
        self.decoded.append(list(tokens))
        self.after_decode()
        wanted = {"none": [], "last": rows[-1:], "all": rows}[logits]
        return np.array(wanted, np.float32).reshape(-1, VOCAB)

    def truncate(self, n: int) -> None:
        assert n <= len(self.cache)
        del self.cache[n:]

    def clear(self) -> None:
        self.cache.clear()
        self.slots.clear()


class Made:
    def __init__(self) -> None:
        self.context = Context()
        callbacks: Any = SimpleNamespace(prompt_offset=0, prompt_total=0)
        self.session = Session(self.context, callbacks)  # type: ignore[arg-type]

    def feed(self, tokens: Sequence[int], *images: int, **options: Any) -> tuple[Any, int]:
        self.context.decoded.clear()
        return self.session.feed(tokens, [embedding(i) for i in images], **options)


def embedding(number: int) -> ImageEmbedding:
    return ImageEmbedding(np.full((1, 1, 1), number, np.float32), 1, key=f"picture {number}")


@pytest.fixture
def made() -> Made:
    return Made()


def fresh(tokens: Sequence[int], *images: int) -> float:
    """The last logit without any cache."""
    return float(Made().feed(tokens, *images)[0][-1, 0])


def test_a_second_question_computes_only_what_is_new(made: Made) -> None:
    made.feed([1, IMAGE, 2, 3], 7)
    logits, reused = made.feed([1, IMAGE, 2, 4, 5], 7)
    assert reused == 3
    assert made.context.decoded == [[4, 5]]
    assert logits[0, 0] == fresh([1, IMAGE, 2, 4, 5], 7)


def test_the_last_token_is_always_computed(made: Made) -> None:
    made.feed([1, 2, 3])
    logits, reused = made.feed([1, 2, 3])
    assert (reused, made.context.decoded) == (2, [[3]])
    assert logits[0, 0] == fresh([1, 2, 3])
    made.feed([1, 2])
    assert made.context.n_past == 2


def test_another_picture_is_not_reused(made: Made) -> None:
    made.feed([1, IMAGE, 2], 7)
    logits, reused = made.feed([1, IMAGE, 2], 8)
    assert (reused, made.context.decoded) == (1, [[IMAGE, 2]])
    assert logits[0, 0] == fresh([1, IMAGE, 2], 8)


def test_a_conversation_goes_on_where_it_was(made: Made) -> None:
    made.feed([1, IMAGE, 2], 7)
    made.session.step(5)
    made.session.step(6)
    logits, reused = made.feed([1, IMAGE, 2, 5, 6, 3], 7)
    assert (reused, made.context.decoded) == (5, [[3]])
    assert logits[0, 0] == fresh([1, IMAGE, 2, 5, 6, 3], 7)


def test_a_picture_that_joins_another_changes_the_group(made: Made) -> None:
    made.feed([1, IMAGE, 2], 7)
    logits, reused = made.feed([1, IMAGE, IMAGE, 2], 7, 8)
    assert reused == 2  # the first image token saw its picture alone, then as now
    assert logits[0, 0] == fresh([1, IMAGE, IMAGE, 2], 7, 8)


def test_steps_see_what_the_last_token_saw(made: Made) -> None:
    made.feed([IMAGE, 1, IMAGE, 2], 7, 8)
    made.session.step(3)
    assert made.context.cache[-2:] == [(2, 8.0), (3, 8.0)]
    made.feed([1])
    made.session.step(3)
    assert made.context.cache == [(1,), (3,)]


@pytest.mark.parametrize("seed", range(30))
def test_reuse_never_changes_the_logits(made: Made, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt: list[int] = [1]
    pictures: list[int] = []
    for _ in range(25):
        keep = int(rng.integers(0, len(prompt) + 1))
        prompt = prompt[:keep] + [int(t) for t in rng.choice([1, 2, IMAGE], rng.integers(1, 5))]
        prompt = prompt[:10]
        n = prompt.count(IMAGE)
        pictures = (pictures + [int(p) for p in rng.integers(0, 3, 10)])[:n]
        if rng.random() < 0.3 and n:
            pictures[int(rng.integers(0, n))] = int(rng.integers(0, 3))
        logits, _ = made.feed(prompt, *pictures)
        assert logits[-1, 0] == fresh(prompt, *pictures)
        if rng.random() < 0.5:
            made.session.step(2)
        assert len(made.context.slots) <= MAX_SLOTS


def test_few_slots_are_kept_however_many_pictures(made: Made) -> None:
    prompt = [t for _ in range(6) for t in (IMAGE, 1)]
    logits, _ = made.feed(prompt, 0, 1, 2, 3, 4, 5)
    assert len(made.context.slots) == MAX_SLOTS
    assert [row[1:] for row in made.context.cache] == [(float(i),) for i in range(6) for _ in range(2)]
    assert logits[0, 0] == fresh(prompt, 0, 1, 2, 3, 4, 5)


def test_all_logits_are_computed_anew(made: Made) -> None:
    made.feed([1, IMAGE, 2], 7)
    logits, reused = made.feed([1, IMAGE, 2], 7, logits="all")
    assert (reused, logits.shape) == (0, (3, VOCAB))
    assert made.context.decoded == [[1], [IMAGE, 2]]


def test_a_prompt_that_does_not_fit(made: Made) -> None:
    made.feed([1, 2])
    with pytest.raises(ContextFullError, match="13 tokens, but n_ctx is 12"):
        made.feed([1] * 13)
    assert made.context.n_past == 2
    made.feed([1] * 12)


def test_pictures_must_match_their_tokens(made: Made) -> None:
    for tokens, images in (([1, IMAGE], []), ([1], [7]), ([], [])):
        with pytest.raises(RequestError):
            made.feed(tokens, *images)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before_decode", "after_decode"])
def test_an_interruption_leaves_good_caches(made: Made, when: str) -> None:
    """Also one that strikes when C is done and Python has not heard of it."""
    made.feed([1, IMAGE, 2], 7)
    setattr(made.context, when, interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.feed([1, IMAGE, 3, IMAGE, 4], 7, 8)
    with pytest.raises(KeyboardInterrupt):
        made.session.step(5)
    setattr(made.context, when, lambda: None)
    logits, _ = made.feed([1, IMAGE, 3, 4, 5], 7)
    assert logits[0, 0] == fresh([1, IMAGE, 3, 4, 5], 7)


def test_clear(made: Made) -> None:
    made.feed([1, IMAGE, 2], 7)
    made.session.clear()
    assert (made.session.n_past, made.context.cache, made.context.slots) == (0, [], {})
    assert made.feed([1, IMAGE, 2], 7)[1] == 0


def test_lost_caches_are_not_counted_on(made: Made) -> None:
    made.feed([1, IMAGE, 2], 7)
    made.context.cache, made.context.slots, made.context.epoch = [], {}, 1  # another process, empty
    with pytest.raises(BackendError, match="caches were lost"):
        made.session.step(3)
    assert made.feed([1, IMAGE, 2], 7)[1] == 0
    assert len(made.context.slots) == 1
