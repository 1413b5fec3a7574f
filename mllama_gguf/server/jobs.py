"""Requests on their way to the engine and back: the job, its answers, and the queue that is fair to all
clients."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from ..decode.conversation import Conversation
from ..decode.writer import Stats
from ..loaded import LoadedModel
from ..text.logprobs import TokenLogprob
from ..vision.embedding import ImageEmbedding
from ..vision.preprocess import TiledImage
from .catalog import Card
from .problems import Refused


class Piece(NamedTuple):  # there is one for each token, and a dataclass takes longer
    """Text of a reply. choice: which of several; logprobs: of its tokens."""

    text: str
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A reply's end.

    sources: where the images of the prompt came from, for the first of several replies
    context: prompt and reply for /api/generate, where they were asked for
    """

    stats: Stats
    choice: int = 0
    sources: tuple[str, ...] = ()
    context: tuple[int, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of all replies. seconds: in the queue and for loading, and in all."""

    load_seconds: float
    total_seconds: float


Event: TypeAlias = "Piece | Ended | Done | Refused"


class Mailbox:
    """What the engine's threads tell the event loop. A reader who is busy gets all that came meanwhile.

    Every wake-up of the event loop takes time from the model, so there is none that the reader does not want.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, whole: bool) -> None:
        """whole: the reader wants nothing before the end."""
        self._loop = loop
        self._whole = whole
        self._items: deque[Event] = deque()
        self._has_ended = False
        self._wants_any = False  # the reader waits for the next thing, and not only for the end
        self._waiter: asyncio.Future[bool] | None = None  # of the reader; the result: not too late

    def put(self, item: Event) -> None:
        """From the thread that computes."""
        self._items.append(item)
        if isinstance(item, (Done, Refused)):
            self._has_ended = True
        elif not self._wants_any:
            return
        self._wants_any = False
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self, in_time: bool = True) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(in_time)

    async def gather(self, seconds: float) -> None:
        """Let things come for so long, or up to the end."""
        if not self._has_ended:
            await self._wait(seconds)

    async def take(self, seconds: float | None) -> list[Event]:
        """What has come, up to the end if the reader wants nothing before; [] if nothing came for so long."""
        while True:
            # The thread adds first and looks then; here it is the other way round, so that nothing is missed.
            self._wants_any = not self._whole
            if (self._has_ended if self._whole else self._items) or not await self._wait(seconds):
                break
        self._wants_any = self._has_ended = False
        return [self._items.popleft() for _ in range(len(self._items))]

    async def _wait(self, seconds: float | None) -> bool:
        """Wait for `_wake`; False: it did not come for so many seconds. `asyncio.wait_for` makes a task."""
        self._waiter = self._loop.create_future()
        timer = None if seconds is None else self._loop.call_later(seconds, self._wake, False)
        try:
            return await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()


class Usable(Protocol):
    """A model and a conversation with it, for one job."""

    @property
    def model(self) -> LoadedModel: ...

    @property
    def conversation(self) -> Conversation: ...

    @property
    def context_length(self) -> int: ...

    def choose(self, tokens: Sequence[int], images: Sequence[TiledImage | ImageEmbedding]) -> None:
        """The conversation that serves this prompt best takes the place of the one before."""


@dataclass(eq=False)
class Job:
    """A request that a model answers.

    work:    run in the engine's thread, or in one of its own; gives Pieces and Endeds
    keep_alive: seconds that the model stays afterwards; None: as the job before said, or the server
    n_bytes: of its images and texts
    ahead:   run in another thread while the job waits for its place; None: there is nothing to do
    encoded: keys of the states that were computed so
    """

    card: Card
    client: str
    work: Callable[[Usable, Job], Generator[Event, None, None]]
    mailbox: Mailbox
    keep_alive: float | None = None
    n_bytes: int = 0
    time_limit: float = 0.0
    ahead: Callable[[Usable, Job], None] | None = None
    encoded: set[str] = field(default_factory=set)
    created: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    reason: str = "client"

    @property
    def is_late(self) -> bool:
        """Whether its time limit is over."""
        return self.time_limit > 0 and time.monotonic() - self.created > self.time_limit

    @property
    def should_stop(self) -> bool:
        """Whether nobody waits for it any more. Asked for each token."""
        return self.is_cancelled or (self.time_limit > 0 and self.is_late)

    @property
    def lateness(self) -> Refused:
        """The answer to one that is late."""
        return Refused(504, f"not done within {self.time_limit:g} s", "time_limit")

    def cancel(self, reason: str) -> None:
        """Stop it, from any thread."""
        if not self.is_cancelled:
            self.reason = reason
            self.is_cancelled = True


class FairQueue:
    """Jobs by client: one of each client in turn, those of one client in their order. Not thread-safe."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[Job]:
        for jobs in self._by_client.values():
            yield from jobs

    @property
    def n_bytes(self) -> int:
        """Bytes of the images and texts of all jobs that wait."""
        return sum(job.n_bytes for job in self)

    def add(self, job: Job) -> None:
        """Let a job wait."""
        self._by_client.setdefault(job.client, deque()).append(job)

    def take(self, may_begin: Callable[[Job], bool] = lambda job: True) -> Job | None:
        """The next one that may begin; None if there is none. A client's second job waits for its first."""
        client = next((name for name, jobs in self._by_client.items() if may_begin(jobs[0])), None)
        if client is None:
            return None
        jobs = self._by_client.pop(client)
        job = jobs.popleft()
        if jobs:
            self._by_client[client] = jobs  # behind all others
        return job

    def first(self) -> Job | None:
        """The one whose turn is next."""
        return next((jobs[0] for jobs in self._by_client.values()), None)

    def remove(self, job: Job) -> bool:
        """Take one out of its place; whether it was there."""
        jobs = self._by_client.get(job.client)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._by_client[job.client]
        return True
