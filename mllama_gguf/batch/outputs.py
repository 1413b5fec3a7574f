"""Files of captions that survive a kill at any moment: what a batch has done is what its output holds.

A record is appended in one write and synced before the next image begins; a failed write is taken back. A
kill can cut only the last line, and only if it strikes inside that write; opening the file again cuts such a
line off. Captions beside their images appear by rename, whole or not at all. No image, no other input and
no file of another kind is ever written to.
"""

from __future__ import annotations

import errno
import io
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..errors import RequestError
from ..files import AnyPath, Kind, cannot_write, check_output, replacing
from ..temporary import is_at, open_locked
from ..words import os_reason, show_name
from .choices import Existing
from .records import (
    FORMATS,
    UNREADABLE,
    Record,
    combine,
    last_of_each,
    line_ends,
    line_number,
    reason_of,
    whole_lines,
)

logger = logging.getLogger(__name__)


class Output(Protocol):
    """Where captions go.

    refused: images that can have no caption there, and why
    """

    @property
    def refused(self) -> Mapping[str, str]: ...

    def unwritable(self, images: Iterable[str]) -> Mapping[str, str]:
        """Which of these can have no caption because a folder or a file is write-protected, and why: asked
        before anything is computed. The reason is the same for the same folder."""

    def records(self) -> Iterable[Record]:
        """The records that exist; a sha256 of "" is unknown. If an image has several, the last one counts."""

    def again(self, images: Collection[str]) -> None:
        """The captions of these images, which `records` gave, will be made again; `write` replaces them."""

    def write(self, record: Record) -> None:
        """Keep a record: it is on the disk when this returns. Raises OSError; the record is then not kept."""

    def finish(self) -> None:
        """Everything was tried: put the new file in the place of the old one."""

    def close(self, *, failed: bool = False) -> None:
        """Close the files. failed: the run ended early; a new file without a record is then deleted."""


# ---- one file ----------------------------------------------------------------------------------------------


class RecordFile:
    """Captions in one file, .jsonl or .csv, of which one process is the only writer."""

    def __init__(self, path: AnyPath, *, inputs: Iterable[AnyPath] = ()) -> None:
        """path:   opened or made; its suffix says what it looks like
        inputs: files that the run reads, which it must not be

        Raises RequestError for a file that is something else, damaged or in use, MllamaError if it cannot be
        written.
        """
        self._format = FORMATS[suffix_of(path)]()
        kind = Kind("file of captions", self._format.is_one)
        self._path = check_output(path, kind, inputs=inputs, overwrite=True)
        is_new = not os.path.lexists(self._path)
        self._file = _open(self._path)
        self._is_new = is_new
        self._replaces = False  # some records have a later one of the same image, or will have
        try:
            self._records = self._recover()
        except OSError as e:
            self.close(failed=True)
            raise cannot_write(self._path, e) from e
        except BaseException:
            self.close(failed=True)
            raise

    def records(self) -> Iterable[Record]:
        """See Output."""
        return self._records

    def again(self, images: Collection[str]) -> None:
        """See Output. The new record is added; `finish` drops the old one."""
        self._replaces = self._replaces or bool(images)

    @property
    def refused(self) -> Mapping[str, str]:
        """See Output: none."""
        return {}

    def unwritable(self, images: Iterable[str]) -> Mapping[str, str]:
        """See Output: none; `check_output` was asked."""
        return {}

    def write(self, record: Record) -> None:
        """See Output."""
        if not is_at(self._file.fileno(), self._path):  # nobody would find what is appended
            words = "it was moved, replaced or deleted while the captions were made"
            raise OSError(errno.ESTALE, words, os.fspath(self._path))
        try:
            append(self._file, self._format.line(record))
        except OSError as e:
            raise OSError(e.errno, e.strerror, os.fspath(self._path)) from e

    def finish(self) -> None:
        """See Output."""
        if self._replaces:
            self._drop_replaced()

    def close(self, *, failed: bool = False) -> None:
        """See Output."""
        if failed and self._is_new and not self._file.closed:
            remove_empty(self._file, self._path, len(self._format.head))
        self._file.close()

    def lines(self) -> dict[str, bytes]:
        """The last record of each image, as the file has it: another program may have added more to it.
        Raises one of `UNREADABLE` for a file that somebody else has written to."""
        self._file.seek(0)
        data = self._file.readall()
        records = self._format.read(data.decode("utf-8", "surrogateescape"))
        ends = line_ends(data, quotes=self._format.quotes)
        lines = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        lines = [line for line in lines if line.strip()][bool(self._format.head) :]
        found: dict[str, bytes] = {}
        for record, line in zip(records, lines, strict=True):
            found.pop(record.image, None)
            found[record.image] = line
        return found

    def _drop_replaced(self) -> None:
        """Leave out records of images that have a later one."""
        with suppress(*UNREADABLE):
            lines = self.lines()
            with replacing(self._path, durable=True) as file:
                file.write(self._format.head + b"".join(lines.values()))

    def _recover(self) -> list[Record]:
        """Read the file, drop a torn end, write what a file begins with."""
        data = self._file.readall()
        whole = whole_lines(data, quotes=self._format.quotes)
        end = data[whole:]
        if self._format.is_record(end):  # an editor left out the last line end
            self._file.write(b"\n")
            data += b"\n"
            whole = len(data)
        elif words := self._format.fault(end):
            where = f"{show_name(self._path)}: line {line_number(data, whole)}"
            raise RequestError(f"{where}: {words}; mend it, or give another --out")
        try:
            records = self._format.read(data[:whole].decode("utf-8", "surrogateescape"))
        except UNREADABLE as e:
            reason = reason_of(e)
            raise RequestError(
                f"{show_name(self._path)}: is not a file of captions ({reason}); give another --out"
            ) from e
        if whole < len(data):
            self._file.truncate(whole)
        if not whole and self._format.head:
            append(self._file, self._format.head)
        self._replaces = len(last_of_each(records)) < len(records)
        return records


class Journal(RecordFile):
    """The records of captions that go to other files: a file of our own, removed at the end."""

    def __init__(self, path: Path) -> None:
        """path: opened or made; called *.jsonl. Raises RequestError if it is in use."""
        if path.is_symlink():
            raise RequestError(f"{show_name(path)}: this link is in the way; delete it")
        super().__init__(path)

    def read_again(self) -> list[Record]:
        """All records, those that were written meanwhile too."""
        self._file.seek(0)
        return self._format.read(self._file.readall().decode("utf-8", "surrogateescape"))

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink()


class CombinedFile:
    """Captions that replace those which a file has, or are put after or before them. A journal keeps the new
    ones; the file changes at the end, in one step. The captions of other images stay in it."""

    def __init__(
        self, path: AnyPath, journal: Path, how: Existing, separator: str, inputs: Iterable[AnyPath] = ()
    ) -> None:
        """journal: as in `Journal`; how, separator: as in `combine`. Raises RequestError."""
        self._format = FORMATS[suffix_of(path)]()
        kind = Kind("file of captions", self._format.is_one)
        self._target = check_output(path, kind, inputs=inputs, overwrite=True)
        self._how, self._separator = how, separator
        self._journal = Journal(journal)
        try:
            self._old = {record.image: record.caption for record in self._read_target()}
        except BaseException:
            self.close(failed=True)
            raise

    def records(self) -> Iterable[Record]:
        """See Output: those of the journal."""
        return self._journal.records()

    def again(self, images: Collection[str]) -> None:
        """See Output."""

    @property
    def refused(self) -> Mapping[str, str]:
        """See Output: none."""
        return {}

    def unwritable(self, images: Iterable[str]) -> Mapping[str, str]:
        """See Output: none; `check_output` was asked."""
        return {}

    def write(self, record: Record) -> None:
        """See Output."""
        self._journal.write(replace(record, existing=self._old.get(record.image, "")))

    def finish(self) -> None:
        """See Output. Doing it twice is the same as once, because the journal has the older captions too. One
        that somebody has edited since is added to as it is. Raises RequestError too."""
        target = RecordFile(self._target)
        try:
            there = last_of_each(target.records())
            try:
                lines = target.lines()
            except UNREADABLE:  # no record has lines of its own
                lines = {image: self._format.line(record) for image, record in there.items()}
            for image, record in last_of_each(self._journal.read_again()).items():
                present = there[image].caption if image in there else ""
                caption = combine(record.existing, record.caption, self._how, self._separator)
                if present not in (record.existing, caption):
                    caption = combine(present, record.caption, self._how, self._separator)
                lines[image] = self._format.line(replace(record, caption=caption, existing=""))
            with replacing(self._target, durable=True) as file:
                file.write(self._format.head + b"".join(lines.values()))
            self._journal.remove()
        finally:
            target.close(failed=True)

    def _read_target(self) -> list[Record]:
        """What the file has. Raises RequestError."""
        if not self._target.exists():
            return []
        there = RecordFile(self._target)
        there.close()
        return list(there.records())

    def close(self, *, failed: bool = False) -> None:
        """See Output."""
        self._journal.close(failed=failed)


def suffix_of(path: AnyPath) -> str:
    """The suffix of a file that can hold captions. Raises RequestError."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FORMATS:
        raise RequestError(f"{show_name(path)}: captions go to a file called .jsonl or .csv")
    return suffix


# ---- files -------------------------------------------------------------------------------------------------


def append(file: io.FileIO, line: bytes) -> None:
    """Add a line and sync; if that fails, take it back and raise OSError."""
    start = file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(line):  # a disk that is nearly full takes a part first
            written += file.write(line[written:])
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(start)
        raise


def remove_empty(file: io.FileIO, path: Path, n_bytes: int = 0) -> None:
    """Delete a file of ours, open and locked, if it has at most n_bytes bytes."""
    with suppress(OSError):
        if os.fstat(file.fileno()).st_size <= n_bytes and is_at(file.fileno(), path):
            os.unlink(path)


def _open(path: Path) -> io.FileIO:
    """A file to read and append to, ours alone. Raises RequestError."""
    try:
        file, locks = open_locked(path)
    except BlockingIOError:
        raise RequestError(
            f"{show_name(path)}: another run is writing it; wait for it or give another --out"
        ) from None
    except OSError as e:
        raise RequestError(f"{show_name(path)}: cannot be written: {os_reason(e)}") from e
    if not locks:
        logger.warning("%s: this file system has no locks; let no second run write it", show_name(path))
    return file
