"""The life of an image slot: filling, unverified, ready, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mllama_gguf.cache.disk import ImageCache
from mllama_gguf.decode.slots import MAX_SLOTS, Slots
from mllama_gguf.errors import Aborted
from mllama_gguf.vision.embedding import Encoding

N_BYTES = 8


class Context:
    """Stands in for the C context: a slot holds one number for each image, and may have a file's."""

    def __init__(self) -> None:
        self.slots: dict[int, list[float]] = {}
        self.mapped = 0
        self.fail: BaseException | None = None  # raised by the next image_set
        self._number = 0

    def image_fill(self, states: Any) -> int:
        self._number += 1
        self.slots[self._number] = [np.nan if isinstance(s, int) else float(s[0, 0, 0]) for s in states]
        return self._number

    def image_mapped_size(self, n_tiles: int) -> int:
        return N_BYTES

    def image_map(self, n_tiles: int, path: Path, offset: int) -> int:
        self._number += 1
        self.mapped += 1
        data = path.read_bytes()[offset : offset + N_BYTES]
        self.slots[self._number] = [float(np.frombuffer(data)[0])]
        return self._number

    def image_free(self, slot: int) -> None:
        del self.slots[slot]

    def image_size(self, slot: int, image: int) -> int:
        return N_BYTES

    def image_get(self, slot: int, image: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.array([self.slots[slot][image]]).view(np.uint8)[offset : offset + n_bytes]

    def image_set(self, slot: int, image: int, offset: int, data: npt.NDArray[np.uint8]) -> None:
        if self.fail is not None:
            raise self.fail
        self.slots[slot][image] = float(data.view(np.float64)[0])


class Made:
    def __init__(self, disk: ImageCache | None = None) -> None:
        self.context = Context()
        self.stop = False
        callbacks: Any = SimpleNamespace(on_abort=lambda: self.stop)
        self.slots = Slots(self.context, callbacks, disk)  # type: ignore[arg-type]

    def acquire(self, *numbers: int) -> Any:
        return self.slots.acquire([image(number) for number in numbers])


def image(number: int) -> Encoding:
    return Encoding(f"image {number}", 1, lambda: np.full((1, 1, 1), number, np.float32), f"{number:064x}")


@pytest.fixture
def disk(tmp_path: Path) -> ImageCache:
    """A cache that has the image_kv of image 7."""
    cache = ImageCache(tmp_path, 10**6)
    made = Made(cache)
    made.acquire(7)
    made.slots.save()
    return cache


def entry(disk: ImageCache, number: int) -> Path:
    return disk.image_kv_place(f"{number:064x}")[0]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the checksum
    path.write_bytes(data)


def test_a_filled_slot_is_ready() -> None:
    made = Made()
    slot = made.acquire(1, 2)
    assert (slot.state, slot.group, len(made.slots)) == ("ready", ("image 1", "image 2"), 1)
    assert made.context.slots[slot.number] == [1.0, 2.0]
    assert made.slots.verify(slot)
    assert made.acquire(1, 2) is slot
    assert made.acquire(2, 1) is not slot


def test_a_mapped_slot_is_unverified_until_its_file_is_read(disk: ImageCache) -> None:
    made = Made(disk)
    slot = made.acquire(7)
    assert (slot.state, len(made.slots), made.context.mapped) == ("unverified", 0, 1)
    assert made.slots.verify(slot)
    assert (slot.state, len(made.slots)) == ("ready", 1)
    assert not made.slots.has_unsaved
    assert made.acquire(7) is slot


def test_a_damaged_file_ends_its_slot_and_itself(disk: ImageCache) -> None:
    made = Made(disk)
    damage(entry(disk, 7))
    slot = made.acquire(7)
    assert not made.slots.verify(slot)
    assert (made.context.slots, len(made.slots)) == ({}, 0)
    assert not entry(disk, 7).exists()
    again = made.acquire(7)
    assert again.state == "ready"
    assert made.slots.has_unsaved
    made.slots.save()
    assert entry(disk, 7).exists()


def test_an_abort_while_waiting_for_the_check(disk: ImageCache) -> None:
    made = Made(disk)
    slot = made.acquire(7)
    made.stop = True
    with pytest.raises(Aborted):
        made.slots.verify(slot)
    made.stop = False
    assert len(made.context.slots) == 1
    assert made.acquire(7) is not slot  # the unverified one was given back
    assert len(made.context.slots) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Aborted("stopped")])
def test_a_failed_copy_leaves_one_slot_that_the_next_one_frees(
    disk: ImageCache, error: BaseException
) -> None:
    made = Made(disk)
    made.context.fail = error
    for _ in range(MAX_SLOTS + 1):
        with pytest.raises(type(error)):
            made.acquire(7, 8)
        assert (len(made.context.slots), len(made.slots)) == (1, 0)
    made.context.fail = None
    slot = made.acquire(7, 8)
    assert made.context.slots == {slot.number: [7.0, 8.0]}


def test_what_was_copied_is_not_saved_again(disk: ImageCache) -> None:
    made = Made(disk)
    slot = made.acquire(7, 8)
    assert [key for _, key in slot.unsaved] == [f"{8:064x}"]
    made.slots.save()
    assert entry(disk, 8).exists()
    assert not made.slots.has_unsaved


def test_the_slot_used_longest_ago_goes_first(tmp_path: Path) -> None:
    disk = ImageCache(tmp_path, 10**6)
    made = Made(disk)
    for number in range(MAX_SLOTS):
        made.slots.release(made.acquire(number))
    made.slots.release(made.acquire(0))
    made.slots.release(made.acquire(MAX_SLOTS))
    assert {numbers[0] for numbers in made.context.slots.values()} == {0.0, 2.0, 3.0, 4.0}
    assert entry(disk, 1).exists()  # before it went
    made.slots.forget(0)
    assert not made.slots.has_unsaved
    assert len(made.slots) == 0


def test_a_slot_that_somebody_looks_at_stays() -> None:
    made = Made()
    used = made.acquire(0)
    for number in range(1, 3 * MAX_SLOTS):
        made.slots.release(made.acquire(number))
    assert used.number in made.context.slots and len(made.slots) == MAX_SLOTS
    kept = [made.acquire(number) for number in range(20, 21 + MAX_SLOTS)]
    assert {slot.number for slot in kept} <= set(made.context.slots)  # more than there should be


def test_shared_slots_are_forgotten_with_their_process_only(disk: ImageCache) -> None:
    made = Made(disk)
    callbacks: Any = SimpleNamespace(on_abort=lambda: made.stop)
    slots = Slots(made.context, callbacks, disk, shared=True)  # type: ignore[arg-type]
    assert slots.acquire([image(7)]).state == "ready"  # verified before anybody sees it
    slots.forget(0)
    assert len(slots) == 1
    slots.forget(1)
    assert len(slots) == 0


def test_a_session_asks_until_a_slot_is_right(disk: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes the file again as soon as it is removed: damaged, and damaged again."""
    from mllama_gguf.decode.session import Session

    made = Made(disk)
    context: Any = made.context
    decoded: list[int] = []
    context.hparams = SimpleNamespace(image_token_id=9, vocab_size=9)
    context.n_ctx, context.n_past, context.epoch = 12, 0, 0
    context.truncate = lambda n: None

    def decode(tokens: Any, slot: int, n_visible: int, logits: str) -> npt.NDArray[np.float32]:
        assert slot in context.slots
        decoded.append(slot)
        return np.zeros((1, 9), np.float32)

    context.decode = decode
    whole = entry(disk, 7).read_bytes()
    damage(entry(disk, 7))
    broken, times = entry(disk, 7).read_bytes(), 0
    drop: Callable[..., None] = disk._drop

    def dropped(path: Path, *args: Any) -> None:
        nonlocal times
        drop(path, *args)
        times += 1
        path.write_bytes(broken if times < 3 else whole)

    monkeypatch.setattr(disk, "_drop", dropped)
    session = Session(context, SimpleNamespace(on_abort=lambda: False), made.slots)  # type: ignore[arg-type]
    session.feed([9], [image(7)])
    assert (times, len(decoded), made.context.mapped) == (3, 4, 4)
    assert session._slot is not None
    assert session._slot.state == "ready"
