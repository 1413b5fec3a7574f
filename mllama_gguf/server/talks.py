"""The conversations of one model that compute together: which request has which.

A request takes any that is free. Once its prompt is known, it changes to the one whose caches hold most of
it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..decode.conversation import Conversation
from ..loaded import LoadedModel
from ..vision.embedding import ImageEmbedding
from ..vision.preprocess import TiledImage
from .jobs import Job

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Talk:
    """job: that has it now; used: when it was given back, as time.monotonic counts."""

    job: Job | None = None
    used: float = 0.0
    opened: Conversation | None = None

    @property
    def conversation(self) -> Conversation:
        assert self.opened is not None
        return self.opened

    @property
    def should_stop(self) -> bool:
        """Asked in the threads of others too."""
        job = self.job
        return job is not None and job.should_stop


class Talks:
    """Up to `most` conversations of a model. Safe from several threads."""

    def __init__(self, model: LoadedModel, most: int) -> None:
        """Raises BackendError. first: one that is there from the start."""
        self.model = model
        self.most = most
        self.scheduler = model.scheduler()
        self._lock = threading.Lock()  # of what follows
        self._n = 0  # open, or being opened
        self._ahead: threading.Thread | None = None
        self._ahead_talk: _Talk | None = None
        self._is_ahead = False  # it works
        self._is_closing = False
        self._idle = [self._open(None)]
        self.first = self._idle[0].conversation

    def lend(self, job: Job) -> Lent:
        """A conversation for a job, of which there are no more than `most`. Raises BackendError, Aborted."""
        with self._lock:
            talk = min(self._idle, key=lambda one: one.conversation.session.n_past, default=None)
            if talk is not None:
                self._idle.remove(talk)
                talk.job = job
                return Lent(self, talk)
        return Lent(self, self._open(job))

    def better(self, talk: _Talk, tokens: Sequence[int], image_keys: Sequence[str]) -> _Talk:
        """The best one for a prompt, in place of `talk`. Raises BackendError, Aborted."""
        job = talk.job
        assert job is not None
        with self._lock:
            free = [*self._idle, talk]
            best = self._best(free, tokens, image_keys)
            if best is talk:
                return talk
            talk.job = None
            self._idle.append(talk)
            if best is not None:
                self._idle.remove(best)
                best.job = job
                return best
            self._n += 1
        return self._open_counted(job)

    def _best(self, free: Sequence[_Talk], tokens: Sequence[int], image_keys: Sequence[str]) -> _Talk | None:
        """None: a new one."""
        known = [one.conversation.session.n_known(tokens, image_keys) for one in free]
        most = max(known)
        one = free[known.index(most)]
        # A few tokens are the same in all prompts. They are not worth what else the caches hold.
        if most and 2 * most >= min(len(tokens), one.conversation.session.n_past):
            return one
        empty = next((one for one in free if not one.conversation.session.n_past), None)
        if empty is None and self._n < self.most:
            return None
        return empty or min(free, key=lambda one: one.used)

    def encode_ahead(self, job: Job, work: Callable[[Lent, Job], None], ended: Callable[[], None]) -> bool:
        """Let a thread work for a job that waits, with a conversation that no job gets. Whether it can: one
        thread does so at a time. ended: called in it."""
        if self._is_closing or self._is_ahead:
            return False
        self._is_ahead = True

        def run() -> None:
            try:
                talk = self._ahead_talk = self._ahead_talk or self._new(None)
                talk.job = job
                work(Lent(self, talk), job)
            except Exception as e:  # the job itself meets it, and tells it
                logger.debug("encoding ahead: %s: %s", type(e).__name__, e)
            finally:
                if self._ahead_talk is not None:
                    self._ahead_talk.job = None
                self._is_ahead = False
                ended()

        self._ahead = threading.Thread(target=run, name="mllama-ahead", daemon=True)
        self._ahead.start()
        return True

    def end_ahead(self) -> None:
        """Stop `encode_ahead`, and wait for its end."""
        self._is_closing = True
        if self._ahead is not None:
            self._ahead.join()

    def give_back(self, talk: _Talk) -> None:
        """The job with it has ended."""
        talk.job = None
        talk.used = time.monotonic()
        with self._lock:
            self._idle.append(talk)

    def _open(self, job: Job | None) -> _Talk:
        with self._lock:
            self._n += 1
        return self._open_counted(job)

    def _open_counted(self, job: Job | None) -> _Talk:
        """A new one, which `_n` counts already."""
        try:
            return self._new(job)
        except BaseException:
            with self._lock:
                self._n -= 1
            raise

    def _new(self, job: Job | None) -> _Talk:
        talk = _Talk(job)
        conversation = self.model.conversation(
            scheduler=self.scheduler, abort=lambda: self._is_closing or talk.should_stop
        )
        talk.opened = conversation
        return talk


class Lent:
    """A model and a conversation with it, for one job. To be used by one thread."""

    def __init__(self, talks: Talks, talk: _Talk) -> None:
        self._talks = talks
        self._talk: _Talk | None = talk

    @property
    def model(self) -> LoadedModel:
        return self._talks.model

    @property
    def conversation(self) -> Conversation:
        assert self._talk is not None
        return self._talk.conversation

    @property
    def context_length(self) -> int:
        return self.conversation.n_ctx

    def choose(self, tokens: Sequence[int], images: Sequence[TiledImage | ImageEmbedding]) -> None:
        """Let `conversation` be the one whose caches serve a prompt best. Raises BackendError, Aborted."""
        keys = [self.conversation.image_key(image) for image in images]
        talk, self._talk = self._talk, None  # if another one cannot be opened, it is free already
        assert talk is not None
        self._talk = self._talks.better(talk, tokens, keys)

    def give_back(self) -> None:
        """At the end."""
        if self._talk is not None:
            self._talks.give_back(self._talk)
