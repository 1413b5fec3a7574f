"""The one thread that computes, and the queue before it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing

from ..errors import Aborted
from ..settings import Settings
from .catalog import Card
from .jobs import Done, Ended, FairQueue, Job
from .metrics import Metrics
from .models import Models, Need, Opening, Shown
from .problems import Refused, refusal, ruins_model
from .settings import ServerSettings

logger = logging.getLogger(__name__)

STOPPING = Refused(503, "the server is stopping", "server_stopping", again=True, seconds=5)


class Engine:
    """Computes jobs one after the other.

    Clients that wait take turns. A job that nobody waits for any more is left out, or stopped within 50 ms.
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
        self._current: Job | None = None
        self._stopping = False
        self._tasks: list[Callable[[], None]] = []  # for the thread, before the next job
        self._models = Models(
            opening,
            most=settings.max_models,
            memory=settings.memory,
            metrics=metrics,
            abort=self._should_stop,
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
                    503, "server busy, please try again.  too many pictures wait", "server_busy", again=True
                )
            self._queue.add(job)
            self._metrics.queued.set(len(self._queue))
            self._changed.notify_all()

    def cancel(self, job: Job, reason: str = "client") -> None:
        """Nobody waits for this job any more."""
        job.cancel(reason)
        with self._changed:
            if self._queue.remove(job):
                self._metrics.queued.set(len(self._queue))
                self._metrics.cancelled.labels(reason).inc()

    def unload(self, card: Card) -> None:
        """Free a model once the thread is free."""
        with self._changed:
            self._tasks.append(lambda: self._models.close(card.name))
            self._changed.notify_all()

    def snapshot(self) -> list[Shown]:
        """The models in memory."""
        return self._models.snapshot()

    @property
    def state(self) -> str:
        """As /health shows it."""
        return "stopping" if self._stopping else "ok"

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no more jobs; those that wait are refused, the one that runs goes on."""
        with self._changed:
            self._stopping = True
            waiting = list(self._queue)
            self._queue = FairQueue()
            self._metrics.queued.set(0)
            self._changed.notify_all()
        for job in waiting:
            job.mailbox.put(STOPPING)

    def stop_now(self) -> None:
        """Stop what runs, after `stop`."""
        with self._changed:
            current = self._current
        if current is not None:
            current.cancel("shutdown")

    def join(self, seconds: float = 10.0) -> None:
        """Wait for the thread's end, after `stop`."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    # ---- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            tasks, job, stopping = self._next()
            for task in tasks:
                task()
            if job is not None:
                self._answer(job)
                with self._changed:
                    self._current = None
            elif stopping:
                break
        self._models.close_all()

    def _next(self) -> tuple[list[Callable[[], None]], Job | None, bool]:
        """Wait for something to do."""
        while True:
            seconds = self._models.close_expired()
            with self._changed:
                tasks, self._tasks = self._tasks, []
                job = self._queue.take()
                if job is not None:
                    self._current = job
                    self._metrics.queued.set(len(self._queue))
                if tasks or job is not None or self._stopping:
                    return tasks, job, self._stopping
                self._changed.wait(seconds)

    def _answer(self, job: Job) -> None:
        self._metrics.queue_seconds.observe(time.monotonic() - job.created)
        self._metrics.processing.set(1)
        try:
            self._compute(job)
        except BaseException as e:
            if ruins_model(e):
                logger.warning("%s: %s: %s", job.card.name, type(e).__name__, e)
                self._models.close(job.card.name)
            if isinstance(e, Aborted):
                self._metrics.cancelled.labels("time" if job.is_late else job.reason).inc()
                if job.is_late:
                    e = Refused(504, f"not done within {job.time_limit:g} s", "time_limit")
                elif job.reason == "shutdown":
                    e = STOPPING
            job.mailbox.put(refusal(e))
        finally:
            self._metrics.processing.set(0)

    def _compute(self, job: Job) -> None:
        if job.should_stop:
            raise Aborted("nobody waits for it")
        loaded, _ = self._models.get(job.card)
        began = time.monotonic()
        keep = self._settings.keep_alive if job.keep_alive is None else job.keep_alive
        is_first = True
        try:
            with closing(job.work(loaded, job)) as events:
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
            self._models.keep(loaded, keep)
        now = time.monotonic()
        job.mailbox.put(Done(began - job.created, now - job.created))

    def _should_stop(self) -> bool:
        """Asked by the computation every 50 ms."""
        current = self._current
        return current is not None and current.should_stop
