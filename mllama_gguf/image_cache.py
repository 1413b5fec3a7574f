"""What the vision encoder made of pictures, on disk: what any process saw before is not encoded again.

Where: $MLLAMA_IMAGE_CACHE, or `images` in the platform's cache directory of this package. How much:
$MLLAMA_IMAGE_CACHE_SIZE, in bytes or like "500 MB", 4 GB if it is not set; the entries used longest ago go
first (a file's modification time is when it was last used). The directory is readable by its owner only, for
the entries tell what was in the pictures.

An entry is one file, written under another name and renamed: it is there as a whole or not at all, and
processes need no lock. Each has a checksum; one that does not fit is removed. Values are float32, as the
encoder left them, because a reply must not depend on whether the cache was used. They are read, not mapped:
the checksum needs every page anyway, and a mapped file that someone truncates kills the process.

No failure of the disk is a failure of the caller: it is logged as a warning, once, and work goes on.

Entry: 64 bytes of header, little-endian: magic "mllama\\x00\\x01", the key's 32 bytes, n_tiles, n_positions,
n_embd, aspect_ratio_id, crc32 of header (up to here) and values, 4 zero bytes; then the values.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .embedding import ImageEmbedding
from .errors import Aborted, ImageError, RequestError
from .gguf_file import GGUFFile, read_gguf

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "MLLAMA_IMAGE_CACHE"
SIZE_VARIABLE = "MLLAMA_IMAGE_CACHE_SIZE"
DEFAULT_MAX_BYTES = 4_000_000_000  # some forty pictures of four tiles, of the 11B model

_HEADER = struct.Struct("<8s32s4I")
_CRC = struct.Struct("<I4x")
_MAGIC = b"mllama\x00\x01"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CHUNK = 16 << 20
# A temporary file this old belongs to a process that died.
_STALE_SECONDS = 3600.0
# A file changed so lately may change again without its modification time telling.
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds. Sizes in bytes."""

    directory: Path
    n_entries: int
    n_bytes: int
    max_bytes: int


def default_directory() -> Path:
    """Where the cache is if nobody says otherwise."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("mllama_gguf") / "images"


def default_max_bytes() -> int:
    """Most bytes that the cache takes. Raises RequestError if the environment's size is none."""
    words = os.environ.get(SIZE_VARIABLE, "").strip()
    if not words:
        return DEFAULT_MAX_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", words, re.IGNORECASE | re.ASCII)
    unit = match[2].upper() if match else ""
    if match is None or (unit and not unit.endswith("B")):
        raise RequestError(f"{SIZE_VARIABLE} is {words!r}; give bytes, or a size like '500 MB' (0: no cache)")
    return int(float(match[1]) * _UNITS[unit])


class ImageCache:
    """Embeddings by key in a directory of which other processes may use and change every file."""

    def __init__(self, directory: str | os.PathLike[str] | None = None, max_bytes: int | None = None) -> None:
        """directory, max_bytes: None: as the environment says. Raises RequestError; touches no file."""
        self.directory = default_directory() if directory is None else Path(directory)
        self.max_bytes = default_max_bytes() if max_bytes is None else max_bytes
        self._warned = False

    def get(self, key: str) -> ImageEmbedding | None:
        """The embedding of that key, which now counts as the last one used; None if there is none."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                embedding = _read(file.fileno(), key)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._warn(e)
            return None
        except ImageError as e:
            logger.warning("%s: %s; the entry is dropped", path, e)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a directory that may only be read is a fine cache too
            os.utime(path)
        return embedding

    def add(self, embedding: ImageEmbedding) -> None:
        """Keep an embedding, and remove the oldest entries that no longer fit. One that is larger than the
        whole cache is not kept."""
        n_bytes = _HEADER.size + _CRC.size + embedding.states.nbytes
        if n_bytes > self.max_bytes:
            return
        try:
            self._shrink(self.max_bytes - n_bytes)
            self._write(self._path(embedding.key), _pack(embedding), embedding.states.data)
        except OSError as e:
            self._warn(e)

    def info(self) -> CacheInfo:
        """What is there now."""
        sizes = [size for _, size, _ in self._entries()]
        return CacheInfo(self.directory, len(sizes), sum(sizes), self.max_bytes)

    def clear(self) -> CacheInfo:
        """Remove everything, what is remembered of projectors included. Returns what was there. Raises
        OSError for what cannot be removed."""
        before = self.info()
        for pattern in ("*.states", "*.projector", "*.tmp"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)
        return before

    def projector_sha256(
        self, path: Path, tensors: Collection[str], stop: Callable[[], bool] = lambda: False
    ) -> str:
        """Names the content of a projector: see `projector_sha256`. Remembered for the file's path, inode,
        size and modification time, because reading 2 GB takes seconds. Raises ModelError, Aborted."""
        info = path.stat()
        identity = f"{path.resolve()}/{info.st_ino}/{info.st_size}/{info.st_mtime_ns}"
        memo = self.directory / f"{hashlib.sha256(identity.encode()).hexdigest()}.projector"
        with suppress(OSError, ValueError):
            words = memo.read_text("ascii")
            if re.fullmatch("[0-9a-f]{64}", words):
                return words
        sha256 = projector_sha256(read_gguf(path), tensors, stop)
        if time.time() - info.st_mtime > _SETTLED_SECONDS:
            try:
                self._write(memo, sha256.encode())
            except OSError as e:
                self._warn(e)
        return sha256

    # ---- files ---------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.states"

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(when it was last used, bytes, path) of each entry; other processes may remove them meanwhile."""
        for path in self.directory.glob("*.states"):
            with suppress(OSError):
                info = path.stat()
                yield info.st_mtime, info.st_size, path

    def _shrink(self, max_bytes: int) -> None:
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        for path in self.directory.glob("*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def _write(self, path: Path, *parts: bytes | memoryview) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=self.directory, suffix=".tmp")
        try:
            with open(fd, "wb", buffering=0) as file:
                for part in parts:
                    rest = memoryview(part).cast("B")
                    while rest:
                        rest = rest[file.write(rest) :]
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            words = error.strerror or str(error)
            logger.warning("%s: the image cache cannot be used: %s", error.filename or self.directory, words)


def projector_sha256(
    file: GGUFFile, tensors: Collection[str], stop: Callable[[], bool] = lambda: False
) -> str:
    """Hex digest of what the encoder reads of a GGUF file: keys, and names, shapes, types and data of the
    named tensors. The text model and the vocabulary beside them do not count.

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
                    raise Aborted("reading the projector was stopped")
                digest.update(chunk)
    return digest.hexdigest()


def code_identity(device: str) -> str:
    """Names what computes on a device (as ggml names it) to the bit: this build of libmllama, its kernel for
    the CPU as $MLLAMA_CPU_KERNEL and the processor have it now, ggml, and the hardware."""
    from . import _native
    from .runtime import devices

    native = _native.load()
    library = _sha256(native.path)
    kernel = native.lib.mllama_cpu_kernel()
    ggml = native.text(native.lib.mllama_ggml_version_loaded())
    hardware = next((d.description for d in devices() if d.name == device), "")
    name = "" if kernel == native.ffi.NULL else native.text(kernel)
    return f"{library}/{name}/{ggml}/{device}/{hardware}"


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- entries -----------------------------------------------------------------------------------------------


def _pack(embedding: ImageEmbedding) -> bytes:
    header = _HEADER.pack(
        _MAGIC, bytes.fromhex(embedding.key), *embedding.states.shape, embedding.aspect_ratio_id
    )
    return header + _CRC.pack(zlib.crc32(embedding.states.data, zlib.crc32(header)))


def _read(fd: int, key: str) -> ImageEmbedding:
    """Raises ImageError for an entry that is not as it was written."""
    with open(fd, "rb", buffering=0, closefd=False) as file:
        header, crc = file.read(_HEADER.size), file.read(_CRC.size)
        if len(header) < _HEADER.size or len(crc) < _CRC.size:
            raise ImageError("truncated")
        magic, digest, *shape, aspect_ratio_id = _HEADER.unpack(header)
        n_bytes = 4 * shape[0] * shape[1] * shape[2]
        if magic != _MAGIC or digest.hex() != key or os.fstat(fd).st_size != file.tell() + n_bytes:
            raise ImageError("not what its name says")
        states = np.empty(shape, np.float32)
        rest = states.data.cast("B")
        while rest:
            n = file.readinto(rest)
            if not n:
                raise ImageError("truncated")
            rest = rest[n:]
    if _CRC.pack(zlib.crc32(states.data, zlib.crc32(header))) != crc:
        raise ImageError("its checksum does not fit")
    return ImageEmbedding(states, aspect_ratio_id, key)
