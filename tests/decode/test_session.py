"""The caches' bookkeeping, over a context that only writes down what it is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mllama_gguf.cache.disk import ImageCache
from mllama_gguf.decode.session import Session
from mllama_gguf.decode.slots import MAX_SLOTS, Slots
from mllama_gguf.errors import BackendError, ContextFullError, RequestError
from mllama_gguf.vision.embedding import Encoding

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
        self.before_set: Callable[[], None] = lambda: None
        self._next_slot = 0

    @property
    def n_past(self) -> int:
        return len(self.cache)

    def image_fill(self, states: Sequence[npt.NDArray[np.float32] | int]) -> int:
        self._next_slot += 1
        self.slots[self._next_slot] = [np.nan if isinstance(s, int) else float(s[0, 0, 0]) for s in states]
        return self._next_slot

    def image_mapped_size(self, n_tiles: int) -> int:
        return 0  # see cache/test_image_kv

    def image_size(self, slot: int, image: int) -> int:
        assert image < len(self.slots[slot])
        return 8

    def image_get(self, slot: int, image: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.array(self.slots[slot][image]).reshape(1).view(np.uint8)[offset : offset + n_bytes]

    def image_set(self, slot: int, image: int, offset: int, data: npt.NDArray[np.uint8]) -> None:
        self.before_set()
        assert (offset, data.nbytes) == (0, 8)
        self.slots[slot][image] = float(data.view(np.float64)[0])

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
    def __init__(self, disk: ImageCache | None = None) -> None:
        self.context = Context()
        callbacks: Any = SimpleNamespace(prompt_offset=0, prompt_total=0, on_abort=lambda: False)
        slots = Slots(self.context, callbacks, disk)  # type: ignore[arg-type]
        self.session = Session(self.context, callbacks, slots, disk)  # type: ignore[arg-type]
        self.computed: list[int] = []  # images whose states were needed

    def feed(self, tokens: Sequence[int], *images: int, **options: Any) -> tuple[Any, int]:
        self.context.decoded.clear()
        return self.session.feed(tokens, [self.encoding(i) for i in images], **options)

    def encoding(self, number: int) -> Encoding:
        def states() -> npt.NDArray[np.float32]:
            self.computed.append(number)
            return np.full((1, 1, 1), number, np.float32)

        return Encoding(f"image {number}", 1, states, f"{number:064x}")


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


def test_another_image_is_not_reused(made: Made) -> None:
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


def test_an_image_that_joins_another_changes_the_group(made: Made) -> None:
    made.feed([1, IMAGE, 2], 7)
    logits, reused = made.feed([1, IMAGE, IMAGE, 2], 7, 8)
    assert reused == 2  # the first image token saw its image alone, then as now
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
    images: list[int] = []
    for _ in range(25):
        keep = int(rng.integers(0, len(prompt) + 1))
        prompt = prompt[:keep] + [int(t) for t in rng.choice([1, 2, IMAGE], rng.integers(1, 5))]
        prompt = prompt[:10]
        n = prompt.count(IMAGE)
        images = (images + [int(p) for p in rng.integers(0, 3, 10)])[:n]
        if rng.random() < 0.3 and n:
            images[int(rng.integers(0, n))] = int(rng.integers(0, 3))
        logits, _ = made.feed(prompt, *images)
        assert logits[-1, 0] == fresh(prompt, *images)
        if rng.random() < 0.5:
            made.session.step(2)
        assert len(made.context.slots) <= MAX_SLOTS


def test_few_slots_are_kept_however_many_images(made: Made) -> None:
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


def test_images_must_match_their_tokens(made: Made) -> None:
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


# ---- image_kv on disk --------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path, 10**6)


def test_what_one_session_filled_another_copies(disk: ImageCache) -> None:
    prompt = [1, IMAGE, IMAGE, 2, IMAGE, 3]
    first, second = Made(disk), Made(disk)
    expected = first.feed(prompt, 7, 8, 8)[0]
    assert not disk.info().n_image_kv  # not before the reply has begun
    first.session.save()
    assert disk.info().n_image_kv == 2
    assert np.array_equal(second.feed(prompt, 7, 8, 8)[0], expected)
    second.feed([IMAGE, IMAGE, 1], 9, 7)  # one of a group
    assert (first.computed, second.computed) == ([7, 8, 8], [9])
    assert second.context.cache == [(IMAGE, 9.0), (IMAGE, 9.0, 7.0), (1, 9.0, 7.0)]


@pytest.mark.parametrize("then", ["feed", "clear", "more images than slots"])
def test_what_is_not_saved_yet_is_saved_before_it_goes(disk: ImageCache, then: str) -> None:
    made = Made(disk)
    if then == "more images than slots":
        made.feed([IMAGE, 1] * (MAX_SLOTS + 1), *range(MAX_SLOTS + 1))
        assert disk.info().n_image_kv == MAX_SLOTS
        return
    made.feed([IMAGE, 1], 7)
    if then == "feed":
        made.feed([1])
    else:
        made.session.clear()
    assert disk.info().n_image_kv == 1


def test_a_damaged_image_kv_is_made_again(disk: ImageCache) -> None:
    first = Made(disk)
    first.feed([IMAGE, IMAGE, 1], 7, 8)
    first.session.save()
    path = disk.directory / f"{8:064x}.image_kv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + b"?" + whole[-4:])
    second = Made(disk)
    second.feed([IMAGE, IMAGE, 1], 7, 8)
    assert second.computed == [8]
    assert second.context.cache[-1] == (1, 7.0, 8.0)
    assert len(second.context.slots) == 1
    assert not path.exists()
    second.session.save()
    assert path.read_bytes() == whole


def test_an_interrupted_copy_leaves_no_slot(disk: ImageCache) -> None:
    first, second = Made(disk), Made(disk)
    first.feed([IMAGE, 1], 7)
    first.session.save()
    second.context.before_set = interrupt
    for _ in range(MAX_SLOTS + 2):
        with pytest.raises(KeyboardInterrupt):
            second.feed([IMAGE, 1], 7)
        assert len(second.context.slots) == 1
    second.context.before_set = lambda: None
    second.feed([IMAGE, 1], 7)
    assert list(second.context.slots.values()) == [[7.0]]


def test_lost_caches_are_not_saved(disk: ImageCache) -> None:
    made = Made(disk)
    made.feed([1, IMAGE, 2], 7)
    made.context.cache, made.context.slots, made.context.epoch = [], {}, 1
    made.session.save()
    assert not disk.info().n_image_kv
