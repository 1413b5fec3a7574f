"""Results on disk: what any process computed of an image before is not computed again.

Three results are kept. The states of an image are the encoder's output, which anything may read. Its image_kv
is what the text model computes of the states: the keys and values of all cross-attention layers, as they lie
in the cache of a context. With it, an image that is asked about again needs no states. For the 11B model on
the CPU a tile takes 26 MB of states and 53 MB of image_kv; the states cost far more time to compute. The
prefix_kv is what the tokens before a prompt's first image (in a chat, the system's message) leave in the
self-attention cache: 0.2 MB a token of the 11B model. Keys and values have at most half of the room. Where
room is needed, the entries that were used longest ago are removed, of all kinds. A file's modification time
is when it was last used; a use of the image_kv counts for the states too.

Where: a folder of our own, `mllama-images`, in $MLLAMA_IMAGE_CACHE or the platform's cache directory of this
package (see `folder`). How much: $MLLAMA_IMAGE_CACHE_SIZE, in bytes or like "500 MB", 4 GB if it is not set.
Only the owner can read it, because the entries tell what was in the images.

An entry is one file (see `entries`), written under another name and renamed: it is there as a whole or not at
all, and processes need no lock. Each has a checksum; an entry whose checksum does not fit is removed. Values
are what was computed, to the bit, because a reply must not depend on whether the cache was used. States are
read. The image_kv of an image that is alone in its group is mapped, if its place is in memory, and its
checksum is computed while it is used already. Like a model's file it must not be changed by others from
then on, but it may be removed.

A failure of the disk is never a failure of the caller: it is logged as a warning, once, and the work
continues.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..backend.types import Bytes, Floats
from ..errors import ImageError, RequestError
from ..files import replacing
from ..reading import can_be_file
from ..temporary import remove_leftovers
from ..words import os_reason, parse_size, show_name
from . import folder
from .entries import (
    KV_OFFSET,
    SUFFIXES,
    Kind,
    KvKind,
    kv_parts,
    kv_size,
    read_kv,
    read_states,
    states_parts,
    states_size,
)

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "MLLAMA_IMAGE_CACHE"
SIZE_VARIABLE = "MLLAMA_IMAGE_CACHE_SIZE"
DEFAULT_MAX_BYTES = 4_000_000_000  # twenty images of four tiles of the 11B model, six of them with image_kv

_KV_KINDS: tuple[KvKind, ...] = ("image_kv", "prefix_kv")


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds: the number of entries of each kind, and the bytes of all."""

    directory: Path
    n_states: int
    n_image_kv: int
    n_prefix_kv: int
    n_bytes: int
    max_bytes: int


def default_directory() -> Path:
    """The directory in which the cache has its folder if nobody says otherwise."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    return Path(os.path.expanduser(chosen)) if chosen else _own_directory()


def _own_directory() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("mllama_gguf")


def default_max_bytes() -> int:
    """Most bytes that the cache takes. Raises RequestError if the environment has no valid size."""
    words = os.environ.get(SIZE_VARIABLE, "").strip()
    return parse_size(words, SIZE_VARIABLE) if words else DEFAULT_MAX_BYTES


class ImageCache:
    """Results by key in a folder of which other processes may use and change every file. Safe from several
    threads."""

    def __init__(self, directory: str | os.PathLike[str] | None = None, max_bytes: int | None = None) -> None:
        """directory: in which the cache has its folder. directory, max_bytes: None: as the environment says.

        Raises RequestError; touches no file.
        """
        self._parent = default_directory() if directory is None else Path(directory)
        if not can_be_file(self._parent):
            raise RequestError(f"the image cache: {show_name(self._parent)}: no folder can have this name")
        self.directory = self._parent / folder.NAME
        self.max_bytes = default_max_bytes() if max_bytes is None else max_bytes
        self._warned = False

    # ---- states --------------------------------------------------------------------------------------------

    def read_states(self, key: str) -> tuple[Floats, int] | None:
        """(states float32 [n_tiles, n_positions, n_embd], aspect_ratio_id), which now count as the last ones
        used; None if there are none of that key."""
        path = self._path(key, "states")
        try:
            with _open(path) as file:
                found = read_states(file, key)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._warn(e)
            return None
        except ImageError as e:
            self._drop(path, e)
            return None
        self.touch_states(key)
        return found

    def touch_states(self, key: str) -> None:
        """Let the states of that key, if there are any, count as the last ones used."""
        _touch(self._path(key, "states"))

    def add_states(self, key: str, states: Floats, aspect_ratio_id: int) -> None:
        """Keep states, C-contiguous, and remove the oldest entries that no longer fit. States that are larger
        than the whole cache are not kept."""
        n_bytes = states_size(states)
        if n_bytes > self.max_bytes:
            return
        try:
            self._shrink(self.max_bytes - n_bytes)
            self._write(self._path(key, "states"), states_parts(key, states, aspect_ratio_id))
        except OSError as e:
            self._warn(e)

    # ---- keys and values -----------------------------------------------------------------------------------

    def has_states(self, key: str) -> bool:
        """Whether there are states of that key, as far as can be told without reading them."""
        try:
            return self._path(key, "states").is_file()
        except OSError:
            return False

    def has_kv(self, key: str, kind: KvKind = "image_kv") -> bool:
        """Whether there is an entry of that key, as far as can be told without reading it."""
        try:
            return self._path(key, kind).is_file()
        except OSError:
            return False

    def read_kv(self, key: str, n_bytes: int, kind: KvKind = "image_kv") -> Iterator[Bytes]:
        """The bytes of an entry, in order, in pieces, each there until the next one is asked for. The entry
        then counts as the last one used.

        n_bytes: how many they must be

        Raises ImageError, after the last piece too, when the bytes that came are not to be used: the entry is
        damaged, or went away.
        """
        path = self._path(key, kind)
        try:
            with _open(path) as file:
                yield from read_kv(file, key, n_bytes)
        except OSError as e:
            if not isinstance(e, FileNotFoundError):
                self._warn(e)
            raise ImageError(f"{path}: {os_reason(e)}") from e
        except ImageError as e:
            self._drop(path, e)
            raise
        _touch(path)

    def is_intact(self, key: str, n_bytes: int) -> bool:
        """Whether the image_kv of that key is as it was written; if not, it is removed."""
        try:
            for _ in self.read_kv(key, n_bytes):
                pass
        except ImageError:
            return False
        return True

    def image_kv_place(self, key: str) -> tuple[Path, int]:
        """The file in which the bytes are, and where in it they begin."""
        return self._path(key, "image_kv"), KV_OFFSET

    def add_kv(self, key: str, n_bytes: int, pieces: Iterable[Bytes], kind: KvKind = "image_kv") -> None:
        """Keep keys and values, and remove the oldest entries that no longer fit. What is larger than half of
        the cache is not kept. Raises what `pieces` raises."""
        size = kv_size(n_bytes)
        if size > self.max_bytes // 2:
            return
        try:
            self._shrink(self.max_bytes // 2 - size, _KV_KINDS)
            self._shrink(self.max_bytes - size)
            self._write(self._path(key, kind), kv_parts(key, n_bytes, pieces))
        except OSError as e:
            self._warn(e)

    # ---- digests of model files ----------------------------------------------------------------------------

    def read_digest(self, name: str) -> str | None:
        """A sha256 that was kept under a name of hex digits; None if there is none."""
        with suppress(OSError, ValueError, ImageError), _open(self._digest_path(name)) as file:
            words = file.read(65).decode("ascii")
            if re.fullmatch("[0-9a-f]{64}", words):
                return words
        return None

    def add_digest(self, name: str, sha256: str) -> None:
        """Keep a sha256 under a name of hex digits."""
        try:
            self._write(self._digest_path(name), [sha256.encode("ascii")])
        except OSError as e:
            self._warn(e)

    # ---- all of it -----------------------------------------------------------------------------------------

    def info(self) -> CacheInfo:
        """The entries that exist now."""
        sizes = [[size for _, size, _ in self._entries([kind])] for kind in SUFFIXES]
        n_states, n_image_kv, n_prefix_kv = map(len, sizes)
        return CacheInfo(
            self.directory, n_states, n_image_kv, n_prefix_kv, sum(map(sum, sizes)), self.max_bytes
        )

    def clear(self) -> CacheInfo:
        """Remove everything of ours: entries, digests of model files, and what earlier versions left. Returns
        what was there. Raises OSError for what cannot be removed."""
        before = self.info()
        folder.clear(self.directory)
        folder.clear_old(self._parent)
        if self._parent == _own_directory():
            folder.clear_old(self._parent / "images")
            with suppress(OSError):  # it is not empty, or not there
                (self._parent / "images").rmdir()
        return before

    # ---- files ---------------------------------------------------------------------------------------------

    def _path(self, key: str, kind: Kind) -> Path:
        return self.directory / f"{key}{SUFFIXES[kind]}"

    def _digest_path(self, name: str) -> Path:
        return self.directory / f"{name}{folder.DIGEST_SUFFIX}"

    def _entries(self, kinds: Iterable[Kind]) -> Iterator[tuple[float, int, Path]]:
        """(when it was last used, bytes, path) of each entry; other processes may remove them meanwhile."""
        for kind in kinds:
            for entry in folder.files(self.directory, SUFFIXES[kind]):
                with suppress(OSError):
                    info = entry.stat(follow_symlinks=False)
                    yield info.st_mtime, info.st_size, Path(entry.path)

    def _shrink(self, max_bytes: int, kinds: Sequence[Kind] = tuple(SUFFIXES)) -> None:
        folder.make(self.directory)
        remove_leftovers(self.directory)
        folder.remove_old(self.directory)
        entries = sorted(self._entries(kinds))
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _drop(self, path: Path, why: ImageError) -> None:
        logger.warning("%s: %s; the entry is dropped", path, why)
        if folder.is_ours(self.directory):
            with suppress(OSError):
                path.unlink()

    def _write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        folder.make(self.directory)
        # Another process that writes the entry now writes the same.
        with suppress(BlockingIOError), replacing(path, wait=0, mode=0o600) as file:
            for part in parts:
                file.write(part)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: the image cache cannot be used: %s", self.directory, os_reason(error))


def _open(path: Path) -> io.FileIO:
    """An entry to be read. Raises ImageError for what is not a regular file: a pipe would never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = io.FileIO(fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise ImageError("not a regular file")
    return file


def _touch(path: Path) -> None:
    with suppress(OSError):  # a directory that may only be read is a fine cache too
        os.utime(path)
