"""Files of our own while they are written, and locks that tell whether their writer is alive.

A temporary file has a name of ours, made from its target's name (`.mllama-0123456789abcdef.tmp`). It is
created with O_EXCL: a link that somebody planted there is never followed. It is locked while its writer
lives. So a second writer of the same target is noticed, and a temporary file without a lock was left by a
process that was killed: the next writer removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

from .words import show_name

_NAME = re.compile(r"\.mllama-[0-9a-f]{16}\.tmp")
_RETRY_SECONDS = 0.02


def temporary_name(target: Path) -> Path:
    """The temporary file of a target: of the same length whatever the target's name, which may be as long as
    names can be."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.with_name(f".mllama-{digest}.tmp")


def create_locked(temporary: Path, wait: float, mode: int = 0o666) -> io.BufferedWriter:
    """The temporary file, new, open and locked. mode: its permissions, less the umask. Raises OSError."""
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = open(os.open(temporary, flags, mode), "wb")  # noqa: SIM115  # the caller closes it
        except FileExistsError:
            remove_unlocked(temporary, wait, unsure=True)
            continue
        try:
            lock(file.fileno(), max(wait, 1.0))  # somebody may have a quick look whether it is a leftover
            if is_at(file.fileno(), temporary):  # nobody took it for one
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def open_locked(path: Path, wait: float = 0.0, *, create: bool = True) -> tuple[io.FileIO, bool]:
    """A file of ours to read and write, locked until it is closed, and whether the file system has locks. A
    link of this name is not followed.

    create: make it if there is none

    Raises BlockingIOError if another process has locked it for longer than `wait` seconds, OSError.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        file = io.FileIO(os.open(path, flags, 0o666), "r+")
        try:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileExistsError(errno.EEXIST, "it is not a regular file", os.fspath(path))
            locks = lock(file.fileno(), wait)
            if is_at(file.fileno(), path):  # it may have been renamed before we had the lock
                return file, locks
        except BaseException:
            file.close()
            raise
        file.close()


def is_temporary(name: str) -> bool:
    """Whether a file's name is that of a temporary file of ours."""
    return _NAME.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed writers: files named as ours that nobody has locked."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if is_temporary(entry.name):
                with suppress(OSError):
                    remove_unlocked(Path(entry.path))


def remove_unlocked(path: Path, wait: float = 0.0, *, unsure: bool = False) -> None:
    """Delete a file of ours unless a living process has locked it.

    unsure: delete it also on a file system without locks

    Raises BlockingIOError if it is locked for longer than `wait` seconds, FileExistsError if it
    is not a file of ours.
    """
    words = f"{show_name(path)} is in the way; move it away"
    in_the_way = FileExistsError(errno.EEXIST, words, os.fspath(path))
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise in_the_way
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise in_the_way
        if (lock(fd, wait) or unsure) and is_at(fd, path):
            os.unlink(path)
    finally:
        os.close(fd)


def lock(fd: int, wait: float = 0.0) -> bool:
    """Lock a file for this process alone, until it is closed. False: this file system has no locks.

    Raises BlockingIOError if another process has it for longer than `wait` seconds.
    """
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                raise BlockingIOError(errno.EAGAIN, "another process is writing it") from None
            time.sleep(_RETRY_SECONDS)
        except OSError:
            return False


def is_at(fd: int, path: Path) -> bool:
    """Whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash. Some file systems have no such thing."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
