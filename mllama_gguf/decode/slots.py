"""The image slots of a context: which images are in them, found on disk or filled, checked, and given back.

A slot holds the keys and values of cross-attention for a group of images that stand directly side by side.
The life of a slot:

    filling --> ready               its images are computed, or copied from disk
    unverified --> ready            it has the memory of a file, whose checksum is computed in a thread
    meanwhile filling, unverified --> freed   after an error or an abort, or if the checksum does not fit
    ready --> freed                 when room is needed: the one that was used longest ago
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..backend.base import ImageSlots
from ..backend.callbacks import Callbacks
from ..backend.types import Bytes
from ..cache.disk import ImageCache
from ..cache.entries import PIECE
from ..errors import Aborted, ImageError, ModelError, RequestError
from ..handles import OneProcess
from ..vision.embedding import Encoding
from ..waiting import POLL_SECONDS, acquire

# Slots that are kept. The current one is enough to continue; the others make a return to a recent image
# cheap. One tile of the 11B model takes 79 MB on the CPU.
MAX_SLOTS = 4

Group: TypeAlias = "tuple[str, ...]"  # the keys of a group's images


@dataclass
class Slot:
    """One slot.

    number:  what C calls it
    state:   see the head of this file
    check:   of an unverified slot: whether its file is as it was written
    users:   sessions whose last token saw it; it is not freed to make room
    unsaved: for each of its images that is to be kept on disk, its place in the group and its image_kv key
    """

    group: Group
    number: int
    state: Literal["filling", "unverified", "ready"]
    check: Future[bool] | None = None
    users: int = 0
    unsaved: list[tuple[int, str]] = field(default_factory=list)


class Slots(OneProcess):
    """The slots of one context. Safe from several threads if they are shared."""

    def __init__(
        self, context: ImageSlots, callbacks: Callbacks, disk: ImageCache | None, *, shared: bool = False
    ) -> None:
        """disk: where image_kv is found and kept; None: nowhere.
        shared: several sessions use them; a slot is then never unverified outside of `acquire`."""
        self._context = context
        self._callbacks = callbacks
        self._disk = disk
        self._ready: OrderedDict[Group, Slot] = OrderedDict()  # the last used one is last
        self._unfinished: Slot | None = None  # filling or unverified
        self._shared = shared
        self._lock = threading.RLock()  # of all that is here, and of the work on it
        self._stop: Callable[[], bool] = callbacks.on_abort  # of the thread that has the lock
        self._epoch = 0  # of the context, as a session has seen it

    def __len__(self) -> int:
        """How many slots are ready."""
        return len(self._ready)

    @property
    def has_unsaved(self) -> bool:
        """Whether there is something for `save`."""
        with self._lock:
            return any(slot.unsaved for slot in self._ready.values())

    def should_stop(self) -> bool:
        """Whether what computes for a slot is to stop."""
        return self._stop()

    @contextmanager
    def _locked(self, stop: Callable[[], bool] | None) -> Iterator[None]:
        """stop: asked while it takes long; None: the context's own callback."""
        acquire(self._lock, stop or bool, "waiting for an image was stopped")
        before, self._stop = self._stop, stop or self._callbacks.on_abort
        try:
            yield
        finally:
            self._stop = before
            self._lock.release()

    def acquire(self, images: Sequence[Encoding], stop: Callable[[], bool] | None = None) -> Slot:
        """A slot with these images, ready or unverified, for one user more (see `release`). If it is
        unverified, what is computed with it counts only after `verify`. stop: asked while it takes long.
        Raises BackendError, Aborted."""
        with self._locked(stop):
            slot = self._find(images)
            while self._shared and not self.verify(slot):
                slot = self._find(images)
            slot.users += 1
            return slot

    def release(self, slot: Slot) -> None:
        """One user of a slot less."""
        with self._lock:
            slot.users -= 1

    def _find(self, images: Sequence[Encoding]) -> Slot:
        group = tuple(image.key for image in images)
        if group in self._ready:
            self._ready.move_to_end(group)
            return self._ready[group]
        self._free_unfinished()
        while len(self._ready) >= MAX_SLOTS and self._evict():
            pass
        return self._map(group, images) or self._fill(group, images)

    def verify(self, slot: Slot) -> bool:
        """Wait for the check of an unverified slot, which then has read its file to the end. False: the
        slot and the file are gone. Raises Aborted."""
        if slot.check is None:
            return True
        self._check_abort()
        while not wait([slot.check], timeout=POLL_SECONDS).done:
            self._check_abort()
        if not slot.check.result():
            self._free_unfinished()
            return False
        slot.check = None
        self._finish(slot)
        return True

    def save(self, stop: Callable[[], bool] | None = None) -> None:
        """Keep on disk what was filled. Raises BackendError, Aborted; what is lost then is only time."""
        with self._locked(stop):
            self._save()

    def _save(self) -> None:
        for slot in self._ready.values():
            while slot.unsaved and self._disk is not None:
                image, key = slot.unsaved.pop()
                if not self._disk.has_kv(key):  # by another process, or the same image beside itself
                    n_bytes = self._context.image_size(slot.number, image)
                    self._disk.add_kv(key, n_bytes, self._pieces(slot, image, n_bytes))

    def forget(self, epoch: int) -> None:
        """A session forgets all images. Shared slots stay, unless the context has lost them: epoch is then
        another one."""
        with self._lock:
            if self._shared and epoch == self._epoch:
                return
            self._epoch = epoch
            self._ready.clear()
            self._unfinished = None

    def _evict(self) -> bool:
        """Free the slot that was used longest ago, of those that have no user. False: all have."""
        oldest = next((slot for slot in self._ready.values() if not slot.users), None)
        if oldest is None:
            return False
        self._save()
        del self._ready[oldest.group]
        self._context.image_free(oldest.number)
        return True

    def _finish(self, slot: Slot) -> None:
        slot.state = "ready"
        self._unfinished = None
        self._ready[slot.group] = slot

    def _free_unfinished(self) -> None:
        slot, self._unfinished = self._unfinished, None
        if slot is not None:
            self._context.image_free(slot.number)

    def _fill(self, group: Group, images: Sequence[Encoding]) -> Slot:
        """A new slot with these images: copied from disk, or else computed from states."""
        on_disk = {i for i, image in enumerate(images) if self._is_on_disk(image)}
        while True:
            number = self._context.image_fill(
                [image.n_tiles if i in on_disk else image.states() for i, image in enumerate(images)]
            )
            slot = self._unfinished = Slot(group, number, "filling")
            damaged = next((i for i in sorted(on_disk) if not self._copy(slot, i, images[i])), None)
            if damaged is None:
                break
            on_disk.remove(damaged)
            self._free_unfinished()
        if self._disk is not None:
            slot.unsaved = [
                (i, image.image_kv_key)
                for i, image in enumerate(images)
                if image.image_kv_key and i not in on_disk
            ]
        self._finish(slot)
        return slot

    def _map(self, group: Group, images: Sequence[Encoding]) -> Slot | None:
        """A new, unverified slot with the memory of an image's file; None if that cannot be."""
        if self._disk is None or len(images) > 1 or not self._is_on_disk(images[0]):
            return None
        (image,) = images
        n_bytes = self._context.image_mapped_size(image.n_tiles)
        if not n_bytes:
            return None
        try:
            number = self._context.image_map(image.n_tiles, *self._disk.image_kv_place(image.image_kv_key))
        except (ModelError, RequestError):  # gone meanwhile, or not as long as it must be
            return None
        slot = self._unfinished = Slot(group, number, "unverified")
        reader = ThreadPoolExecutor(1, "mllama-check")
        slot.check = reader.submit(self._disk.is_intact, image.image_kv_key, n_bytes)
        reader.shutdown(wait=False)
        return slot

    def _is_on_disk(self, image: Encoding) -> bool:
        return self._disk is not None and image.image_kv_key != "" and self._disk.has_kv(image.image_kv_key)

    def _copy(self, slot: Slot, place: int, image: Encoding) -> bool:
        """Put an image from disk into its place in a slot; whether that went well."""
        assert self._disk is not None
        offset = 0
        try:
            for piece in self._disk.read_kv(image.image_kv_key, self._context.image_size(slot.number, place)):
                self._check_abort()
                self._context.image_set(slot.number, place, offset, piece)
                offset += piece.nbytes
        except ImageError:
            return False
        return True

    def _pieces(self, slot: Slot, image: int, n_bytes: int) -> Iterator[Bytes]:
        for offset in range(0, n_bytes, PIECE):
            self._check_abort()
            yield self._context.image_get(slot.number, image, offset, min(PIECE, n_bytes - offset))

    def _check_abort(self) -> None:
        if self._stop():
            raise Aborted("copying an image was stopped")
