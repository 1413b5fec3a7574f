"""The models in memory: opened when they are asked for, closed when their time is over or room is needed.

For the engine's thread alone, but for `snapshot`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from ..backend.local import devices
from ..backend.plan import make_plan
from ..decode.conversation import Conversation
from ..errors import Aborted, MllamaError
from ..loaded import LoadedModel
from ..settings import Settings, offload_settings
from ..store.verify import require_verified
from ..tune.saved import key_of, read_tuned
from .catalog import Card
from .metrics import Metrics

logger = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.9  # of this machine's, that models may take
CPU = "CPU"


@dataclass(frozen=True)
class Opening:
    """How models are opened.

    given:       the settings that the user gave
    image_cache: keep the results of images on disk
    isolate:     in a child process
    verify:      check the files' sha256 first
    tuned:       use what `mllama tune` found where the user gave nothing
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    image_cache: bool = True
    isolate: bool = False
    verify: bool = False
    tuned: bool = True

    def settings(self, card: Card) -> Settings:
        """The settings for a model. Raises RequestError, ModelError."""
        files = card.files
        tuned: Mapping[str, Any] = {}
        if self.tuned:
            tuned = read_tuned(lambda: key_of(files.paths, offload_settings(self.given)))
        own = {"image_cache": self.image_cache, "isolate": self.isolate}
        return Settings.checked({**files.parameters, **tuned, **self.given, **own})


@dataclass(frozen=True)
class Need:
    """What a model takes: bytes by device, by its plan; lacking: devices that have too little free now."""

    n_bytes: Mapping[str, int]
    lacking: tuple[str, ...] = ()


@dataclass
class Loaded:
    """A model in memory. expires, used: as time.monotonic counts."""

    card: Card
    model: LoadedModel
    conversation: Conversation
    need: Need
    seconds: float  # of loading
    expires: float = math.inf
    used: float = 0.0

    @property
    def context_length(self) -> int:
        return self.conversation.n_ctx


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
        metrics: Metrics,
        abort: Callable[[], bool],
        plan: Callable[[Card, Settings], Need] | None = None,
    ) -> None:
        """most: at the same time; memory: bytes of this machine; None: nearly all.
        abort: asked while something computes."""
        self._opening = opening
        self._most = max(1, most)
        self._memory = memory
        self._metrics = metrics
        self._abort = abort
        self._plan = plan or need_of
        self._lock = threading.Lock()  # of the dictionary
        self._loaded: dict[str, Loaded] = {}

    def get(self, card: Card) -> tuple[Loaded, float]:
        """A model, opened if it is not; and how long that took. Raises ModelError, BackendError, Aborted."""
        found = self._loaded.get(card.name)
        if found is not None and found.card == card:
            found.used = time.monotonic()
            return found, 0.0
        self.close(card.name)  # its files are others now
        start = time.monotonic()
        try:
            settings = self._opening.settings(card)
            need = self._make_room(card, settings)
            opened = self._open(card, settings, need, start)
        except MllamaError:
            self._metrics.load_failures.inc()
            raise
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
            conversation = model.conversation()
        except BaseException:
            model.close()
            raise
        now = time.monotonic()
        return Loaded(card, model, conversation, need, now - start, used=now)

    def _check_abort(self) -> None:
        if self._abort():
            raise Aborted("loading was stopped")

    def _make_room(self, card: Card, settings: Settings) -> Need:
        """Close those that were used longest ago until the plan says that this one fits. If it never does, it
        is tried all the same: the system may page, and a device says itself what it lacks."""
        while len(self._loaded) >= self._most:
            self._close_oldest("so many models may be in memory")
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
        oldest = min(self._loaded.values(), key=lambda loaded: loaded.used)
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
            found.model.close()
        except MllamaError as e:
            logger.warning("%s: %s", name, e)

    def close_all(self) -> None:
        """Free all."""
        for name in list(self._loaded):
            self.close(name)

    def keep(self, loaded: Loaded, seconds: float) -> None:
        """Let a model stay for so long from now; 0: not at all."""
        loaded.used = time.monotonic()
        if seconds <= 0:
            self.close(loaded.card.name)
        else:
            with self._lock:
                loaded.expires = loaded.used + seconds

    def close_expired(self) -> float | None:
        """Free those whose time is over; seconds until the next one's is, None: never."""
        now = time.monotonic()
        for loaded in list(self._loaded.values()):
            if loaded.expires <= now:
                logger.info("%s: unloaded, not used for its keep_alive", loaded.card.name)
                self.close(loaded.card.name)
        left = [loaded.expires - now for loaded in self._loaded.values()]
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


def need_of(card: Card, settings: Settings) -> Need:
    """What a model takes with these settings, by its plan; with "auto", what all of its layers would take
    on the devices, because others make room for them. Raises ModelError, BackendError, RequestError."""
    values = settings.as_dict()
    layers = values.pop("n_gpu_layers")
    files = card.files
    if layers == "auto":
        has_gpu = any(device.type in ("gpu", "igpu") for device in devices())
        layers = -1 if has_gpu or settings.rpc_servers else 0
    plan = make_plan(files.text, files.mmproj, n_gpu_layers=layers, **values)
    (chosen,) = plan.settings
    return Need({d.device: d.mapped + d.peak for d in chosen.devices}, chosen.lacking)
