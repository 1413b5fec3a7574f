"""What is in model files: layout, shape, types, memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..backend import library as _native
from ..backend.callbacks import Callbacks
from ..backend.local import LocalModel
from ..backend.measure import measure
from ..backend.types import HParams
from ..errors import ModelError
from ..gguf.reader import GGUFFile, read_gguf
from ..words import show_name

# The key that our converter writes and no other.
CONVERTER_KEY = "mllama.converter"
_FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
CONTEXT_SIZES = (2048, 4096, 8192, 32768, 131072)


@dataclass(frozen=True)
class FileInfo:
    """One file, or all files of a split model. types: bytes of weights by ggml type, of text and of vision
    tensors."""

    path: Path
    n_files: int
    size: int  # bytes
    part: Literal["text", "vision", "text and vision"]
    name: str
    converter: str  # "" for files of others
    n_tensors: int
    text_types: dict[str, int]
    vision_types: dict[str, int]

    @property
    def quantized(self) -> bool:
        """Any matrix is."""
        return any(kind not in _FLOAT_TYPES for kind in (*self.text_types, *self.vision_types))


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes for one n_ctx on the CPU, caches as F16, as `plan` measures them."""

    n_ctx: int  # tokens
    weights: int
    self_kv: int
    cross_kv: int  # of one image with all tiles
    compute: int  # text buffers
    vision: int  # while an image is encoded

    @property
    def total(self) -> int:
        return self.weights + self.self_kv + self.cross_kv + self.compute + self.vision


@dataclass(frozen=True)
class ModelInfo:
    """Files that make a model together. For a projector alone layout and hparams are None, the rest is empty.

    layout: "canonical", "A" (two files of Ollama 0.4 to 0.6 and of the Hugging Face hub), "B" (one file of
    Ollama since 0.7), "text only" or "unknown"
    repairs: what loading puts right or fills in, a line each
    """

    files: tuple[FileInfo, ...]
    layout: str | None
    repairs: tuple[str, ...]
    hparams: HParams | None
    memory: tuple[MemoryNeed, ...]


def model_info(paths: Sequence[str | os.PathLike[str]]) -> list[ModelInfo]:
    """What is in these files. One text file and one projector are read as one model, others each by itself.

    A model is checked as for loading, without reading its weights. Raises ModelError.
    """
    files = [read_gguf(path) for path in paths]
    for file in files:
        if file.architecture != "mllama" or not (file.has_text or file.has_vision):
            named = show_name(file.architecture) or "not named"
            raise ModelError(f"{file.path}: not a mllama model (architecture {named})")
    text = [file for file in files if file.has_text]
    projectors = [file for file in files if not file.has_text]
    if len(text) == 1 and len(projectors) == 1 and not text[0].has_vision:
        return [_model_info(text[0], projectors[0])]
    return [_model_info(file, None) for file in files]


def _model_info(file: GGUFFile, projector: GGUFFile | None) -> ModelInfo:
    parts = (file,) if projector is None else (file, projector)
    infos = tuple(_file_info(part) for part in parts)
    if not file.has_text:
        return ModelInfo(infos, None, (), None, ())
    model = LocalModel(
        file.path,
        projector.path if projector else None,
        Callbacks(_native.load()),
        allow_quantized_vision=True,  # only shown here, never run
        check_only=True,
    )
    hparams, layout, repairs = model.hparams, model.layout, model.repairs
    model.close()
    sizes = [n for n in CONTEXT_SIZES if n < hparams.n_ctx_train] + [hparams.n_ctx_train]
    paths = (file.path, projector.path if projector else None)
    return ModelInfo(infos, layout, repairs, hparams, tuple(_need(*paths, n) for n in sizes))


def _need(text: Path, projector: Path | None, n_ctx: int) -> MemoryNeed:
    callbacks = Callbacks(_native.load())
    memory, _ = measure(
        text, projector, callbacks=callbacks, n_ctx=n_ctx, vision_device="cpu", allow_quantized_vision=True
    )
    (cpu,) = memory.devices
    return MemoryNeed(n_ctx, cpu.mapped + cpu.weights, cpu.self_kv, cpu.cross_kv, cpu.compute, cpu.vision)


def _file_info(file: GGUFFile) -> FileInfo:
    types: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for tensor in file.tensors:
        types[tensor.name.startswith(("v.", "mm."))][tensor.type_name] += tensor.n_bytes
    return FileInfo(
        path=file.path,
        n_files=len(file.paths),
        size=file.size,
        part="text and vision"
        if file.has_text and file.has_vision
        else "text"
        if file.has_text
        else "vision",
        name=str(file.keys.get("general.name", "")),
        converter=str(file.keys.get(CONVERTER_KEY, "")),
        n_tensors=len(file.tensors),
        text_types=dict(types[False].most_common()),
        vision_types=dict(types[True].most_common()),
    )
