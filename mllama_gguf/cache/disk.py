"""What was computed of pictures, on disk: what any process saw before is not computed again.

Of a picture two things are kept, and one of the tokens before it. The picture's states are what the vision
encoder makes of it, for whatever reads them. Its filling is what the text model makes of the states: keys and
values of all cross-attention layers, as they lie in the cache of a context; with it, a picture that is asked
about again needs no states. For the 11B model on the CPU a tile takes 26 MB of states and 79 MB of filling;
the states cost far more time to make again. The prefix is what the tokens before a prompt's first picture (in
a chat, the system's message) leave in the self-attention cache: 0.2 MB a token of the 11B model. Fillings and
prefixes have at most half of the room, and where room is needed the entries used longest ago go, of all kinds
(a file's modification time is when it was last used; a use of the filling counts for the states too).

Where: $MLLAMA_IMAGE_CACHE, or `images` in the platform's cache directory of this package. How much:
$MLLAMA_IMAGE_CACHE_SIZE, in bytes or like "500 MB", 4 GB if it is not set. The directory is readable by its
owner only, for the entries tell what was in the pictures.

An entry is one file, written under another name and renamed: it is there as a whole or not at all, and
processes need no lock. Each has a checksum; one that does not fit is removed. Values are what was computed,
to the bit, because a reply must not depend on whether the cache was used. States are read. A filling of a
picture alone, whose place is in memory, is mapped, and its checksum found while it is used already: like a
model's file it must not be changed by others from then on, but it may be removed.

No failure of the disk is a failure of the caller: it is logged as a warning, once, and work goes on.

States: 64 bytes of header, little-endian: magic "mllama\\x00\\x01", the key's 32 bytes, n_tiles, n_positions,
n_embd, aspect_ratio_id, crc32 of header (up to here) and values, 4 zero bytes; then the values.
Filling: 64 bytes of header: magic "mllama\\x00\\x03", the key's 32 bytes, number of bytes that follow it (8
bytes), 16 zero bytes; then these; then crc32 of all before it. Written and read in pieces, for it is large.
Prefix: the same.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..backend.types import Device
from ..errors import Aborted, ImageError
from ..gguf.reader import GGUFFile, read_gguf
from ..vision.embedding import ImageEmbedding
from ..words import parse_size

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "MLLAMA_IMAGE_CACHE"
SIZE_VARIABLE = "MLLAMA_IMAGE_CACHE_SIZE"
DEFAULT_MAX_BYTES = 4_000_000_000  # twenty pictures of four tiles of the 11B model, six of them with filling

Kind: TypeAlias = Literal["filling", "prefix"]

_HEADER = struct.Struct("<8s32s4I")
_CRC = struct.Struct("<I4x")
_MAGIC = b"mllama\x00\x01"
_FILLING_HEADER = struct.Struct("<8s32sQ16x")
_FILLING_CRC = struct.Struct("<I")
_FILLING_MAGIC = b"mllama\x00\x03"
_KINDS = ("*.states", "*.filling", "*.prefix")
_CHUNK = 16 << 20
# Of a filling. What is above 10 MB ggml's RPC client asks the worker for by its hash first, and the worker
# may keep it in a cache of its own.
PIECE = 8 << 20
# A temporary file this old belongs to a process that died.
_STALE_SECONDS = 3600.0
# A file changed so lately may change again without its modification time telling.
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds: states, fillings, prefixes, and the bytes of all."""

    directory: Path
    n_states: int
    n_fillings: int
    n_prefixes: int
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
    return parse_size(words, SIZE_VARIABLE) if words else DEFAULT_MAX_BYTES


class ImageCache:
    """States and fillings by key in a directory of which other processes may use and change every file."""

    def __init__(self, directory: str | os.PathLike[str] | None = None, max_bytes: int | None = None) -> None:
        """directory, max_bytes: None: as the environment says. Raises RequestError; touches no file."""
        self.directory = default_directory() if directory is None else Path(directory)
        self.max_bytes = default_max_bytes() if max_bytes is None else max_bytes
        self._warned = False

    # ---- states --------------------------------------------------------------------------------------------

    def get(self, key: str) -> ImageEmbedding | None:
        """The embedding of that key, which now counts as the last one used; None if there is none."""
        path = self._path(key, "states")
        try:
            with path.open("rb") as file:
                embedding = _read(file.fileno(), key)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._warn(e)
            return None
        except ImageError as e:
            self._drop(path, e)
            return None
        self.touch(key)
        return embedding

    def touch(self, key: str) -> None:
        """Let the states of that key, if there are any, count as the last ones used."""
        _touch(self._path(key, "states"))

    def add(self, embedding: ImageEmbedding) -> None:
        """Keep an embedding, and remove the oldest entries that no longer fit. One that is larger than the
        whole cache is not kept."""
        n_bytes = _HEADER.size + _CRC.size + embedding.states.nbytes
        if n_bytes > self.max_bytes:
            return
        try:
            self._shrink(self.max_bytes - n_bytes)
            self._write(self._path(embedding.key, "states"), [_pack(embedding), embedding.states.data])
        except OSError as e:
            self._warn(e)

    # ---- fillings ------------------------------------------------------------------------------------------

    # Prefixes likewise: kind says which.

    def has_filling(self, key: str, kind: Kind = "filling") -> bool:
        """Whether there is one of that key, as far as can be told without reading it."""
        try:
            return self._path(key, kind).is_file()
        except OSError:
            return False

    def filling(self, key: str, n_bytes: int, kind: Kind = "filling") -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of a filling, in order, in pieces, each there until the next one is asked for; it then
        counts as the last one used.

        n_bytes: how many they must be

        Raises ImageError, after the last piece too, when those that came are not to be used: the entry is
        damaged, or went away.
        """
        path = self._path(key, kind)
        try:
            with path.open("rb", buffering=0) as file:
                yield from _read_filling(file, key, n_bytes)
        except OSError as e:
            if not isinstance(e, FileNotFoundError):
                self._warn(e)
            raise ImageError(f"{path}: {e.strerror or e}") from e
        except ImageError as e:
            self._drop(path, e)
            raise
        _touch(path)

    def is_intact(self, key: str, n_bytes: int) -> bool:
        """Whether a filling is as it was written; if not, it is removed."""
        try:
            for _ in self.filling(key, n_bytes):
                pass
        except ImageError:
            return False
        return True

    def filling_place(self, key: str) -> tuple[Path, int]:
        """The file in which they are, and where in it they begin."""
        return self._path(key, "filling"), _FILLING_HEADER.size

    def add_filling(
        self, key: str, n_bytes: int, pieces: Iterable[npt.NDArray[np.uint8]], kind: Kind = "filling"
    ) -> None:
        """Keep a filling, and remove the oldest entries that no longer fit. One that is larger than half of
        the cache is not kept. Raises what `pieces` raises."""
        size = _FILLING_HEADER.size + n_bytes + _FILLING_CRC.size
        if size > self.max_bytes // 2:
            return
        try:
            self._shrink(self.max_bytes // 2 - size, _KINDS[1:])
            self._shrink(self.max_bytes - size)
            self._write(self._path(key, kind), _filling_parts(key, n_bytes, pieces))
        except OSError as e:
            self._warn(e)

    # ---- all of it -----------------------------------------------------------------------------------------

    def info(self) -> CacheInfo:
        """What is there now."""
        states, fillings, prefixes = ([size for _, size, _ in self._entries([kind])] for kind in _KINDS)
        n_bytes = sum(states) + sum(fillings) + sum(prefixes)
        counts = len(states), len(fillings), len(prefixes)
        return CacheInfo(self.directory, *counts, n_bytes, self.max_bytes)

    def clear(self) -> CacheInfo:
        """Remove everything, what is remembered of model files included. Returns what was there. Raises
        OSError for what cannot be removed."""
        before = self.info()
        for pattern in (*_KINDS, "*.weights", "*.tmp"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)
        return before

    def weights_sha256(
        self, path: Path, tensors: Collection[str], stop: Callable[[], bool] = lambda: False
    ) -> str:
        """Names the content of some tensors: see `weights_sha256`. Remembered for the files' paths, inodes,
        sizes and modification times, because reading 2 GB takes seconds. Raises ModelError, Aborted."""
        identity = repr((files_identity(path), sorted(tensors)))
        memo = self.directory / f"{hashlib.sha256(identity.encode()).hexdigest()}.weights"
        with suppress(OSError, ValueError):
            words = memo.read_text("ascii")
            if re.fullmatch("[0-9a-f]{64}", words):
                return words
        sha256 = weights_sha256(read_gguf(path), tensors, stop)
        if all(time.time() - part.stat().st_mtime > _SETTLED_SECONDS for part in _parts(path.resolve())):
            try:
                self._write(memo, [sha256.encode()])
            except OSError as e:
                self._warn(e)
        return sha256

    # ---- files ---------------------------------------------------------------------------------------------

    def _path(self, key: str, kind: Literal["states", Kind]) -> Path:
        return self.directory / f"{key}.{kind}"

    def _entries(self, kinds: Sequence[str]) -> Iterator[tuple[float, int, Path]]:
        """(when it was last used, bytes, path) of each entry; other processes may remove them meanwhile."""
        for kind in kinds:
            for path in self.directory.glob(kind):
                with suppress(OSError):
                    info = path.stat()
                    yield info.st_mtime, info.st_size, path

    def _shrink(self, max_bytes: int, kinds: Sequence[str] = _KINDS) -> None:
        entries = sorted(self._entries(kinds))
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

    def _drop(self, path: Path, why: ImageError) -> None:
        logger.warning("%s: %s; the entry is dropped", path, why)
        with suppress(OSError):
            path.unlink()

    def _write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
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


def files_identity(path: Path) -> list[tuple[str, int, int, int]]:
    """What tells a model's files from others, and from what they were before they changed."""
    infos = [(str(part), part.stat()) for part in _parts(path.resolve())]
    return [(name, info.st_ino, info.st_size, info.st_mtime_ns) for name, info in infos]


def _parts(path: Path) -> list[Path]:
    """All files of a model of which this is the first."""
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if not match:
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(match[1])}-?????-of-{match[2]}.gguf"))


def code_identity(device: str, devices: Sequence[Device]) -> str:
    """Names what computes on a device (as ggml names it; one of `devices`) to the bit: this build of
    libmllama, its kernel for the CPU as $MLLAMA_CPU_KERNEL and the processor have it now, ggml, the hardware
    (of a worker, its address), and what helps the CPU."""
    from ..backend import library as _native

    native = _native.load()
    library = _sha256(native.path)
    kernel = native.lib.mllama_cpu_kernel()
    ggml = native.text(native.lib.mllama_ggml_version_loaded())
    hardware = [(d.name, d.description) for d in devices if d.name == device or d.type == "accel"]
    name = "" if kernel == native.ffi.NULL else native.text(kernel)
    return f"{library}/{name}/{ggml}/{device}/{hardware}"


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- entries -----------------------------------------------------------------------------------------------


def _touch(path: Path) -> None:
    with suppress(OSError):  # a directory that may only be read is a fine cache too
        os.utime(path)


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
        _read_all(file, states.data.cast("B"))
    if _CRC.pack(zlib.crc32(states.data, zlib.crc32(header))) != crc:
        raise ImageError("its checksum does not fit")
    return ImageEmbedding(states, aspect_ratio_id, key)


def _filling_parts(
    key: str, n_bytes: int, pieces: Iterable[npt.NDArray[np.uint8]]
) -> Iterator[bytes | memoryview]:
    header = _FILLING_HEADER.pack(_FILLING_MAGIC, bytes.fromhex(key), n_bytes)
    crc = zlib.crc32(header)
    yield header
    for piece in pieces:
        crc = zlib.crc32(piece.data, crc)
        yield piece.data
    yield _FILLING_CRC.pack(crc)


def _read_filling(file: io.FileIO, key: str, n_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
    """A piece is read and checked while the one before it is used. Raises ImageError for an entry that is not
    as it was written."""
    header = file.read(_FILLING_HEADER.size)
    size = _FILLING_HEADER.size + n_bytes + _FILLING_CRC.size
    if (
        header != _FILLING_HEADER.pack(_FILLING_MAGIC, bytes.fromhex(key), n_bytes)
        or os.fstat(file.fileno()).st_size != size
    ):
        raise ImageError("truncated, or not what its name says")
    crc = zlib.crc32(header)

    places = cycle([np.empty(min(PIECE, n_bytes), np.uint8) for _ in range(2)])

    def read(n: int) -> npt.NDArray[np.uint8]:
        nonlocal crc
        piece = next(places)[:n]
        _read_all(file, piece.data)
        crc = zlib.crc32(piece.data, crc)
        return piece

    sizes = [min(PIECE, n_bytes - at) for at in range(0, n_bytes, PIECE)]
    with ThreadPoolExecutor(1, "filling") as reader:
        coming = [reader.submit(read, size) for size in sizes[:1]]
        for size in sizes[1:]:
            piece = coming.pop().result()
            coming.append(reader.submit(read, size))
            yield piece
        for last in coming:
            yield last.result()
    if file.read(_FILLING_CRC.size) != _FILLING_CRC.pack(crc):
        raise ImageError("its checksum does not fit")


def _read_all(file: io.FileIO, rest: memoryview) -> None:
    while rest:
        n = file.readinto(rest)
        if not n:
            raise ImageError("truncated")
        rest = rest[n:]
