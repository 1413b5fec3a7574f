"""The C API's devices and model in Python: a model in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from ..errors import ModelError, RequestError
from ..handles import Handle, OneProcess
from ..settings import KvType, Precision
from ..words import brief, show_name
from . import library
from .callbacks import Callbacks
from .context import LocalContext
from .precision import begin as begin_precision
from .repack import usable_layouts
from .types import Device, HParams, TensorInfo

_DEVICE_TYPES = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}


def devices(*, start: bool = False, precision: Precision | None = None) -> list[Device]:
    """All ggml devices of the process, in the order that indices count.

    start:     start each, to find those that cannot be used (`Device.error`)
    precision: of GPUs that are started; None: as they run already, else "fast"

    Raises BackendError when there is no device at all, not even the CPU; RequestError if GPUs run with
    another precision.
    """
    if start:
        choose_precision(precision)
    native = library.load()
    info = native.ffi.new("mllama_device_info *")
    found = []
    native.check(native.lib.mllama_device_get(0, info))
    for index in range(native.lib.mllama_device_count()):
        native.check(native.lib.mllama_device_get(index, info))
        status = native.lib.mllama_device_start(index) if start else library.OK
        found.append(
            Device(
                native.text(info.name),
                native.text(info.description),
                _DEVICE_TYPES.get(info.type, "other"),
                info.memory_free,
                info.memory_total,
                None if status == library.OK else native.last_error(),
            )
        )
    return found


def choose_precision(precision: Precision | None) -> None:
    """How the GPUs of this process compute; before any of them is started. None: as they run already, else
    "fast". Raises RequestError if they run otherwise."""
    begin_precision(precision, lambda: any(device.type in ("gpu", "igpu") for device in devices()))


def _c_path(path: str | os.PathLike[str]) -> bytes:
    """A path as C opens it. Raises ModelError for one that the system cannot have."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        raise ModelError(f"{show_name(path)}: no file can have this name") from None


def device_index(name: str) -> int:
    """The index of a device by its name, whatever the case. Raises RequestError naming those that exist."""
    names = [device.name for device in devices()]
    for index, known in enumerate(names):
        if known.lower() == name.lower():
            return index
    raise RequestError(f"no device {brief(name)}; there are: {', '.join(names)}")


class LocalModel(OneProcess):
    """`mllama_model`, as a `Model`."""

    is_local = True

    def __init__(
        self,
        text_path: str | os.PathLike[str],
        mmproj_path: str | os.PathLike[str] | None,
        callbacks: Callbacks,
        *,
        n_gpu_layers: int = 0,
        vision_device: int = -1,
        devices: Sequence[int] | None = None,
        tensor_split: Sequence[float] | None = None,
        main_gpu: int = -1,
        precision: Precision = "fast",
        use_mmap: bool = True,
        repack: bool = False,
        allow_quantized_vision: bool = False,
        check_only: bool = False,
        no_alloc: bool = False,
    ) -> None:
        """Load, or with check_only read and validate. no_alloc: for contexts that only `reserve`.

        Raises ModelError for a file that is not right, BackendError for memory and devices, RequestError if
        GPUs run with another precision, and what the callbacks raised.
        """
        choose_precision(precision)
        self._precision = precision
        self.native = library.load()
        ffi, lib = self.native.ffi, self.native.lib
        params = ffi.new("mllama_model_params *", lib.mllama_model_default_params())
        params.n_gpu_layers = n_gpu_layers
        params.vision_device = vision_device
        # NULL is "every GPU"; no devices are an array of none.
        c_devices = ffi.NULL if devices is None else ffi.new("int32_t[]", [*devices, -1])
        c_split = ffi.NULL if tensor_split is None else ffi.new("float[]", [*tensor_split, 0.0])
        params.devices, params.n_devices = c_devices, len(devices or ())
        params.tensor_split, params.n_tensor_split = c_split, len(tensor_split or ())
        params.main_gpu = main_gpu
        params.use_mmap = use_mmap
        params.repack = repack
        layouts = ffi.new("char[]", ",".join(usable_layouts()).encode()) if repack else ffi.NULL
        params.repack_layouts = layouts
        params.allow_quantized_vision = allow_quantized_vision
        params.check_only = check_only
        params.no_alloc = no_alloc
        params.progress, params.abort = callbacks.c_progress, callbacks.c_abort

        out = ffi.new("mllama_model **")
        mmproj = ffi.NULL if mmproj_path is None else ffi.new("char[]", _c_path(mmproj_path))
        status = lib.mllama_model_load(_c_path(text_path), mmproj, params, out)
        if status == library.OK:
            self.handle = Handle("this model", out[0], lib.mllama_model_free)
            # C holds the callbacks as long as the model lives.
            self._callbacks = callbacks
        callbacks.check(status)

        hparams = lib.mllama_model_hparams(out[0])
        values = {f.name: getattr(hparams, f.name) for f in fields(HParams) if f.name != "cross_layers"}
        layers = lib.mllama_model_cross_layers(out[0])
        self.hparams = HParams(**values, cross_layers=tuple(layers[i] for i in range(hparams.n_cross_layers)))

    @property
    def layout(self) -> str:
        """As `Model.layout`."""
        with self.handle as pointer:
            return self.native.text(self.native.lib.mllama_model_layout(pointer))

    @property
    def repairs(self) -> tuple[str, ...]:
        """As `Model.repairs`."""
        repairs: list[str] = []
        with self.handle as pointer:
            while line := self.native.text(self.native.lib.mllama_model_repair(pointer, len(repairs))):
                repairs.append(line)
        return tuple(repairs)

    @property
    def size(self) -> int:
        """As `Model.size`."""
        with self.handle as pointer:
            return int(self.native.lib.mllama_model_size(pointer))

    def close(self) -> None:
        """As `Model.close`."""
        self.handle.close()

    def devices(self) -> list[Device]:
        """As `Model.devices`."""
        return devices()

    def tensors(self) -> Iterator[TensorInfo]:
        """As `Model.tensors`."""
        info = self.native.ffi.new("mllama_tensor_info *")
        with self.handle as pointer:
            for index in range(self.native.lib.mllama_model_n_tensors(pointer)):
                self.native.check(self.native.lib.mllama_model_tensor(pointer, index, info))
                yield TensorInfo(
                    self.native.text(info.name),
                    self.native.text(info.type),
                    tuple(info.ne),
                    info.n_bytes,
                    self.native.text(info.device),
                    info.is_vision,
                    self.native.text(info.layout),
                )

    def open_context(
        self,
        callbacks: Callbacks,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_threads: int = 0,
        type_k: KvType = "f16",
        type_v: KvType = "f16",
        flash_attn: bool = True,
        offload_kqv: bool = True,
        cpu_kernel: str = "",
    ) -> LocalContext:
        """As `Model.open_context`."""
        return LocalContext(
            self.native,
            self.handle,
            self.hparams,
            callbacks,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_threads=n_threads,
            type_k=type_k,
            type_v=type_v,
            flash_attn=flash_attn,
            exact=self._precision == "exact",
            offload_kqv=offload_kqv,
            cpu_kernel=cpu_kernel,
        )


def open_model(
    text_path: str | os.PathLike[str],
    mmproj_path: str | os.PathLike[str] | None,
    *,
    callbacks: Callbacks,
    vision_device: str = "auto",
    devices: Sequence[str] | None = None,
    **settings: Any,
) -> LocalModel:
    """A LocalModel whose devices are given by name; vision_device "auto" and "cpu" too. Raises RequestError
    for a name that does not exist, and what LocalModel raises."""
    special = {"auto": -1, "cpu": -2}
    vision = special.get(vision_device.lower())
    return LocalModel(
        text_path,
        mmproj_path,
        callbacks,
        vision_device=device_index(vision_device) if vision is None else vision,
        devices=None if devices is None else [device_index(name) for name in devices],
        **settings,
    )
