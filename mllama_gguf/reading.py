"""Files to read: regular ones only. A pipe would be waited for, and a device may have no end."""

from __future__ import annotations

import codecs
import errno
import io
import os
import stat
from typing import Any

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# A file may become a pipe between the look at it and its opening: that does not wait either.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file to read bytes, if it is a regular file or a link to one.

    Raises OSError; its `strerror` says what else it is, as in "it is a pipe, not a file". ValueError for a
    path with a NUL.
    """
    return io.BufferedReader(open_unbuffered(path))


def open_unbuffered(path: str | os.PathLike[str]) -> io.FileIO:
    """As `open_regular`, for large pieces: each read is one of the system."""
    _check(path, os.stat(path).st_mode)  # opening a device can already do something
    fd = os.open(path, _FLAGS)
    try:
        _check(path, os.fstat(fd).st_mode)
        return io.FileIO(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The content of a file. Raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a text file, see `decode_text`. Raises as `open_regular`, and UnicodeDecodeError."""
    return decode_text(read_regular(path))


def decode_text(data: bytes) -> str:
    """UTF-8, or UTF-16 that begins with a byte order mark, as editors on Windows write it. The mark of either
    is dropped. Raises UnicodeDecodeError."""
    return data.decode("utf-16" if data.startswith(_UTF16_MARKS) else "utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for one that is nested too much for Python."""
    import json  # not for every start of the command line

    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("it is nested too much") from e


def can_be_file(path: str | os.PathLike[str]) -> bool:
    """Whether the system can have a file of this name: it has no NUL, no lone surrogate, and is not too
    long."""
    try:
        os.lstat(path)
    except ValueError:
        return False
    except OSError as e:
        return e.errno != errno.ENAMETOOLONG
    return True


def kind_of_file(mode: int) -> str:
    """What a file is, by its mode: "a file", "a folder", "a pipe", "a socket" or "a device"."""
    for is_kind, words in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return words
    return "a device"


def _check(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    error = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(error, f"it is {kind_of_file(mode)}, not a file", os.fspath(path))
