"""Images on their way to the loop that captions them: read and cut into tiles by threads, then encoded by
another, each a few images ahead of the loop."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from ..cpus import usable_cpus
from ..errors import Aborted, BackendError, OutOfMemoryError
from ..vision.embedding import ImageEmbedding
from ..vision.encoder import ImageEncoder
from ..vision.preprocess import TiledImage
from .captions import too_late

T = TypeVar("T")
R = TypeVar("R")

THREADS = min(4, usable_cpus())
NICE = 10
# Images that wait decoded: enough that the loop need not wait for one large image among small ones. One takes
# up to 15 MB.
AHEAD = 8
# Images that wait encoded. One takes up to 105 MB with the 11B model.
ENCODED_AHEAD = 2


@dataclass(frozen=True)
class Prepared:
    """An image for the loop.

    image:   None: its content has a caption already
    encoded: when its states were computed ahead, from and to, as `time.perf_counter` counts
    """

    sha256: str
    image: TiledImage | ImageEmbedding | None
    encoded: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """How long encoding ahead took."""
        return self.encoded[1] - self.encoded[0] if self.encoded is not None else 0.0


Coming: TypeAlias = "tuple[str, Future[Prepared]]"


def images_ahead(
    paths: Iterable[str], prepare: Callable[[str], Prepared], encode: Callable[[Coming], Prepared] | None
) -> Generator[Coming, None, None]:
    """The images in order, each with the future of its result: `prepare` works in several threads, `encode`
    in one, in order (None: the loop encodes)."""
    with closing(prefetch(paths, prepare, "mllama-decode", THREADS, AHEAD, NICE)) as prepared:
        if encode is None:
            yield from prepared
            return
        with closing(prefetch(prepared, encode, "mllama-encode", 1, ENCODED_AHEAD)) as encoded:
            for (path, _), future in encoded:
                yield path, future


class EncodeAhead:
    """Encodes images ahead, in a thread: each content once. The loop encodes those that it leaves as tiles.

    captioned: contents, as sha256, that need no states any more; may grow meanwhile
    time_limit: most seconds for one image
    """

    def __init__(
        self, encoder: ImageEncoder, captioned: Container[str], time_limit: float | None = None
    ) -> None:
        self.encoder = encoder  # the loop puts another here once it has opened its model again
        self._captioned = captioned
        self._time_limit = time_limit
        self._begun: set[str] = set()

    def __call__(self, coming: Coming) -> Prepared:
        """A prepared image, encoded. Raises what its preparation raises, and the encoding."""
        prepared = coming[1].result()
        encoder, tiles, sha256 = self.encoder, prepared.image, prepared.sha256
        if not isinstance(tiles, TiledImage) or sha256 in self._captioned or sha256 in self._begun:
            return prepared
        self._begun.add(sha256)
        start = time.perf_counter()
        try:
            if not encoder.needs(tiles):
                return prepared
            embedding = encoder.encode(tiles, lambda: self._is_late(start))
        except Aborted as e:
            if encoder.stopped:
                return prepared
            if self._time_limit is not None and self._is_late(start):
                self._begun.discard(sha256)
                raise too_late(self._time_limit) from e
            raise
        except (MemoryError, OutOfMemoryError):  # there may be enough for one computation at a time
            return prepared
        except BackendError:
            encoder.stop()  # the next one would fail as well, before the loop has opened its model again
            raise
        return Prepared(sha256, embedding, (start, time.perf_counter()))

    def _is_late(self, start: float) -> bool:
        return self._time_limit is not None and time.perf_counter() - start > self._time_limit


class _Job(Generic[T, R]):
    def __init__(self, item: T) -> None:
        self.item = item
        self.future: Future[R] = Future()

    def do(self, work: Callable[[T], R]) -> None:
        """Settle the future, unless nobody waits for it any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = work(self.item)
        except BaseException as e:
            self.future.set_exception(e)
        else:
            self.future.set_result(result)


def prefetch(
    items: Iterable[T], work: Callable[[T], R], name: str, threads: int, ahead: int, nice: int = 0
) -> Generator[tuple[T, Future[R]], None, None]:
    """The items in order, each with the future of its work, which threads do for `ahead` items in advance.

    name, nice: of the threads, and how much lower their priority is

    The threads are daemons: nobody waits for them at exit, however large the image that they decode.
    """
    jobs: SimpleQueue[_Job[T, R] | None] = SimpleQueue()

    def serve() -> None:
        if nice and sys.platform == "linux":  # where a thread has a priority: the model's threads go first
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        while (job := jobs.get()) is not None:
            job.do(work)
            del job  # and the image in it, while the next one is waited for

    for _ in range(threads):
        threading.Thread(target=serve, name=name, daemon=True).start()
    waiting: deque[_Job[T, R]] = deque()
    try:
        for item in items:
            waiting.append(_Job(item))
            jobs.put(waiting[-1])
            if len(waiting) > ahead:
                job = waiting.popleft()
                yield job.item, job.future
        while waiting:
            job = waiting.popleft()
            yield job.item, job.future
    finally:
        for job in waiting:
            job.future.cancel()
        for _ in range(threads):
            jobs.put(None)
