"""Files of captions that survive a kill at any moment: what a batch has done is what its output holds.

A record is appended in one write and synced before the next picture begins; a failed write is taken back. A
kill can cut only the last line, and only if it strikes inside that write; opening the file again cuts such a
line off. Captions beside their pictures appear by rename, whole or not at all. No picture, no other input and
no file of another kind is ever written to.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import RequestError
from ..files import AnyPath, Kind, cannot_write, check_output, keep_attributes, replacing
from ..temporary import is_at, open_locked, remove_leftovers, sync_folder
from ..words import as_json, one_line, os_reason, show_name
from .sources import MEDIA_SUFFIXES

logger = logging.getLogger(__name__)

LARGEST_CAPTION = 1 << 20  # bytes of a caption file; what is larger is something else


@dataclass(frozen=True)
class Record:
    """A caption that is done.

    image:         path, as the batch was told
    finish_reason: "stop", or "length" for a caption that max_tokens or n_ctx cut
    tokens:        tokens of the caption
    sha256:        of the picture's file
    duplicate_of:  path of the picture with the same content whose caption this is, or ""
    """

    image: str
    caption: str
    finish_reason: str
    tokens: int
    sha256: str
    duplicate_of: str = ""


class Output(Protocol):
    """Where captions go."""

    def records(self) -> Iterable[Record]:
        """What is there already; a sha256 of "" is not known."""

    def write(self, record: Record) -> None:
        """Keep a record, for good once this returns. Raises OSError; nothing of the record is there then."""

    def finish(self) -> None:
        """Everything was tried: put the new file in the place of the old one."""

    def close(self) -> None:
        """Let go of the files."""


# ---- one file ----------------------------------------------------------------------------------------------


class RecordFile:
    """Captions in one file, .jsonl or .csv, of which one process is the only writer."""

    def __init__(self, path: AnyPath, *, inputs: Iterable[AnyPath] = (), partial: Path | None = None) -> None:
        """path:    opened or made; its suffix says what it looks like
        inputs:  files that the run reads, which it must not be
        partial: a file of our own that is written instead; `finish` gives it the name `path`

        Raises RequestError for a file that is something else, or in use, MllamaError if it cannot be written.
        """
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in FORMATS:
            raise RequestError(f"{show_name(path)}: captions go to a file called .jsonl or .csv")
        self._format = FORMATS[suffix]()
        self._kind = Kind("file of captions", self._format.is_one)
        self._target = check_output(path, self._kind, inputs=inputs, overwrite=True)
        self._path = partial or self._target
        self._file = _open(self._path)
        try:
            self._records = self._recover()
        except OSError as e:
            self._file.close()
            raise cannot_write(self._path, e) from e
        except BaseException:
            self._file.close()
            raise

    def records(self) -> Iterable[Record]:
        """See Output."""
        return self._records

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
        if self._path == self._target:
            return
        if self._target.exists() and self._target.stat().st_size and not self._kind.fits(self._target):
            words = "it exists by now and is no file of captions; move it away"
            raise FileExistsError(errno.EEXIST, words, os.fspath(self._target))
        keep_attributes(self._target, self._file.fileno())
        os.replace(self._path, self._target)
        sync_folder(self._target.parent)

    def close(self) -> None:
        """See Output."""
        self._file.close()

    def _recover(self) -> list[Record]:
        """Read the file, drop a torn end, write what a file begins with."""
        data = self._file.readall()
        whole = whole_lines(data, quotes=self._format.quotes)
        if self._format.is_record(data[whole:]):  # an editor left out the last line end
            self._file.write(b"\n")
            data += b"\n"
            whole = len(data)
        try:
            records = self._format.read(data[:whole].decode("utf-8", "surrogateescape"))
        except (ValueError, TypeError, KeyError, csv.Error) as e:
            reason = one_line(e)
            raise RequestError(
                f"{show_name(self._path)}: is no file of captions ({reason}); give another --out"
            ) from e
        if whole < len(data):
            self._file.truncate(whole)
        if not whole and self._format.head:
            append(self._file, self._format.head)
        return records


class Journal(RecordFile):
    """What is done of captions that go elsewhere: a file of our own, removed in the end."""

    def __init__(self, path: Path) -> None:
        """path: opened or made; called *.jsonl. Raises RequestError if it is in use."""
        if path.is_symlink():
            raise RequestError(f"{show_name(path)}: this link is in the way; delete it")
        super().__init__(path)

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink()


class _Jsonl:
    quotes = False
    head = b""

    def is_one(self, file: BinaryIO) -> bool:
        """Whether a file begins with a record, or with a torn one."""
        begins = b'{"image": '
        if not begins.startswith(file.read(len(begins))):
            return False
        file.seek(0)
        line = file.readline(16 * LARGEST_CAPTION)
        return self.is_record(line) or not (line.endswith(b"\n") or _is_json(line))

    def is_record(self, line: bytes) -> bool:
        """Whether this is a whole record; the line end may be missing."""
        try:
            return bool(self.read(line.decode("utf-8", "surrogateescape")))
        except (ValueError, TypeError, RecursionError):
            return False

    def line(self, record: Record) -> bytes:
        values = asdict(record)
        if not record.duplicate_of:
            del values["duplicate_of"]
        return as_json(values).encode() + b"\n"

    def read(self, text: str) -> list[Record]:
        return [_record(json.loads(line)) for line in text.split("\n") if line]


class _Csv:
    quotes = True
    head = (",".join(field.name for field in fields(Record)) + "\n").encode()

    def is_one(self, file: BinaryIO) -> bool:
        """Whether a file begins with the names of the columns, or with a part of them."""
        return self.head.startswith(file.read(len(self.head)))

    def is_record(self, line: bytes) -> bool:
        """Without its line end no row is known to be whole."""
        return False

    def line(self, record: Record) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(asdict(record).values())
        return text.getvalue().encode("utf-8", "surrogateescape")

    def read(self, text: str) -> list[Record]:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [_record({**row, "tokens": int(row["tokens"])}) for row in rows]


FORMATS: dict[str, type[_Jsonl | _Csv]] = {".jsonl": _Jsonl, ".csv": _Csv}


def _record(values: Any) -> Record:
    names = {field.name for field in fields(Record)}
    if not isinstance(values, dict):
        raise ValueError("a record is an object")
    record = Record(**{name: value for name, value in values.items() if name in names})
    if not isinstance(record.image, str) or not isinstance(record.caption, str):
        raise ValueError("image and caption must be strings")
    return record


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# ---- one file beside each picture --------------------------------------------------------------------------


class Sidecars:
    """Captions beside their pictures: photos/a.png, photos/a.txt."""

    def __init__(
        self,
        suffix: str,
        pictures: Iterable[str],
        journal: Path | None = None,
        *,
        inputs: Iterable[AnyPath] = (),
    ) -> None:
        """suffix:  of the caption files
        pictures: what the batch is about
        journal: captions that exist are replaced, and this file of our own keeps what is done meanwhile (see
                 Journal); None: they stay
        inputs:  other files that the run reads or writes, none of which may be a caption file

        Raises RequestError for a suffix that is none or belongs to pictures, for two pictures with one
        caption file, and for a caption file that is an input.
        """
        check_suffix(suffix)
        self._suffix = suffix
        self._pictures = list(pictures)
        owner: dict[Path, str] = {}
        read = {_identity(path): path for path in (*self._pictures, *inputs)}
        for picture in self._pictures:
            path = self.path(picture)
            other = owner.setdefault(path, picture)
            if other != picture:
                raise RequestError(f"{other} and {picture} would share {path}; rename one or use --out")
            there = _identity(path)
            if there is not None and there in read:
                raise RequestError(
                    f"the caption of {show_name(picture)} would replace the input {show_name(read[there])}; "
                    "give another --sidecar, or use --out"
                )
        self._journal = Journal(journal) if journal is not None else None

    def path(self, picture: str) -> Path:
        """The caption file of a picture."""
        return Path(os.path.splitext(picture)[0] + self._suffix)

    def records(self) -> Iterable[Record]:
        """See Output."""
        for folder in {Path(picture).parent for picture in self._pictures}:
            remove_leftovers(folder)
        if self._journal is not None:
            for record in self._journal.records():
                self._place(record)  # the journal came first
                yield record
            return
        for picture in self._pictures:
            path = self.path(picture)
            with suppress(OSError):
                if path.is_file():
                    caption = path.read_text("utf-8", "replace").removesuffix("\n")
                    yield Record(picture, caption, "stop", 0, "")

    def write(self, record: Record) -> None:
        """See Output."""
        if self._journal is not None:
            self._journal.write(record)
        self._place(record)

    def finish(self) -> None:
        """See Output."""
        if self._journal is not None:
            self._journal.remove()

    def close(self) -> None:
        """See Output."""
        if self._journal is not None:
            self._journal.close()

    def _place(self, record: Record) -> None:
        path = self.path(record.image)
        if self._journal is not None and path.is_file() and not _CAPTION.fits(path):
            words = "it exists and is no caption; move it away"
            raise FileExistsError(errno.EEXIST, words, os.fspath(path))
        with replacing(path, durable=True, overwrite=self._journal is not None) as file:
            file.write((record.caption + "\n").encode("utf-8"))


def check_suffix(suffix: str) -> None:
    """That caption files may have this suffix. Raises RequestError."""
    if not suffix.startswith(".") or not suffix.strip(".") or set(suffix) & {"/", os.sep, "\0"}:
        raise RequestError(f"--sidecar takes a suffix like .txt, not {suffix!r}")
    if os.path.splitext(f"x{suffix}")[1].strip().lower() in MEDIA_SUFFIXES:
        raise RequestError(
            f"--sidecar {suffix}: this suffix belongs to pictures or films, which captions would replace; "
            "give another, as in .txt"
        )


def _is_caption(file: BinaryIO) -> bool:
    data = file.read(LARGEST_CAPTION + 1)
    data.decode("utf-8")
    return len(data) <= LARGEST_CAPTION and b"\0" not in data


_CAPTION = Kind("caption", _is_caption)


def _identity(path: AnyPath) -> tuple[int, int] | None:
    """Tells files apart, whatever their names."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None
    return info.st_dev, info.st_ino


# ---- files -------------------------------------------------------------------------------------------------


def whole_lines(data: bytes, *, quotes: bool = False) -> int:
    """Bytes of the lines that are complete. quotes: a line end inside double quotes, as in CSV, is none."""
    size, whole, inside = 0, 0, False
    for line in data.split(b"\n")[:-1]:
        size += len(line) + 1
        if quotes and line.count(b'"') % 2:
            inside = not inside
        if not inside:
            whole = size
    return whole


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
