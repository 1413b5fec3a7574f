"""Files of captions that survive a kill at any moment: what a batch has done is what its output holds.

A record is appended in one write and synced before the next picture begins; a failed write is taken back. A
kill can cut only the last line, and only if it strikes inside that write; opening the file again cuts such a
line off. Captions beside their pictures appear by rename, whole or not at all.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import logging
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ..errors import RequestError
from ..words import one_line

logger = logging.getLogger(__name__)

_TEMPORARY = ".mllama-"


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

    def __init__(self, path: Path, *, replaces: Path | None = None) -> None:
        """path:     opened or made; its suffix, or that of `replaces`, says what it looks like
        replaces: `finish` renames the file to this

        Raises RequestError for a file that is something else, or in use.
        """
        self._path = path
        self._replaces = replaces
        suffix = (replaces or path).suffix.lower()
        if suffix not in FORMATS:
            raise RequestError(f"{replaces or path}: captions go to a file called .jsonl or .csv")
        self._format = FORMATS[suffix]()
        self._file = _open_locked(path)
        try:
            self._records = self._recover()
        except BaseException:
            self._file.close()
            raise

    def records(self) -> Iterable[Record]:
        """See Output."""
        return self._records

    def write(self, record: Record) -> None:
        """See Output."""
        _append(self._file, self._format.line(record))

    def finish(self) -> None:
        """See Output."""
        if self._replaces is not None:
            os.replace(self._path, self._replaces)
            _sync_folder(self._replaces.parent)

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink()

    def close(self) -> None:
        """See Output."""
        self._file.close()

    def _recover(self) -> list[Record]:
        """Read the file, drop a torn end, write what a file begins with."""
        data = self._file.readall()
        whole = whole_lines(data, quotes=self._format.quotes)
        begins = self._format.begins
        if not data.startswith(begins[: len(data)]):  # a user's own file must not be cut
            raise RequestError(f"{self._path}: is no file of captions; give another --out")
        try:
            records = self._format.read(data[:whole].decode("utf-8", "surrogateescape"))
        except (ValueError, TypeError, KeyError, csv.Error) as e:
            reason = one_line(e)
            raise RequestError(f"{self._path}: is no file of captions ({reason}); give another --out") from e
        if whole < len(data):
            self._file.truncate(whole)
        if not whole and self._format.head:
            _append(self._file, self._format.head)
        return records


class _Jsonl:
    quotes = False
    head = b""
    begins = b'{"image": '

    def line(self, record: Record) -> bytes:
        values = asdict(record)
        if not record.duplicate_of:
            del values["duplicate_of"]
        return json.dumps(values).encode() + b"\n"

    def read(self, text: str) -> list[Record]:
        return [_record(json.loads(line)) for line in text.split("\n") if line]


class _Csv:
    quotes = True
    head = (",".join(field.name for field in fields(Record)) + "\n").encode()
    begins = head

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
    record = Record(**{name: value for name, value in values.items() if name in names})
    if not isinstance(record.image, str) or not isinstance(record.caption, str):
        raise ValueError("image and caption must be strings")
    return record


# ---- one file beside each picture --------------------------------------------------------------------------


class Sidecars:
    """Captions beside their pictures: photos/a.png, photos/a.txt."""

    def __init__(self, suffix: str, pictures: Iterable[str], journal: RecordFile | None = None) -> None:
        """suffix:  of the caption files
        pictures: what the batch is about
        journal: makes all captions anew, and keeps what is done meanwhile; None: those that exist stay

        Raises RequestError for a suffix without a dot, and for two pictures with one caption file.
        """
        if not suffix.startswith(".") or "/" in suffix or suffix == ".":
            raise RequestError(f"--sidecar takes a suffix like .txt, not {suffix!r}")
        self._suffix = suffix
        self._pictures = list(pictures)
        self._journal = journal
        owner: dict[Path, str] = {}
        for picture in self._pictures:
            other = owner.setdefault(self.path(picture), picture)
            if other != picture:
                raise RequestError(
                    f"{other} and {picture} would share {self.path(picture)}; rename one or use --out"
                )

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
            with suppress(OSError):
                caption = self.path(picture).read_text("utf-8", "replace").removesuffix("\n")
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
        write_whole(self.path(record.image), (record.caption + "\n").encode("utf-8"))


# ---- what went wrong ---------------------------------------------------------------------------------------


class ErrorLog:
    """errors.jsonl: the pictures that have no caption, and why. Several runs may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, entry: Mapping[str, str]) -> None:
        """Keep a failure; its "image" says whose. Raises OSError."""
        with self._locked(create=True) as file:
            file.truncate(whole_lines(file.readall()))
            _append(file, json.dumps(entry).encode() + b"\n")

    def tidy(self, captioned: Container[str]) -> None:
        """Keep the last failure of each picture, and none of pictures that have a caption now.

        Raises OSError.
        """
        with suppress(FileNotFoundError), self._locked(create=False) as file:
            data = file.readall()
            entries: dict[str, bytes] = {}
            for line in data.splitlines(keepends=True):
                with suppress(ValueError, TypeError, KeyError):  # torn, or a stranger's
                    image = json.loads(line)["image"]
                    entries.pop(image, None)
                    if image not in captioned:
                        entries[image] = line
            kept = b"".join(entries.values())
            if not kept:
                self.path.unlink()
            elif kept != data:
                write_whole(self.path, kept)

    @contextmanager
    def _locked(self, *, create: bool) -> Iterator[io.FileIO]:
        while True:
            file = io.FileIO(os.open(self.path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666), "r+")
            with file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Not if another run has renamed or removed it before we had the lock.
                if os.path.exists(self.path) and os.path.samestat(
                    os.fstat(file.fileno()), os.stat(self.path)
                ):
                    yield file
                    return


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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file by rename: whole or not at all, and kept through a crash. Raises OSError."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # see remove_leftovers
            _append(file, data)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed `write_whole` left behind: files of its kind that nobody has locked."""
    for path in folder.glob(f"{_TEMPORARY}*.tmp"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _append(file: io.FileIO, line: bytes) -> None:
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


def _open_locked(path: Path) -> io.FileIO:
    """A file to read and append to, ours alone. Raises RequestError."""
    try:
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as e:
        raise RequestError(f"{path}: cannot be written: {e.strerror}") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RequestError(f"{path}: another run is writing it; wait for it or give another --out") from None
    except OSError as e:  # a file system without locks
        logger.warning("%s: cannot be locked (%s); let no second run write it", path, e.strerror)
    return file


def _sync_folder(folder: Path) -> None:
    """Make a rename last. Some file systems have no such thing."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
