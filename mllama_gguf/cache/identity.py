"""What tells files, weights and code apart: the parts that keys are made of."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

from ..backend import library
from ..backend.types import Device
from ..errors import Aborted
from ..gguf.reader import GGUFFile

# path, inode, bytes, modification time in nanoseconds
FileStamp: TypeAlias = tuple[str, int, int, int]

_CHUNK = 16 << 20
# A file changed so lately may change again without its modification time telling.
_SETTLED_SECONDS = 2.0


def file_stamps(path: Path) -> tuple[FileStamp, ...]:
    """What tells the files of a model from others, and from what they were before they changed. Nothing of
    them is read. Raises OSError."""
    infos = [(str(part), part.stat()) for part in _parts(Path(os.path.realpath(path)))]
    return tuple((name, info.st_ino, info.st_size, info.st_mtime_ns) for name, info in infos)


def are_settled(stamps: Collection[FileStamp]) -> bool:
    """Whether another content of these files would show in their stamps."""
    return all(time.time() - changed / 1e9 > _SETTLED_SECONDS for _, _, _, changed in stamps)


def _parts(path: Path) -> list[Path]:
    """All files of a model of which this is the first."""
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if not match:
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(match[1])}-?????-of-{match[2]}.gguf"))


def weights_sha256(file: GGUFFile, tensors: Collection[str], stop: Callable[[], bool] = lambda: False) -> str:
    """Hex digest of some tensors of a GGUF file, as the projector's: their names, shapes, types and data, and
    the file's keys. Other tensors and the vocabulary beside them do not count.

    stop: asked now and then; True: stop with Aborted

    Raises ModelError for a file that cannot be read or is shorter than its table says.
    """
    keys = {k: v for k, v in sorted(file.keys.items()) if not k.startswith(("general.", "tokenizer."))}
    digest = hashlib.sha256(repr(keys).encode())
    wanted = set(tensors)
    for tensor in sorted(file.tensors, key=lambda t: (t.part, t.offset)):
        if tensor.name in wanted:
            digest.update(repr((tensor.name, tensor.ne, tensor.type)).encode())
            for chunk in file.data(tensor, _CHUNK):
                if stop():
                    raise Aborted("reading the model's weights was stopped")
                digest.update(chunk)
    return digest.hexdigest()


def code_identity(device: str, devices: Sequence[Device], cpu_kernel: str) -> str:
    """Names what computes on a device (as ggml names it; one of `devices`) to the bit: this build of
    libmllama, its kernel for the CPU, ggml, the hardware (of a worker, its address), and what helps the
    CPU."""
    native = library.load()
    ggml = native.text(native.lib.mllama_ggml_version_loaded())
    hardware = [(d.name, d.description) for d in devices if d.name == device or d.type == "accel"]
    return f"{_sha256(native.path)}/{cpu_kernel}/{ggml}/{device}/{hardware}"


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
