"""The thread that opens models and computes, or has threads compute together; and the queue before it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import TypeAlias

from ..errors import Aborted
from ..settings import Settings
from ..waiting import POLL_SECONDS
from .catalog import Card
from .jobs import Done, Ended, Event, FairQueue, Job, Usable
from .metrics import Metrics
from .models import Loaded, Models, Need, Opening, Shown
from .problems import Refused, refusal, ruins_model
from .settings import ServerSettings
from .talks import Lent

logger = logging.getLogger(__name__)

Task: TypeAlias = Callable[[], None]

STOPPING = Refused(503, "the server is stopping", "server_stopping", again=True, seconds=5)


class Engine:
    """Computes jobs one after the other, or several of a model together.

    One thread opens and closes models. It computes itself where jobs of a model do not run together; else
    each job has a thread of its own. Clients that wait take turns. A job that nobody waits for any more is
    left out, or stopped within 50 ms.
    """

    def __init__(
        self,
        settings: ServerSettings,
        opening: Opening,
        metrics: Metrics,
        plan: Callable[[Card, Settings], Need] | None = None,
    ) -> None:
        """plan: tells what a model takes; None: `models.need_of`."""
        self._settings = settings
        self._metrics = metrics
        self._changed = threading.Condition()  # of what follows
        self._queue = FairQueue()
        self._running: set[Job] = set()
        self._stopping = False
        self._tasks: list[Task] = []  # for the thread, before the next job
        self._current: Job | None = None  # of the thread
        self._of_thread = threading.local()  # job: that the thread computes
        self._models = Models(
            opening,
            most=settings.max_models,
            memory=settings.memory,
            parallel=settings.parallel,
            keep_alive=settings.keep_alive,
            metrics=metrics,
            abort=self._should_stop,
            wait=self._wait,
            plan=plan,
        )
        self._thread = threading.Thread(target=self._run, name="mllama-engine", daemon=True)

    # ---- for everybody -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises Refused if too many wait."""
        with self._changed:
            if self._stopping:
                raise STOPPING
            if len(self._queue) >= self._settings.max_queue:
                raise Refused(
                    503,
                    "server busy, please try again.  maximum pending requests exceeded",
                    "server_busy",
                    again=True,
                    seconds=2,
                )
            waiting = self._queue.n_bytes
            if waiting and waiting + job.n_bytes > self._settings.max_waiting:
                raise Refused(
                    503, "server busy, please try again.  too much waits", "server_busy", again=True
                )
            self._queue.add(job)
            self._metrics.queued.set(len(self._queue))
            self._changed.notify_all()

    def cancel(self, job: Job, reason: str = "client") -> None:
        """Nobody waits for this job any more."""
        job.cancel(reason)
        self._withdraw(job, reason)

    def expire(self, job: Job) -> bool:
        """Take a job whose time is over out of the queue; False: it does not wait there any more."""
        return self._withdraw(job, "time")

    def _withdraw(self, job: Job, reason: str) -> bool:
        """Whether the job was in the queue, which it then has left."""
        with self._changed:
            found = self._queue.remove(job)
            if found:
                self._metrics.queued.set(len(self._queue))
                self._metrics.cancelled.labels(reason).inc()
        return found

    def unload(self, card: Card) -> None:
        """Free a model once nobody uses it."""
        with self._changed:
            self._tasks.append(lambda: self._models.unload(card.name))
            self._changed.notify_all()

    def snapshot(self) -> list[Shown]:
        """The models in memory."""
        return self._models.snapshot()

    @property
    def state(self) -> str:
        """As /health shows it."""
        if self._stopping:
            return "stopping"
        return "loading" if self._models.is_loading else "ok"

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no more jobs; those that wait are refused, those that run continue."""
        with self._changed:
            self._stopping = True
            waiting = list(self._queue)
            self._queue = FairQueue()
            self._metrics.queued.set(0)
            self._changed.notify_all()
        for job in waiting:
            job.cancel("shutdown")
            job.mailbox.put(STOPPING)

    def stop_now(self) -> None:
        """Stop what runs, after `stop`."""
        with self._changed:
            running = list(self._running)
        for job in running:
            job.cancel("shutdown")

    def join(self, seconds: float = 10.0) -> None:
        """Wait for the thread's end, after `stop`."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    # ---- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            tasks, job, is_over = self._next()
            for task in tasks:
                task()
            if job is not None:
                self._current = job
                self._begin(job)
                self._current = None
            elif is_over:
                break
        self._models.close_all()

    def _next(self) -> tuple[list[Task], Job | None, bool]:
        """Wait for something to do."""
        while True:
            self._models.close_expired()
            with self._changed:
                tasks, self._tasks = self._tasks, []
                job = self._queue.take(lambda one: self._models.has_place(one.card))
                if job is not None:
                    self._running.add(job)
                    self._metrics.queued.set(len(self._queue))
                is_over = self._stopping and not self._running
                if tasks or job is not None or is_over:
                    return tasks, job, is_over and not tasks
                self._encode_ahead()
                # Asked here: a job that ends now wakes this thread after it waits.
                self._changed.wait(self._models.seconds_left())

    def _encode_ahead(self) -> None:
        """Let the images of the next job be encoded while it waits, if its model's jobs run together."""
        job = self._queue.first()
        if job is None or job.ahead is None:
            return
        talks = self._models.talks_of(job.card)
        if talks is not None and talks.encode_ahead(job, job.ahead, self._wake):
            job.ahead = None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self) -> None:
        """Wait a little for the end of jobs that run in other threads. Raises Aborted."""
        with self._changed:
            if not self._tasks:
                self._changed.wait(POLL_SECONDS)
            tasks, self._tasks = self._tasks, []
        for task in tasks:
            task()
        if self._should_stop():
            raise Aborted("nobody waits for it")

    def _begin(self, job: Job) -> None:
        """Open the model of a job, and compute here or in another thread."""
        self._metrics.queue_seconds.observe(time.monotonic() - job.created)
        self._metrics.processing.inc()
        try:
            if job.should_stop:
                raise Aborted("nobody waits for it")
            loaded, _ = self._models.get(job.card)
            began = time.monotonic()
        except BaseException as e:
            self._close_job(job, self._problem(job, e))
            return
        self._models.begin(loaded)
        if loaded.talks is None:
            self._answer(job, loaded, began)
        else:
            threading.Thread(
                target=self._answer, args=(job, loaded, began), name="mllama-reply", daemon=True
            ).start()

    def _should_stop(self) -> bool:
        """Asked every 50 ms by what computes for a job."""
        job = getattr(self._of_thread, "job", None) or self._current
        return job is not None and job.should_stop

    # ---- the thread, or one of a job -----------------------------------------------------------------------

    def _answer(self, job: Job, loaded: Loaded, began: float) -> None:
        self._of_thread.job = job
        outcome: Event
        is_ruined = False
        try:
            self._compute(job, loaded)
            now = time.monotonic()
            outcome = Done(began - job.created, now - job.created)
        except BaseException as e:
            is_ruined = ruins_model(e)
            outcome = self._problem(job, e)
        self._of_thread.job = None
        if not self._models.end(loaded, job.keep_alive, is_ruined=is_ruined):
            self._close_job(job, outcome)
        elif threading.current_thread() is self._thread:
            self._close_model(job, loaded, outcome)
        else:
            with self._changed:
                self._tasks.append(lambda: self._close_model(job, loaded, outcome))
                self._changed.notify_all()

    def _compute(self, job: Job, loaded: Loaded) -> None:
        lent: Usable = loaded if loaded.talks is None else loaded.talks.lend(job)
        is_first = True
        try:
            with closing(job.work(lent, job)) as events:
                for event in events:
                    job.mailbox.put(event)
                    if is_first:
                        is_first = False
                        self._metrics.first_token.observe(time.monotonic() - job.created)
                    if isinstance(event, Ended):
                        self._metrics.count_reply(event.stats, event.sources)
                    if job.should_stop:
                        raise Aborted("nobody waits for it")
        finally:
            if isinstance(lent, Lent):
                lent.give_back()

    def _problem(self, job: Job, error: BaseException) -> Refused:
        """The error that a job gets."""
        if ruins_model(error):
            logger.warning("%s: %s: %s", job.card.name, type(error).__name__, error)
        if isinstance(error, Aborted):
            self._metrics.cancelled.labels("time" if job.is_late else job.reason).inc()
            if job.is_late:
                return job.lateness
            if job.reason == "shutdown":
                return STOPPING
        return refusal(error)

    def _close_model(self, job: Job, loaded: Loaded, outcome: Event) -> None:
        """Free what a job leaves, before the client is told of the end."""
        self._models.close_unused(loaded)
        self._close_job(job, outcome)

    def _close_job(self, job: Job, outcome: Event) -> None:
        job.mailbox.put(outcome)
        self._metrics.processing.dec()
        with self._changed:
            self._running.discard(job)
            self._changed.notify_all()
