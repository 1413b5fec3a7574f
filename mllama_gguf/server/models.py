"""The models in memory: opened when they are asked for, closed when their time is over or room is needed.

For the engine's thread alone, but for `snapshot` and `end`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from ..backend.local import devices
from ..backend.plan import make_plan
from ..cpus import usable_cpus
from ..decode.conversation import Conversation
from ..errors import Aborted, MllamaError
from ..loaded import LoadedModel
from ..settings import Settings, offload_settings
from ..store.verify import require_verified
from ..tune.saved import key_of, read_tuned
from ..vision.embedding import ImageEmbedding
from ..vision.preprocess import TiledImage
from .catalog import Card
from .metrics import Metrics
from .talks import Talks

logger = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.9  # of this machine's, that models may take
CPU = "CPU"
GPU_PARALLEL = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Opening:
    """How models are opened.

    given:       the settings that the user gave
    image_cache: keep the results of images on disk
    verify:      check the files' sha256 first
    tuned:       use what `mllama tune` found where the user gave nothing
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    image_cache: bool = True
    verify: bool = False
    tuned: bool = True

    def settings(self, card: Card) -> Settings:
        """The settings for a model. Raises RequestError, ModelError."""
        files = card.files
        tuned: Mapping[str, Any] = {}
        if self.tuned:
            tuned = read_tuned(lambda: key_of(files.paths, offload_settings(self.given)))
        own = {**files.parameters, **tuned, **self.given, "image_cache": self.image_cache}
        return Settings.checked(own)


@dataclass(frozen=True)
class Need:
    """What a model takes: bytes by device, by its plan; lacking: devices that have too little free now;
    parallel: jobs that run together, which are planned for; None: it is not known."""

    n_bytes: Mapping[str, int]
    lacking: tuple[str, ...] = ()
    parallel: int | None = None


@dataclass(eq=False)
class Loaded:
    """A model in memory, `Usable` by one job at a time.

    talks:   conversations of jobs that run together; None: one job at a time
    keep:    seconds that it stays after a job, as the last job said that named any
    expires, used: as time.monotonic counts
    users:   running jobs
    is_over: it is closed once nobody uses it, and no job begins with it
    to_unload: it is closed once nobody uses it
    """

    card: Card
    model: LoadedModel
    conversation: Conversation
    need: Need
    seconds: float  # of loading
    talks: Talks | None = None
    keep: float = math.inf
    expires: float = math.inf
    used: float = 0.0
    users: int = 0
    is_over: bool = False
    to_unload: bool = False

    @property
    def context_length(self) -> int:
        return self.conversation.n_ctx

    @property
    def has_place(self) -> bool:
        """Whether one more job can begin now, or must wait for the end of all."""
        return self.is_over or self.users < (1 if self.talks is None else self.talks.most)

    def choose(self, tokens: Sequence[int], images: Sequence[TiledImage | ImageEmbedding]) -> None:
        """There is one conversation."""


@dataclass(frozen=True)
class Shown:
    """A line of /api/ps."""

    card: Card
    seconds_left: float
    n_bytes: int
    n_bytes_vram: int
    context_length: int


class Models:
    """The models in memory."""

    def __init__(
        self,
        opening: Opening,
        *,
        most: int,
        memory: int | None,
        parallel: int | None,
        keep_alive: float,
        metrics: Metrics,
        abort: Callable[[], bool],
        wait: Callable[[], None],
        plan: Callable[[Card, Settings], Need] | None = None,
    ) -> None:
        """most: at the same time; memory: bytes of this machine; None: nearly all.
        parallel: jobs of a model that run together; None: see `need_of`
        keep_alive: seconds that a model stays after a job, if no job says it
        abort: asked while something computes; wait: for the end of a running job; raises Aborted."""
        self._opening = opening
        self._most = max(1, most)
        self._memory = memory
        self._parallel = parallel
        self._keep_alive = keep_alive
        self._wait = wait
        self._metrics = metrics
        self._abort = abort
        self._plan = plan or (lambda card, settings: need_of(card, settings, parallel))
        self._lock = threading.Lock()  # of the dictionary
        self._loaded: dict[str, Loaded] = {}
        self.is_loading = False

    def get(self, card: Card) -> tuple[Loaded, float]:
        """A model, opened if it is not; and how long that took. Raises ModelError, BackendError, Aborted."""
        found = self._loaded.get(card.name)
        if found is not None and found.card == card and not found.is_over:
            found.used = time.monotonic()
            return found, 0.0
        if found is not None:  # it failed, or its files are others now
            found.is_over = True
            while found.users:
                self._wait()
            self.close(card.name)
        start = time.monotonic()
        self.is_loading = True
        try:
            settings = self._opening.settings(card)
            need = self._make_room(card, settings)
            opened = self._open(card, settings, need, start)
        except MllamaError:
            self._metrics.load_failures.inc()
            raise
        finally:
            self.is_loading = False
        self._metrics.loads.inc()
        self._metrics.loaded.labels(card.name).set(1)
        with self._lock:
            self._loaded[card.name] = opened
        logger.info("%s: loaded in %.2f s", card.name, opened.seconds)
        return opened, opened.seconds

    def _open(self, card: Card, settings: Settings, need: Need, start: float) -> Loaded:
        files = card.files
        if self._opening.verify:
            require_verified(files, lambda name, done, total: self._check_abort())
        model = LoadedModel(
            files.text, files.mmproj, defaults=files.defaults, abort=self._abort, **settings.as_dict()
        )
        try:
            parallel = self._parallel or need.parallel or cpu_parallel()
            talks = Talks(model, parallel) if parallel > 1 else None
            conversation = model.conversation() if talks is None else talks.first
        except BaseException:
            model.close()
            raise
        now = time.monotonic()
        return Loaded(card, model, conversation, need, now - start, talks, self._keep_alive, used=now)

    def talks_of(self, card: Card) -> Talks | None:
        """The conversations of a model with which jobs may begin; None if its jobs do not run together."""
        found = self._loaded.get(card.name)
        return None if found is None or found.card != card or found.is_over else found.talks

    def has_place(self, card: Card) -> bool:
        """Whether a job with this model may begin, perhaps after others have ended."""
        found = self._loaded.get(card.name)
        return found is None or found.card != card or found.has_place

    def _check_abort(self) -> None:
        if self._abort():
            raise Aborted("loading was stopped")

    def _make_room(self, card: Card, settings: Settings) -> Need:
        """Close those that were used longest ago until the plan says that this one fits. If it never does, it
        is tried anyway: the system may page, and a device reports what it lacks."""
        while len(self._loaded) >= self._most:
            self._close_oldest("the most models are in memory")
        while True:
            try:
                need = self._plan(card, settings)
            except MllamaError as e:  # opening it says it better
                logger.info("%s: there is no plan: %s", card.name, e)
                return Need({})
            if not self._loaded or not self._is_short(need):
                return need
            self._close_oldest(f"{card.name} needs the room")

    def _is_short(self, need: Need) -> bool:
        if need.lacking:
            return True
        limit = self._memory or int(psutil.virtual_memory().total * SHARE_OF_MEMORY)
        taken = sum(loaded.need.n_bytes.get(CPU, 0) for loaded in self._loaded.values())
        return taken + need.n_bytes.get(CPU, 0) > limit

    def _close_oldest(self, why: str) -> None:
        """Close the model that was used longest ago of those that nobody uses; wait until there is one."""
        idle = [loaded for loaded in self._loaded.values() if not loaded.users]
        if not idle:
            self._wait()
            return
        oldest = min(idle, key=lambda loaded: loaded.used)
        logger.info("%s: unloaded, %s", oldest.card.name, why)
        self.close(oldest.card.name)

    def close(self, name: str) -> None:
        """Free a model, if it is in memory."""
        with self._lock:
            found = self._loaded.pop(name, None)
        if found is None:
            return
        self._metrics.loaded.labels(name).set(0)
        try:
            if found.talks is not None:
                found.talks.end_ahead()
            found.model.close()
        except MllamaError as e:
            logger.warning("%s: %s", name, e)

    def close_all(self) -> None:
        """Free all."""
        for name in list(self._loaded):
            self.close(name)

    def unload(self, name: str) -> None:
        """Free a model once nobody uses it, if it is in memory."""
        found = self._loaded.get(name)
        if found is not None:
            found.to_unload = True
            self.close_unused(found)

    def begin(self, loaded: Loaded) -> None:
        """A job uses a model."""
        with self._lock:
            loaded.users += 1
            loaded.expires = time.monotonic() + loaded.keep

    def end(self, loaded: Loaded, seconds: float | None, *, is_ruined: bool) -> bool:
        """A job's end, from any thread. Whether `close_unused` has something to do.

        seconds: that the model stays from now; 0: it does not stay; None: as the job before said
        """
        with self._lock:
            loaded.users -= 1
            loaded.keep = loaded.keep if seconds is None else seconds
            loaded.used = time.monotonic()
            loaded.expires = loaded.used + loaded.keep
            loaded.is_over |= is_ruined
            return self._is_to_close(loaded)

    def _is_to_close(self, loaded: Loaded) -> bool:
        is_wanted = not loaded.is_over and not loaded.to_unload and loaded.expires > loaded.used
        return loaded.users == 0 and not is_wanted

    def close_unused(self, loaded: Loaded) -> None:
        """Free a model that nobody uses or wants any more."""
        if self._is_to_close(loaded) and self._loaded.get(loaded.card.name) is loaded:
            self.close(loaded.card.name)

    def close_expired(self) -> None:
        """Free those whose time is over."""
        now = time.monotonic()
        for loaded in list(self._loaded.values()):
            if loaded.expires <= now and not loaded.users:
                logger.info("%s: unloaded, not used for its keep_alive", loaded.card.name)
                self.close(loaded.card.name)

    def seconds_left(self) -> float | None:
        """Seconds until the next one's time is over, None: never."""
        now = time.monotonic()
        left = [loaded.expires - now for loaded in self._loaded.values() if not loaded.users]
        nearest = min(left, default=math.inf)
        return None if math.isinf(nearest) else max(0.0, nearest)

    def snapshot(self) -> list[Shown]:
        """What is in memory, from any thread."""
        now = time.monotonic()
        with self._lock:
            return [
                Shown(
                    one.card,
                    max(0.0, one.expires - now),
                    sum(one.need.n_bytes.values()) or one.card.size,
                    sum(n for device, n in one.need.n_bytes.items() if device != CPU),
                    one.context_length,
                )
                for one in self._loaded.values()
            ]


def cpu_parallel() -> int:
    """How many jobs of a model run together on this machine's CPUs, if nobody says it."""
    return 4 if usable_cpus() >= 8 else 1


def need_of(card: Card, settings: Settings, parallel: int | None = None) -> Need:
    """What a model takes with these settings, by its plan; with "auto", what all of its layers would take
    on the devices, because others make room for them.

    parallel: jobs that run together. None: with all layers on GPUs as many as fit there, 16 at most; 1 if
              some layers do not fit; else as `cpu_parallel` says

    Raises ModelError, BackendError, RequestError.
    """
    layers = settings.n_gpu_layers
    has_gpu = any(device.type in ("gpu", "igpu") for device in devices())
    if layers == "auto":
        layers = -1 if has_gpu or settings.rpc_servers else 0
    if parallel is not None:
        return _planned(card, settings, layers, parallel)
    # Workers of other machines are as fast as the network.
    if settings.rpc_servers or not has_gpu or layers != -1:
        return _planned(card, settings, layers, cpu_parallel())
    for n in GPU_PARALLEL:
        need = _planned(card, settings, layers, n)
        if not need.lacking:
            break
    return need


def _planned(card: Card, settings: Settings, layers: int, parallel: int) -> Need:
    values = {**settings.as_dict(), "n_gpu_layers": layers}
    parallel = min(parallel, settings.n_batch)
    plan = make_plan(card.files.text, card.files.mmproj, parallel=parallel, **values)
    (chosen,) = plan.settings
    return Need({d.device: d.mapped + d.peak for d in chosen.devices}, chosen.lacking, parallel)
