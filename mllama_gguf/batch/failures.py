"""errors.jsonl: the images that have no caption, and why. Several runs may share it.

Each line names the output that has no caption of the image, so that the runs of one output leave the lines
of others alone. Only lines of ours are ever removed. A file of this name that holds anything else is left
alone, and the failures go to mllama-errors.jsonl.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RequestError
from ..files import AnyPath, write_whole
from ..reading import open_regular, parse_json
from ..temporary import open_locked
from ..words import as_json, os_reason, show_name
from .outputs import append, remove_empty

NAMES = ("errors.jsonl", "mllama-errors.jsonl")
_BEGINS = b'{"image": '
_LONGEST = 1 << 20  # bytes of a line
_KEYS = {"image", "error", "message"}
_WAIT = 60.0  # seconds for another run that adds a line


def output_name(out: AnyPath, home: AnyPath) -> str:
    """What the lines in a log call a file of captions, links followed. home: the folder of the log"""
    return os.path.relpath(os.path.realpath(out), os.path.realpath(home))


def error_log(folder: Path, output: str = "") -> ErrorLog:
    """The log of a folder: the first of `NAMES` that is no other program's file. output: see ErrorLog. Raises
    RequestError."""
    closed: OSError | None = None
    for name in NAMES:
        try:
            if _is_free(folder / name):
                return ErrorLog(folder / name, output)
        except OSError as e:
            closed = closed or e
    if closed:
        raise RequestError(
            f"failures cannot be noted in {show_name(closed.filename)}: {os_reason(closed)}; "
            "write to a folder that you may read and write"
        )
    first, second = (show_name(folder / name) for name in NAMES)
    raise RequestError(
        f"{first} and {second} are files of another kind: failures cannot be noted; move one of them away"
    )


def read_failures(folder: Path, output: str) -> dict[str, str]:
    """Why images have no caption in an output, by the logs of its folder: the last words about each. Lines of
    other outputs and other programs, and logs that cannot be read, are left out."""
    found: dict[str, str] = {}
    for name in NAMES:
        with suppress(OSError), open_regular(folder / name) as file:
            for line in iter(lambda: file.readline(_LONGEST), b""):
                entry = _entry_of(line)
                if entry and entry.get("output", "") in ("", output):
                    found[entry["image"]] = entry["message"]
    return found


class ErrorLog:
    """One line for each image that failed for an output."""

    def __init__(self, path: Path, output: str = "") -> None:
        """path:   see `error_log`; touches no file
        output: tells the lines of this output from those of others; "": lines that name none"""
        self.path = path
        self._output = output

    def add(self, entry: Mapping[str, str]) -> None:
        """Keep a failure: "image" says whose, "error" is its class, "message" says why. Raises OSError."""
        line = as_json({**entry, "output": self._output} if self._output else entry).encode() + b"\n"
        with self._locked(create=True) as file:
            start = max(0, file.seek(0, os.SEEK_END) - _LONGEST)  # a torn line of ours is shorter
            file.seek(start)
            data = file.readall()
            whole = data.rfind(b"\n") + 1
            try:
                if (whole or not start) and _is_torn(data[whole:]):
                    file.truncate(start + whole)
                elif whole < len(data):
                    append(file, b"\n")
                append(file, line)
            except OSError as e:
                remove_empty(file, self._target)
                raise OSError(e.errno, e.strerror, os.fspath(self.path)) from e

    def tidy(self, captioned: Container[str]) -> None:
        """Keep the last failure of each image, and none of images that have a caption now. Lines of other
        outputs and of other programs stay. Lines that name no output, of earlier versions, count as ours.
        Raises OSError."""
        with suppress(FileNotFoundError), self._locked(create=False) as file:
            data = file.readall()
            lines = data.splitlines(keepends=True)
            if lines and _is_torn(lines[-1]):
                lines.pop()
            last: dict[str, int] = {}
            for number, line in enumerate(lines):
                image = self._image_of(line)
                if image is not None and image not in captioned:
                    last[image] = number
            wanted = set(last.values())
            kept = b"".join(
                line for n, line in enumerate(lines) if n in wanted or self._image_of(line) is None
            )
            if data and not kept:
                os.unlink(self._target)
            elif kept != data:
                write_whole(self.path, kept, durable=True)

    def _image_of(self, line: bytes) -> str | None:
        """The image of a line that this output may remove."""
        entry = _entry_of(line)
        return entry["image"] if entry and entry.get("output", "") in ("", self._output) else None

    @property
    def _target(self) -> Path:
        return Path(os.path.realpath(self.path))

    @contextmanager
    def _locked(self, *, create: bool) -> Iterator[io.FileIO]:
        file, _ = open_locked(self._target, _WAIT, create=create)
        with file:
            yield file


def _is_free(path: Path) -> bool:
    """Whether there is no such file, or one with lines of ours alone. Raises OSError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return True
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(_LONGEST), b"")
        return all(len(line) < _LONGEST and (_entry_of(line) or _is_torn(line)) for line in lines)


def _entry_of(line: bytes) -> dict[str, str] | None:
    """A line of ours."""
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or set(entry) - {"output"} != _KEYS:
        return None
    if not all(isinstance(value, str) for value in entry.values()):
        return None
    name: str = entry["error"]  # of an exception's class
    return entry if name.isidentifier() and name[:1].isupper() else None


def _is_torn(line: bytes) -> bool:
    """Whether a last line is one of ours that a kill cut."""
    if not line or line.endswith(b"\n") or not (line.startswith(_BEGINS) or _BEGINS.startswith(line)):
        return False
    try:
        parse_json(line)
    except ValueError:
        return True
    return False
