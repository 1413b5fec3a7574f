"""What a model with a full context takes on every device, measured without loading it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..cpus import default_threads
from ..settings import DEFAULTS, VisionPrecision
from .base import open_encoder
from .callbacks import Callbacks
from .kernels import kernel_for
from .library import load as load_native
from .local import devices, open_model
from .supervisor import Supervisor
from .types import Device, HParams, Memory

# (n_gpu_layers) -> what that takes, and the model's shape
Measure = Callable[[int], tuple[Memory, HParams]]
_CONTEXT_SETTINGS = ("n_batch", "n_threads", "type_k", "type_v", "flash_attn", "offload_kqv", "cpu_kernel")


def measure(
    model_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None,
    *,
    callbacks: Callbacks,
    n_ctx: int | None,
    n_tiles: Sequence[int] | None = None,
    max_tiles: int | None = None,
    parallel: int = 1,
    **settings: Any,
) -> tuple[Memory, HParams]:
    """What a model with a full context takes, in this process.

    n_tiles:  of each image in the cache; None: one image with all its tiles
    max_tiles: most tiles of that image; None: as many as the model knows
    parallel: full conversations that compute together, each with such images of its own
    settings: those of `local.open_model` and `Model.open_context`; without n_threads, as many as `Mllama`
    takes

    Raises ModelError, RequestError, BackendError.
    """
    context_settings = {name: settings.pop(name) for name in _CONTEXT_SETTINGS if name in settings}
    model = open_model(model_path, mmproj_path, callbacks=callbacks, no_alloc=True, **settings)
    try:
        h = model.hparams
        n_ctx = min(n_ctx or h.n_ctx_train, h.n_ctx_train)
        context_settings["n_threads"] = context_settings.get("n_threads") or default_threads(model.size)
        if n_tiles is None:
            n_tiles = [min(max_tiles or h.max_tiles, h.max_tiles)] if h.has_vision else []
        # As a scheduler opens it: its conversations have sequences beside its own.
        context = model.open_context(callbacks, n_ctx=n_ctx if parallel == 1 else 1, **context_settings)
        try:
            if parallel == 1:
                context.reserve(n_tiles)
                return context.memory(), h
            context.reserve_many(parallel, n_ctx, n_tiles)
            if not n_tiles:
                return context.memory(), h
            encoder = open_encoder(
                model,
                callbacks,
                n_threads=context_settings["n_threads"],
                flash_attn=context_settings.get("flash_attn", DEFAULTS["flash_attn"]),
                cpu_kernel=context_settings.get("cpu_kernel", ""),
            )
            try:
                return context.memory().with_encoder(encoder.memory()), h
            finally:
                encoder.close()
        finally:
            context.close()
    finally:
        model.close()


@contextmanager
def measuring(
    model_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None = None,
    *,
    workers: Sequence[str] = (),
    rpc_timeout: float = DEFAULTS["rpc_timeout"],
    isolate: bool = False,
    vision_precision: VisionPrecision = "exact",
    **settings: Any,
) -> Iterator[tuple[Measure, list[Device]]]:
    """A function that measures one n_gpu_layers, and the devices; with workers in a child process, which can
    be lost. settings: those of `measure`."""
    callbacks = Callbacks(load_native())
    settings["cpu_kernel"] = kernel_for(settings.get("flash_attn", DEFAULTS["flash_attn"]), vision_precision)
    if not workers and not isolate:
        yield (
            lambda n: measure(model_path, mmproj_path, callbacks=callbacks, n_gpu_layers=n, **settings),
            devices(start=True, precision=settings.get("precision")),
        )
        return
    supervisor = Supervisor(workers, rpc_timeout)
    # The child knows no classes of the caller's.
    paths = os.fspath(model_path), None if mmproj_path is None else os.fspath(mmproj_path)
    if settings.get("n_tiles") is not None:
        settings["n_tiles"] = list(settings["n_tiles"])

    def measure_there(n: int) -> tuple[Memory, HParams]:
        found: tuple[Memory, HParams] = supervisor.call(
            callbacks, "", "measure", paths, {"n_gpu_layers": n, **settings}
        )
        return found

    try:
        start = {"start": True, "precision": settings.get("precision")}
        yield measure_there, supervisor.call(callbacks, "", "devices", settings=start)
    finally:
        supervisor.close()
