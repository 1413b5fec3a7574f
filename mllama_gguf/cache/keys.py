"""When a result of an earlier computation is used again: when its key is the same.

A key is a sha256 of everything that the bits of a result depend on. If something is missing in it, a wrong
result is served; if too much is in it, nothing is found again.

States depend on:
- the image's pixels and tile grid, and the version of the code that cuts images into tiles;
- the weights of the vision encoder, by content;
- the device that they are on and the code that computes there; flash_attn; precision.

image_kv depends on:
- the states, by their key;
- the weights of k, v and k's norm of all cross-attention layers, by content, and how loading changed them
  (layout and repairs);
- the devices of these weights and the layouts that they were repacked to, and the code there and on
  the CPU;
- type_k, type_v, flash_attn, offload_kqv, precision.

prefix_kv depends on:
- the tokens;
- the text file, by path, inode, size and modification time, because there are gigabytes to hash;
- layout and repairs, and the devices of all text weights, the layouts that they were repacked to, and the
  code there and on the CPU;
- type_k, type_v, flash_attn, offload_kqv, precision, repack, n_batch, n_threads.

Code is the build of libmllama, its CPU kernel, the version of ggml, and the device's name and description.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..backend.base import Model
from ..errors import ModelError
from ..gguf.reader import read_gguf
from ..handles import OneProcess
from ..waiting import acquire
from ..words import os_reason
from .disk import ImageCache
from .identity import FileStamp, are_settled, code_identity, file_stamps, weights_sha256

# The weights that make image_kv of states, in the files of all layouts.
_IMAGE_KV_WEIGHTS = re.compile(r"blk\.\d+\.cross_attn_(k_proj|v_proj|k_norm)\.weight")


class Tiles(Protocol):
    """What an image's states depend on: its pixels and its tile grid."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class KeySettings:
    """The settings that results depend on; see `Mllama`.

    preprocess: the version of the code that cuts images into tiles
    cpu_kernel: of all contexts of the model
    """

    preprocess: int
    cpu_kernel: str
    flash_attn: bool
    precision: str
    type_k: str
    type_v: str
    offload_kqv: bool
    repack: bool
    n_batch: int


class Keys(OneProcess):
    """The keys of one model's results. Safe from several threads.

    Hashing the weights of an 11B model's encoder takes seconds. So that opening a model stays quick, it is
    done when the first key is asked for; the digest is kept on disk.
    """

    def __init__(
        self,
        model: Model,
        model_path: Path,
        mmproj_path: Path | None,
        settings: KeySettings,
        disk: ImageCache | None,
    ) -> None:
        """disk: where digests of weights are kept; None: weights are named by their files, because no other
        process will see the keys. Raises ModelError."""
        self._model = model
        self._settings = settings
        self._disk = disk
        self._text = _Weights(model_path, disk)
        self._vision = self._text if mmproj_path is None else _Weights(mmproj_path, disk)
        self._lock = threading.Lock()  # of what follows, which is found once
        self._states = self._image_kv = ""

    def states(self, tiles: Tiles, stop: Callable[[], bool] = lambda: False) -> str:
        """The key of an image's states. stop: asked while weights are hashed; True: stop with Aborted."""
        words = f"{self._encoder(stop)}/{tiles.rows}x{tiles.columns}/{tiles.sha256}"
        return hashlib.sha256(words.encode()).hexdigest()

    def image_kv(self, states_key: str, stop: Callable[[], bool] = lambda: False) -> str:
        """The key of the image_kv of states with that key. stop: as in `states`."""
        return hashlib.sha256(f"{self._image_kv_identity(stop)}/{states_key}".encode()).hexdigest()

    def prefix_kv(self, tokens: Sequence[int], n_threads: int) -> str:
        """The key of what the first tokens of a prompt leave in the self-attention cache, before any
        image. n_threads: of the context."""
        places = sorted((t.name, t.device, t.layout) for t in self._model.tensors() if not t.is_vision)
        s = self._settings
        parts = (
            (self._text.stamps, self._model.layout, self._model.repairs),
            places,
            self._code({device for _, device, _ in places}),
            (s.type_k, s.type_v, s.flash_attn, s.offload_kqv, s.precision, s.repack, s.n_batch, n_threads),
            list(tokens),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _encoder(self, stop: Callable[[], bool]) -> str:
        """Everything but the pixels that the bits of states depend on."""
        with _locked(self._lock, stop):
            if not self._states:
                vision = [tensor for tensor in self._model.tensors() if tensor.is_vision]
                weights = self._vision.identity([tensor.name for tensor in vision], stop)
                (code,) = self._code({vision[0].device})
                s = self._settings
                self._states = f"{weights}/{s.preprocess}/{code}/{s.flash_attn}/{s.precision}"
            return self._states

    def _image_kv_identity(self, stop: Callable[[], bool]) -> str:
        """Everything but the states that the bits of image_kv depend on."""
        with _locked(self._lock, stop):
            if not self._image_kv:
                places = {
                    t.name: (t.device, t.layout)
                    for t in self._model.tensors()
                    if _IMAGE_KV_WEIGHTS.fullmatch(t.name)
                }
                s = self._settings
                parts = (
                    (self._text.identity(places, stop), self._model.layout, self._model.repairs),
                    sorted(places.items()),
                    self._code({device for device, _ in places.values()}),
                    (s.type_k, s.type_v, s.flash_attn, s.offload_kqv, s.precision),
                )
                self._image_kv = repr(parts)
            return self._image_kv

    def _code(self, devices: Collection[str]) -> list[str]:
        known = self._model.devices()
        return [code_identity(device, known, self._settings.cpu_kernel) for device in sorted(devices)]


class _Weights:
    """Names the weights of one model file by their content, as far as the file is still what was loaded."""

    def __init__(self, path: Path, disk: ImageCache | None) -> None:
        self._path = path.absolute()  # the working directory may change
        self._disk = disk
        self._found: dict[str, str] = {}
        try:
            self.stamps: tuple[FileStamp, ...] = file_stamps(self._path)
        except OSError as e:
            raise ModelError(f"{path}: {os_reason(e)}") from e

    def identity(self, tensors: Collection[str], stop: Callable[[], bool]) -> str:
        """Names the content of these tensors. A file that went away or changed after it was loaded is named
        by its stamps. Raises Aborted."""
        if self._disk is None:
            return repr(self.stamps)
        name = hashlib.sha256(repr((self.stamps, sorted(tensors))).encode()).hexdigest()
        if name not in self._found:
            self._found[name] = self._disk.read_digest(name) or self._hash(name, self._disk, tensors, stop)
        return self._found[name]

    def _hash(self, name: str, disk: ImageCache, tensors: Collection[str], stop: Callable[[], bool]) -> str:
        try:
            sha256 = weights_sha256(read_gguf(self._path), tensors, stop)
            if file_stamps(self._path) != self.stamps:
                return repr(self.stamps)
        except (ModelError, OSError):
            return repr(self.stamps)
        if are_settled(self.stamps):
            disk.add_digest(name, sha256)
        return sha256


@contextmanager
def _locked(lock: threading.Lock, stop: Callable[[], bool]) -> Iterator[None]:
    """A lock, waited for as long as `stop` says False. Raises Aborted."""
    acquire(lock, stop, "reading the model's weights was stopped")
    try:
        yield
    finally:
        lock.release()
