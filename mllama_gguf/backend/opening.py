"""A model opened as its settings say: here or in a child process, with as many offloaded layers as fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .. import cpus
from ..errors import BackendError, OutOfMemoryError
from ..settings import Settings
from .base import Context, Model, SharedContext, open_encoder
from .callbacks import Callbacks
from .isolated import IsolatedModel
from .kernels import kernel_for
from .local import devices, open_model
from .measure import measuring
from .plan import device_limits, largest_fitting, offload_devices
from .supervisor import Supervisor
from .types import Device

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """An open model, and how its contexts are made.

    settings:     as given, but without GPUs n_gpu_layers is 0 in place of "auto"
    n_gpu_layers: as found, if the settings say "auto"
    n_threads:    CPU threads of a context that asks for no other number
    cpu_kernel:   of all contexts: what the environment or a trial gave when the model was opened
    """

    model: Model
    settings: Settings
    n_gpu_layers: int
    n_threads: int
    cpu_kernel: str

    @property
    def n_ctx(self) -> int:
        """Most tokens of a context that asks for no other number."""
        return self.settings.context_length(self.model.hparams.n_ctx_train)

    def open_context(
        self, callbacks: Callbacks, *, n_ctx: int | None = None, n_threads: int | None = None
    ) -> SharedContext:
        """A context as the settings say. If they say n_gpu_layers="auto", it has all the memory that it may
        ever need. Raises BackendError, RequestError."""
        context = self.model.open_context(
            callbacks,
            n_ctx=n_ctx or self.n_ctx,
            n_threads=n_threads or self.n_threads,
            cpu_kernel=self.cpu_kernel,
            **self.settings.for_context(),
        )
        if self.settings.n_gpu_layers == "auto":
            h = self.model.hparams
            try:
                n_tiles = min(self.settings.max_tiles or h.max_tiles, h.max_tiles)
                context.reserve([n_tiles] if h.has_vision else [])
            except BaseException:
                context.close()
                raise
        return context

    def open_encoder(self, callbacks: Callbacks, n_threads: int) -> Context:
        """A context that only encodes images. Raises BackendError."""
        return open_encoder(
            self.model,
            callbacks,
            n_threads=n_threads,
            flash_attn=self.settings.flash_attn,
            cpu_kernel=self.cpu_kernel,
        )


def open_backend(
    model_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None,
    settings: Settings,
    callbacks: Callbacks,
) -> Backend:
    """Open a model. Where n_gpu_layers is "auto" and there are GPUs, a line in the log at the level INFO says
    what was chosen.

    Raises ModelError, BackendError, RequestError, Aborted.
    """

    def open_with(layers: int) -> Backend:
        model = _open_model(model_path, mmproj_path, settings, layers, callbacks)
        try:
            kernel = kernel_for(settings.flash_attn, settings.vision_precision)
            n_threads = settings.n_threads or cpus.default_threads(model.size)
            backend = Backend(model, settings, layers, n_threads, kernel)
            if settings.n_gpu_layers == "auto":
                backend.open_context(callbacks).close()  # a trial
            return backend
        except BaseException:
            model.close()
            raise

    for_model = settings.for_model()
    in_this_process = not settings.rpc_servers and not settings.isolate
    if settings.n_gpu_layers == "auto" and in_this_process and not offload_devices(devices(), for_model):
        settings = settings.replace(n_gpu_layers=0)
    if settings.n_gpu_layers != "auto":
        return open_with(settings.n_gpu_layers)
    with measuring(
        model_path,
        mmproj_path,
        workers=settings.rpc_servers,
        rpc_timeout=settings.rpc_timeout,
        isolate=settings.isolate,
        n_ctx=settings.n_ctx,
        max_tiles=settings.max_tiles,
        n_threads=settings.n_threads or 0,
        vision_precision=settings.vision_precision,
        **for_model,
        **settings.for_context(),
    ) as (measure_one, found_devices):
        targets = offload_devices(found_devices, for_model)
        try:
            layers = largest_fitting(measure_one, device_limits(found_devices, for_model)) if targets else 0
        except BackendError as e:
            if settings.rpc_servers:
                raise
            # A driver that cannot even start: other programs have all of the memory.
            logger.warning("%s; all layers run on the CPU", e)
            targets = []
    if not targets:
        settings = settings.replace(n_gpu_layers=0)
        return open_with(0)
    backend = step_down(open_with, layers)
    logger.info("%s", choice_in_words(backend.n_gpu_layers, backend.model.hparams.n_layer + 1, targets))
    return backend


def choice_in_words(layers: int, of: int, targets: Sequence[Device]) -> str:
    """The choice of "auto" as a line: how many of all layers, on which devices."""
    names = ", ".join(f"{device.name} ({device.description})" for device in targets)
    if layers == 0:
        return f"GPU: no layer fits on {names}; all of them run on the CPU"
    return f"GPU: {of if layers < 0 else layers} of {of} layers on {names}; -ngl 0 runs all on the CPU"


def _open_model(
    model_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None,
    settings: Settings,
    layers: int,
    callbacks: Callbacks,
) -> Model:
    chosen = {"n_gpu_layers": layers, **settings.for_model()}
    if not settings.rpc_servers and not settings.isolate:
        return open_model(model_path, mmproj_path, callbacks=callbacks, **chosen)
    supervisor = Supervisor(settings.rpc_servers, settings.rpc_timeout)
    return IsolatedModel(supervisor, model_path, mmproj_path, callbacks, **chosen)


def step_down(open_with: Callable[[int], T], layers: int) -> T:
    """Open with this many layers, or with fewer where a device has less room than it said: 1 less, 3 less, 7
    less, ... Raises OutOfMemoryError if 0 layers are too many, and what else `open_with` raises."""
    step = 1
    while True:
        try:
            return open_with(layers)
        except OutOfMemoryError as e:
            if layers <= 0:
                raise
            logger.warning("n_gpu_layers %d: %s; trying fewer", layers, e)
            layers = max(0, layers - step)
            step *= 2
