"""Captions as records, and records as lines of JSONL and CSV."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, BinaryIO

from ..errors import RequestError
from ..reading import open_regular, parse_json
from ..words import as_json, brief, one_line, os_reason, show_name
from .choices import Existing

UNREADABLE = (ValueError, TypeError, KeyError, csv.Error)  # what reading records raises
LARGEST_CAPTION = 1 << 20  # bytes of a caption file; what is larger is something else
csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))  # Python's own would refuse long captions of ours


@dataclass(frozen=True)
class Record:
    """A caption that is done.

    image:         path, as the batch was told
    finish_reason: "stop", or "length" for a caption that max_tokens or n_ctx cut
    tokens:        tokens of the caption
    sha256:        of the image's file; "": not known
    duplicate_of:  path of the image with the same content whose caption this is, or ""
    existing:      the older caption that it was put after or before, in files of our own; else ""
    """

    image: str
    caption: str
    finish_reason: str
    tokens: int
    sha256: str
    duplicate_of: str = ""
    existing: str = ""


def combine(existing: str, caption: str, how: Existing, separator: str) -> str:
    """A new caption with the one that exists, or alone."""
    if how == "append" and existing.strip():
        return existing + separator + caption
    if how == "prepend" and existing.strip():
        return caption + separator + existing
    return caption


def last_of_each(records: Iterable[Record]) -> dict[str, Record]:
    """The last record of each image, in the order of the first ones."""
    return {record.image: record for record in records}


class Jsonl:
    """An object a line."""

    quotes = False
    head = b""
    begins = b'{"image": '

    def is_one(self, file: BinaryIO) -> bool:
        """Whether a file begins with a record, or with a torn one."""
        if not self.begins.startswith(file.read(len(self.begins))):
            return False
        file.seek(0)
        line = file.readline(16 * LARGEST_CAPTION)
        return self.is_record(line) or not (line.endswith(b"\n") or _is_json(line))

    def is_record(self, line: bytes) -> bool:
        """Whether this is a whole record; the line end may be missing."""
        try:
            return bool(self.read(line.decode("utf-8", "surrogateescape")))
        except (ValueError, TypeError):
            return False

    def fault(self, end: bytes) -> str:
        """Why what follows the last line end is not a record that a kill cut; "" if it is one."""
        end = end.rstrip(b"\0 \t\r")  # a crash of the machine may leave NULs
        is_ours = end.startswith(self.begins) or self.begins.startswith(end)
        return "" if is_ours and not _is_json(end) else "this is not a caption"

    def line(self, record: Record) -> bytes:
        """A record as a line. Optional fields that say nothing are left out."""
        values = asdict(record)
        for name in ("duplicate_of", "existing"):
            if not values[name]:
                del values[name]
        return as_json(values).encode() + b"\n"

    def read(self, text: str) -> list[Record]:
        """The records of whole lines. Raises ValueError, TypeError."""
        return [_record(parse_json(line)) for line in text.split("\n") if line]


class Csv:
    """A row of a table, which begins with the names of its columns."""

    quotes = True
    names = tuple(field.name for field in fields(Record) if field.name != "existing")
    head = (",".join(names) + "\n").encode()

    def is_one(self, file: BinaryIO) -> bool:
        """Whether a file begins with the names of the columns, or with a part of them."""
        return self.head.startswith(file.read(len(self.head)))

    def is_record(self, line: bytes) -> bool:
        """Without its line end no row is known to be whole."""
        return False

    def fault(self, end: bytes) -> str:
        """Why what follows the last whole row is not a row that a kill cut; "" if it is one."""
        if any(map(self._is_row, end.split(b"\n")[:-1])):
            return "a quote here or above is not closed, and takes in the rows after it"
        return ""

    def _is_row(self, line: bytes) -> bool:
        """Whether a line is a whole row. The lines of a row that a kill cut in a caption are none."""
        with suppress(csv.Error):
            for row in csv.reader([line.decode("utf-8", "surrogateescape")], strict=True):
                return len(row) == len(self.names) and row[self.names.index("tokens")].isdigit()
        return False

    def line(self, record: Record) -> bytes:
        """A record as a row."""
        text = io.StringIO()
        values = asdict(record)
        # The writer quotes the characters of its line end, and before Python 3.13 no other "\r".
        csv.writer(text, lineterminator="\r\n").writerow(values[name] for name in self.names)
        return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"

    def read(self, text: str) -> list[Record]:
        """The records of whole rows. Raises ValueError, TypeError, KeyError, csv.Error."""
        return [_record({**row, "tokens": int(row["tokens"])}) for row in _rows(text)]


FORMATS: dict[str, type[Jsonl | Csv]] = {".jsonl": Jsonl, ".csv": Csv}


def read_records(path: str | os.PathLike[str]) -> dict[str, Record]:
    """The captions of a file that a batch wrote, or writes now: the last of each image.

    Another program may have written it in the same form, as `jq` does: lines of JSON, or a table, with an
    image and a caption in each. Raises RequestError for a file that cannot be read, or that is none of these.
    """
    try:
        with open_regular(path) as file:
            data = file.read().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as e:
        reason = os_reason(e) if isinstance(e, OSError) else "the name cannot be used"
        raise RequestError(f"{show_name(path)}: {reason}") from e
    form: Jsonl | Csv = Jsonl() if data.lstrip()[:1] in (b"{", b"") else Csv()
    whole = whole_lines(data, quotes=form.quotes)
    end = data[whole:]
    is_whole = form.is_record(end) or (not form.quotes and _is_json(end))  # without its line end
    if is_whole or not data.startswith(form.head):  # only a batch's file may be cut
        whole = len(data)
    elif words := form.fault(end):
        raise RequestError(f"{show_name(path)}: line {line_number(data, whole)}: {words}")
    text = data[:whole].decode("utf-8", "surrogateescape")
    try:
        rows = map(parse_json, filter(str.strip, text.split("\n"))) if not form.quotes else _rows(text)
        return last_of_each(map(_with_defaults, rows))
    except UNREADABLE as e:
        raise RequestError(f"{show_name(path)}: is not a file of captions ({reason_of(e)})") from e


_CELL = re.compile(r'"[^"]*"|[^",\n]+')


def _rows(text: str) -> Iterable[Any]:
    """The rows of a table as objects. Older versions did not quote "\\r" in a cell."""

    def quoted(found: re.Match[str]) -> str:
        cell, end = found[0], ""
        if cell.endswith("\r") and text[found.end() : found.end() + 1] == "\n":
            cell, end = cell[:-1], "\r"  # a line end of two characters
        return f'"{cell}"{end}' if "\r" in cell and not cell.startswith('"') else cell + end

    if "\r" in text:
        text = _CELL.sub(quoted, text)
    return csv.DictReader(io.StringIO(text, newline=""), strict=True)


def _with_defaults(values: Any) -> Record:
    """A record of which only the image and the caption must be there."""
    if not isinstance(values, dict) or "image" not in values or "caption" not in values:
        raise ValueError("each line needs an image and a caption")
    others = {name: "" if values.get(name) is None else str(values[name]) for name in _OTHERS}
    return _record({"image": values["image"], "caption": values["caption"], "tokens": 0, **others})


_OTHERS = ("finish_reason", "sha256", "duplicate_of")


def _record(values: Any) -> Record:
    names = {field.name for field in fields(Record)}
    if not isinstance(values, dict):
        raise ValueError("a record is an object")
    record = Record(**{name: value for name, value in values.items() if name in names and value is not None})
    if not isinstance(record.image, str) or not isinstance(record.caption, str):
        raise ValueError("image and caption must be strings")
    for name, value in asdict(record).items():
        if not isinstance(value, int if name == "tokens" else str):
            raise ValueError(f"{name} is {brief(value)}")
    return record


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def line_ends(data: bytes, *, quotes: bool = False) -> list[int]:
    """Where the lines that are complete end, in bytes. quotes: a line end inside double quotes, as in CSV, is
    none."""
    size, ends, inside = 0, [], False
    for line in data.split(b"\n")[:-1]:
        size += len(line) + 1
        if quotes and line.count(b'"') % 2:
            inside = not inside
        if not inside:
            ends.append(size)
    return ends


def reason_of(error: Exception) -> str:
    """Why records cannot be read, in words."""
    return one_line(error).replace("unexpected end of data", "a quote is not closed")


def line_number(data: bytes, position: int) -> int:
    """The number of the line that begins at a position."""
    return data.count(b"\n", 0, position) + 1


def whole_lines(data: bytes, *, quotes: bool = False) -> int:
    """Bytes of the lines that are complete. quotes: as in `line_ends`."""
    ends = line_ends(data, quotes=quotes)
    return ends[-1] if ends else 0
