"""What every number of offloaded layers costs on every device, before anything is loaded.

Nothing here is estimated: the model is opened without memory (`no_alloc`), ggml lays out the caches and the
largest graphs as it would for real, and says how large its buffers would be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checks import Whole, checked
from ..errors import RequestError
from ..settings import MAX_PARALLEL, Settings
from ..words import parse_size
from .measure import Measure, measuring
from .types import Device, DeviceMemory, Memory

# What "auto" leaves free on a device: for the driver, other programs, and what kernels take at run time.
MARGIN_BYTES = 256 * 1024 * 1024
MARGIN_SHARE = 0.05


@dataclass(frozen=True)
class Setting:
    """One n_gpu_layers. lacking: the devices that have too little memory for it."""

    n_gpu_layers: int
    devices: tuple[DeviceMemory, ...]
    lacking: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.lacking


@dataclass(frozen=True)
class Plan:
    """All settings, from no layer to all. n_tiles: of each image; limits: most bytes on a device; parallel:
    conversations, each with all that."""

    n_layer: int
    n_ctx: int
    n_tiles: tuple[int, ...]
    limits: dict[str, int]
    settings: tuple[Setting, ...]
    parallel: int = 1

    @property
    def best(self) -> int | None:
        """The largest n_gpu_layers that fits; None: not even 0 does."""
        return max((s.n_gpu_layers for s in self.settings if s.fits), default=None)


def make_plan(
    model_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None = None,
    *,
    budget: str | Sequence[str | int] | None = None,
    n_gpu_layers: int | None = None,
    n_tiles: Sequence[int] | None = None,
    parallel: int = 1,
    **settings: Any,
) -> Plan:
    """What every n_gpu_layers takes, and which is the largest that fits.

    budget:       most bytes on each device to offload to, in order, as "8GiB,4GiB" or numbers; "NAME=8GiB"
                  names any device, "CPU=16GiB" too. None: what is free there, less a margin
    n_gpu_layers: only this one
    n_tiles:      of each image in the cache; None: one image with all its tiles
    parallel:     conversations of a scheduler, each with n_ctx tokens and such images of its own
    settings:     those of `Settings`

    Raises ModelError, RequestError, BackendError.
    """
    chosen = Settings.checked(settings)
    parallel = checked("parallel", Whole(1, min(MAX_PARALLEL, chosen.n_batch)), parallel)
    for_model = chosen.for_model()
    with measuring(
        model_path,
        mmproj_path,
        workers=chosen.rpc_servers,
        rpc_timeout=chosen.rpc_timeout,
        isolate=chosen.isolate,
        n_ctx=chosen.n_ctx,
        n_tiles=n_tiles,
        max_tiles=chosen.max_tiles,
        parallel=parallel,
        n_threads=chosen.n_threads or 0,
        vision_precision=chosen.vision_precision,
        **for_model,
        **chosen.for_context(),
    ) as (measure_one, devices):
        limits = device_limits(devices, for_model, budget)
        first, h = measure_one(n_gpu_layers or 0)
        found = {n_gpu_layers or 0: first}
        if n_gpu_layers is None and offload_devices(devices, for_model):
            found |= {n: measure_one(n)[0] for n in range(1, h.n_layer + 2)}
    if n_tiles is None:
        n_tiles = [min(chosen.max_tiles or h.max_tiles, h.max_tiles)] if h.has_vision else []
    rows = tuple(Setting(n, m.devices, lacking(m, limits)) for n, m in found.items())
    return Plan(h.n_layer, chosen.context_length(h.n_ctx_train), tuple(n_tiles), limits, rows, parallel)


def largest_fitting(measure_one: Measure, limits: Mapping[str, int]) -> int:
    """The largest n_gpu_layers within the limits, in few measurements: more layers take more on every device.

    0 where nothing fits, for the CPU then pages.
    """
    memory, h = measure_one(-1)
    most = h.n_layer + 1
    if not lacking(memory, limits):
        return most
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        if lacking(measure_one(middle)[0], limits):
            most = middle
        else:
            least = middle
    return least


def lacking(memory: Memory, limits: Mapping[str, int]) -> tuple[str, ...]:
    """The devices on which more is wanted than there is."""
    return tuple(d.device for d in memory.devices if d.device in limits and d.peak > limits[d.device])


def offload_devices(devices: Sequence[Device], settings: Mapping[str, Any]) -> list[Device]:
    """Those that layers go to, workers first. main_gpu counts those that cannot be used too."""
    gpus = [device for device in devices if device.type in ("gpu", "igpu")]
    gpus.sort(key=lambda device: not device.name.startswith("RPC"))
    if settings.get("devices") is not None:
        wanted = [name.lower() for name in settings["devices"]]
        gpus = sorted(
            (device for device in gpus if device.name.lower() in wanted),
            key=lambda device: wanted.index(device.name.lower()),
        )
    main_gpu = settings.get("main_gpu", -1)
    chosen = gpus if main_gpu < 0 else gpus[main_gpu : main_gpu + 1]
    return [device for device in chosen if device.error is None]


def device_limits(
    devices: Sequence[Device],
    settings: Mapping[str, Any],
    budget: str | Sequence[str | int] | None = None,
) -> dict[str, int]:
    """Most bytes on each device by name. Without a budget what is free there less a margin; the CPU, and a
    device that does not say what it has, have no limit. Raises RequestError."""
    targets = offload_devices(devices, settings)
    limits = {
        device.name: max(0, device.memory_free - max(MARGIN_BYTES, int(MARGIN_SHARE * device.memory_free)))
        for device in devices
        if device.type in ("gpu", "igpu") and device.memory_total > 0
    }
    if budget is None:
        return limits
    names = {device.name.lower(): device.name for device in devices}
    place = 0
    for item in budget.split(",") if isinstance(budget, str) else budget:
        name, _, amount = str(item).rpartition("=")
        n_bytes = parse_size(amount, "--budget")
        if name:
            if name.strip().lower() not in names:
                known = ", ".join(names.values())
                raise RequestError(f"--budget: no device {name.strip()!r}; there are: {known}")
            limits[names[name.strip().lower()]] = n_bytes
        elif place < len(targets):
            limits[targets[place].name] = n_bytes
            place += 1
        else:
            names_of = ", ".join(device.name for device in targets) or "there are none"
            raise RequestError(
                f"--budget: more amounts than devices to offload to ({names_of}); NAME=AMOUNT names one, "
                "as in CPU=8GiB"
            )
    return limits


def with_tiles(memory: DeviceMemory, from_tiles: int, to_tiles: int) -> DeviceMemory:
    """The same for images of another number of tiles in all: their cache is one row a position."""
    return replace(memory, cross_kv=memory.cross_kv * to_tiles // from_tiles if from_tiles else 0)
