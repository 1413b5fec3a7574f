"""Several conversations that compute together: the weights are read once for all of them.

Each conversation computes in the thread of its caller. What the threads ask for at the same time becomes one
step of the context: single tokens first, then pieces of prompts in the order in which they came. There is no
thread of its own: whoever waits and finds nobody leading leads the next step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from ..backend.base import CHUNK, Context, Item, Logits, SharedContext
from ..backend.callbacks import Callbacks
from ..backend.library import load
from ..backend.opening import Backend
from ..backend.types import Floats, Memory
from ..cache.disk import ImageCache
from ..errors import Aborted, BackendError, BusyError, MllamaError
from ..handles import OneProcess
from ..settings import MAX_PARALLEL
from ..waiting import POLL_SECONDS, acquire
from .exclusive import Exclusive
from .slots import Slots

Stop = Callable[[], bool]

# How long a step waits for a conversation that took part in the last one: this share of that step's time.
PATIENCE = 0.3
MAX_PATIENCE = 0.05  # seconds


@dataclass(eq=False)
class _Job:
    """Tokens that a conversation wants appended. rows: the logits so far."""

    sequence: int
    tokens: Sequence[int]
    slot: int
    n_visible: int
    logits: Logits
    stop: Stop
    rows: list[Floats]
    done: int = 0
    error: BaseException | None = None

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done

    def item(self, n: int) -> Item:
        """The next n tokens."""
        is_last = n == self.left
        logits: Logits = self.logits if self.logits == "all" or is_last else "none"
        tokens = self.tokens[self.done : self.done + n]
        return Item(self.sequence, tokens, self.slot, self.n_visible, logits)

    @property
    def ended(self) -> bool:
        return self.error is not None or self.left == 0


class Scheduler(OneProcess):
    """One context for several conversations. Safe from several threads.

    slots: the image slots, which the conversations share
    """

    def __init__(self, backend: Backend, disk: ImageCache | None, *, n_threads: int | None = None) -> None:
        """disk: where image_kv is found and kept. Raises BackendError."""
        self._backend = backend
        self._n_threads = n_threads or backend.n_threads
        self._n_batch = backend.settings.n_batch
        self._changed = threading.Condition()
        self._leading = False
        self._leader = 0  # the thread
        self._urgent = 0  # threads that want the context for themselves
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._expected: set[int] = set()  # sequences that were in the last step, and have not come again
        self._seconds = 0.0  # of the last step
        self._encoding = threading.Lock()
        self._encodes_in = 0  # the thread
        self._encoder: Context | None = None
        self._encoder_stop: Stop = bool
        self._closed = False
        self._owner_stop: Stop = bool  # of who has the sole use
        callbacks = Callbacks(load(), None, self._should_stop)
        # Its own sequence is not used, and takes as little as can be.
        self._context = backend.open_context(callbacks, n_ctx=1, n_threads=self._n_threads)
        self.n_steps = 0
        self.slots = Slots(Exclusive(self, lambda: self.slots.should_stop()), callbacks, disk, shared=True)
        self.slots.forget(self._context.epoch)

    @property
    def is_local(self) -> bool:
        """Whether the context is in this process."""
        return self._backend.model.is_local

    @property
    def context(self) -> SharedContext:
        """Only for the thread that has sole use, see `exclusive`."""
        return self._context

    def memory(self) -> Memory:
        """Bytes of all sequences, slots and buffers, now; those of the encoder too, once it was used."""
        with self.exclusive(bool) as context:
            found = context.memory()
        encoder = self._encoder
        return found if encoder is None else found.with_encoder(encoder.memory())

    # ---- who may use the context ---------------------------------------------------------------------------

    @contextmanager
    def exclusive(self, stop: Stop) -> Iterator[SharedContext]:
        """The sole use of the context, between two steps. Raises Aborted once `stop` says so."""
        self.check_process()
        with self._changed:
            self._urgent += 1
        try:
            self._lead(stop)
        finally:
            with self._changed:
                self._urgent -= 1
        self._owner_stop = stop
        try:
            yield self._context
        finally:
            self._owner_stop = bool
            self._follow()

    def _lead(self, stop: Stop) -> None:
        self._check_callback()
        while True:
            with self._changed:
                if self._closed:
                    raise MllamaError("the model is closed")
                if not self._leading:
                    self._begin_leading()
                    return
                self._changed.wait(POLL_SECONDS)
            if stop():
                raise Aborted("waiting for other conversations was stopped")

    def _check_callback(self) -> None:
        """Raise BusyError in a callback of what this thread computes: it would wait for itself."""
        if self._leading and self._leader == threading.get_ident():
            raise BusyError("this scheduler is computing; a callback cannot use its conversations")

    def _begin_leading(self) -> None:
        self._leading, self._leader = True, threading.get_ident()

    def _follow(self) -> None:
        with self._changed:
            self._leading = False
            self._changed.notify_all()

    # ---- text ----------------------------------------------------------------------------------------------

    def decode(
        self, sequence: int, tokens: Sequence[int], slot: int, n_visible: int, logits: Logits, stop: Stop
    ) -> Floats:
        """Append tokens to a sequence, as `Context.decode`, in steps with others. Raises what that raises."""
        self.check_process()
        self._check_callback()
        if stop():
            raise Aborted("the computation was stopped")
        job = _Job(sequence, tokens, slot, n_visible, logits, stop, [])
        with self._changed:
            self._waiting.append(job)
            self._expected.discard(sequence)
            self._changed.notify_all()
        try:
            while not job.ended:
                with self._changed:
                    if self._closed:
                        raise MllamaError("the model is closed")
                    mine = not job.ended and not self._leading and not self._urgent
                    if mine:
                        self._begin_leading()
                    elif not job.ended:
                        self._changed.wait(POLL_SECONDS)
                if mine:
                    try:
                        self._step()
                    finally:
                        self._follow()
                elif not job.ended and stop():
                    raise Aborted("the computation was stopped")
        finally:
            self._forget(job)
        if job.error is not None:
            raise job.error
        return np.concatenate(job.rows) if len(job.rows) > 1 else job.rows[0]

    def _forget(self, job: _Job) -> None:
        """Its thread leaves: the job is in no later step, and the step that it is in has ended."""
        with self._changed:
            with suppress(ValueError):
                self._waiting.remove(job)
            if job.ended:
                return
            while job in self._running:
                self._changed.wait(POLL_SECONDS)

    def _step(self) -> None:
        """One step. For the leader."""
        self._gather()
        with self._changed:
            chosen = self._choose()
            self._running = [job for job, _ in chosen]
            for job in self._running:
                self._waiting.remove(job)
        start = time.perf_counter()
        try:
            self._compute(chosen)
        finally:
            with self._changed:
                self._seconds = time.perf_counter() - start
                self.n_steps += 1
                self._expected = {job.sequence for job in self._running if job.ended}
                # Those that are not done come first in the next step.
                self._waiting[:0] = [job for job in self._running if not job.ended]
                self._running = []
                self._changed.notify_all()

    def _gather(self) -> None:
        """Wait a little for the conversations of the last step, which choose their next tokens now."""
        end = time.perf_counter() + min(PATIENCE * self._seconds, MAX_PATIENCE)
        with self._changed:
            while self._expected and not self._urgent and (left := end - time.perf_counter()) > 0:
                self._changed.wait(left)

    def _choose(self) -> list[tuple[_Job, int]]:
        """What to compute: jobs, and how many tokens of each."""
        # One token at least is for a prompt, which else waits until the replies before it end.
        most = min(self._n_batch, MAX_PARALLEL) - any(job.left > 1 for job in self._waiting)
        single = [job for job in self._waiting if job.left == 1][:most]
        chosen = [(job, 1) for job in single]
        room = self._n_batch - len(single)
        if len(self._waiting) > 1:
            room = min(room, CHUNK)
        for job in self._waiting:
            n = min(job.left, room)
            if job.left > 1 and n > 0 and len(chosen) < MAX_PARALLEL:
                chosen.append((job, n))
                room -= n
        return chosen

    def _compute(self, chosen: Sequence[tuple[_Job, int]]) -> None:
        try:
            results = self._context.decode_many([job.item(n) for job, n in chosen])
        except Aborted as e:
            for job, _ in chosen:
                if job.stop():
                    job.error = Aborted(str(e))
            return
        except MllamaError as e:
            if len(chosen) > 1 and not isinstance(e, BackendError):  # one of them is wrong
                for one in chosen:
                    self._compute([one])
                return
            for job, _ in chosen:
                job.error = type(e)(str(e))
            return
        for (job, n), result in zip(chosen, results, strict=True):
            if isinstance(result, MllamaError):
                job.error = result
            else:
                job.done += n
                job.rows.append(result)

    def _should_stop(self) -> bool:
        """Whether nobody wants the running step any more."""
        running = self._running
        return all(job.stop() for job in running) if running else self._owner_stop()

    # ---- images --------------------------------------------------------------------------------------------

    def encode(self, pixels: Floats, aspect_ratio_id: int, stop: Stop) -> Floats:
        """As `Context.encode`, one image at a time. Replies go on meanwhile: the encoder has a context of its
        own."""
        if self._encodes_in == threading.get_ident():
            raise BusyError("this scheduler is encoding an image; a callback cannot use its encoder")
        acquire(self._encoding, stop, "waiting for the vision encoder was stopped")
        try:
            self._encodes_in = threading.get_ident()
            self._encoder_stop = stop
            if self._encoder is None:
                callbacks = Callbacks(load(), None, lambda: self._encoder_stop())
                self._encoder = self._backend.open_encoder(callbacks, self._n_threads)
            return self._encoder.encode(pixels, aspect_ratio_id)
        finally:
            self._encoder_stop = bool
            self._encodes_in = 0
            self._encoding.release()

    # ---- its own life --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the context once nobody uses it. Twice is fine."""
        if self._closed or self.is_inherited:
            return
        if self._encodes_in == threading.get_ident():
            raise BusyError("this scheduler is encoding an image; a callback cannot close it")
        with self.exclusive(bool) as context:
            self._closed = True
            context.close()
        with self._encoding:
            if self._encoder is not None:
                self._encoder.close()
