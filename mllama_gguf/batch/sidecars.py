"""Captions beside their images: photos/a.png has its caption in photos/a.txt or photos/a.xmp.

A file that is there is replaced or added to only if the run was asked to, and only if it is a caption file.
What this program wrote is noted in a hidden file of the folder, so that a later run knows a changed image,
a caption that was cut, and a caption that somebody has edited, which stays.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import RequestError
from ..files import AnyPath, Kind, replacing, why_protected
from ..reading import open_regular
from ..temporary import open_locked, remove_leftovers
from ..words import os_reason, show_name
from .choices import Existing
from .outputs import Journal, append, remove_empty
from .records import LARGEST_CAPTION, Jsonl, Record, combine, last_of_each
from .sources import MEDIA_SUFFIXES
from .xmp import LARGEST, XmpError, clean, parts_of, read_description, write_description

_WAIT = 60.0  # seconds for another run that adds a line


class Form(Protocol):
    """What a caption file looks like.

    kind: tells such files from others
    """

    kind: Kind

    def shown(self, caption: str) -> str:
        """The text of a caption that `read` gives back."""

    def read(self, data: bytes) -> str:
        """The caption in a file; "" if there is none. Raises ValueError."""

    def write(self, old: bytes, text: str, caption: str) -> bytes:
        """A file with this text, made of the caption. old: the file as it is. Raises ValueError."""


class TextForm:
    """The caption and a line end."""

    def __init__(self) -> None:
        self.kind = Kind("caption", _is_text)

    def shown(self, caption: str) -> str:
        """See Form."""
        return caption

    def read(self, data: bytes) -> str:
        """See Form."""
        return data.decode("utf-8", "replace").removesuffix("\n")

    def write(self, old: bytes, text: str, caption: str) -> bytes:
        """See Form."""
        return (text + "\n").encode("utf-8", "backslashreplace")


class XmpForm:
    """An XMP sidecar; see `xmp`."""

    def __init__(self) -> None:
        self.kind = Kind(
            "caption file in XMP", lambda file: read_description(file.read(LARGEST + 1)) is not None
        )

    def shown(self, caption: str) -> str:
        """See Form."""
        return clean(parts_of(caption)[0])

    def read(self, data: bytes) -> str:
        """See Form."""
        return read_description(data)

    def write(self, old: bytes, text: str, caption: str) -> bytes:
        """See Form."""
        return write_description(old, text, parts_of(caption)[1])


class Sidecars:
    """Captions beside their images."""

    def __init__(
        self,
        suffix: str,
        images: Iterable[str],
        journal: Path | None = None,
        *,
        how: Existing | None = None,
        separator: str = "\n",
        full_name: bool = False,
        log: Path | None = None,
        inputs: Iterable[AnyPath] = (),
    ) -> None:
        """suffix:  of the caption files; .xmp: XMP sidecars
        images:  what the batch is about
        journal: a file of our own that keeps new captions of images that have one (see Journal); None: the
                 old ones stay
        how:     what happens to captions that exist; None: "skip", with a journal "overwrite"
        separator: between an old caption and a new one
        full_name: a.png.txt instead of a.txt
        log:     a file of our own that keeps what was written; None: there is none
        inputs:  other files that the run reads or writes, none of which may be a caption file

        Raises RequestError for a text that is not a suffix or is one of images, and for a caption file that
        is an input.
        """
        check_suffix(suffix)
        self._suffix = suffix
        self._how: Existing = how or ("skip" if journal is None else "overwrite")
        self._separator, self._full_name = separator, full_name
        self._form: Form = XmpForm() if suffix.lower().endswith(".xmp") else TextForm()
        self._images = list(images)
        self._journaled: dict[str, Record] = {}  # of a run that was killed
        self._expected: dict[str, str] = {}  # what a caption that is made again must still be
        self.refused: Mapping[str, str] = self._find_shared()
        read = {_identity(path): path for path in (*self._images, *inputs)}
        for image in self._images:
            there = _identity(self.path(image))
            if there is not None and there in read:
                raise RequestError(
                    f"the caption of {show_name(image)} would replace the input {show_name(read[there])}; "
                    "give another --sidecar, or use --out"
                )
        self._journal = Journal(journal) if journal is not None else None
        self._log = SidecarLog(log) if log is not None else None

    def path(self, image: str) -> Path:
        """The caption file of an image."""
        return Path((image if self._full_name else os.path.splitext(image)[0]) + self._suffix)

    def caption(self, image: str) -> str:
        """What the caption file of an image has; "" if there is none."""
        return self._read(self.path(image))

    def _find_shared(self) -> dict[str, str]:
        """Images that would have one caption file together."""
        owners: dict[Path, list[str]] = {}
        for image in self._images:
            owners.setdefault(self.path(image), []).append(image)
        return {
            image: f"would share {show_name(path)} with {show_name(group[image == group[0]])}; use "
            "--sidecar-full-name, or rename one"
            for path, group in owners.items()
            if len(group) > 1
            for image in group
        }

    def unwritable(self, images: Iterable[str]) -> Mapping[str, str]:
        """See Output. Each folder is asked about once."""
        folders: dict[Path, str] = {}
        found: dict[str, str] = {}
        for image in images:
            path = self.path(image)
            way_out = "make it writable, or use --out"
            try:
                os.lstat(path)
            except (FileNotFoundError, NotADirectoryError, ValueError):
                words = folders.get(path.parent, "")
                if path.parent not in folders:
                    words = folders[path.parent] = why_protected(path)
            except OSError as e:  # too long with its suffix, or in a closed folder
                words, way_out = os_reason(e), "use --out"
            else:
                words = why_protected(path)
            if words:
                found[image] = f"cannot write {show_name(path)}: {words}; {way_out}"
        return found

    def records(self) -> Iterable[Record]:
        """See Output."""
        for folder in {Path(image).parent for image in self._images}:
            remove_leftovers(folder)
        written = self._log.read() if self._log is not None else {}
        if self._journal is not None:
            for record in self._journal.records():
                try:
                    self._continue(record, written.get(os.path.realpath(record.image)))
                except FileExistsError:  # a file of another kind: the image is tried again, and fails alone
                    continue
                self._journaled[record.image] = record
                yield replace(record, existing="")
            return
        for image in self._images:
            if image in self.refused:
                continue
            text = self._read(self.path(image))
            if not text.strip():
                continue
            ours = written.get(os.path.realpath(image))
            if ours is not None and self._text(ours) == text:
                yield replace(ours, image=image, existing="")
            else:
                yield Record(image, text, "stop", 0, "")

    def has_others(self) -> bool:
        """Whether captions were noted of images that are there and are none of this batch."""
        mine = {os.path.realpath(image) for image in self._images}
        noted = self._log.read() if self._log is not None else {}
        return any(image not in mine and os.path.lexists(image) for image in noted)

    def again(self, images: Collection[str]) -> None:
        """See Output. A caption that somebody edits meanwhile stays."""
        self._expected = {image: self._read(self.path(image)) for image in images}

    def write(self, record: Record) -> None:
        """See Output."""
        if self._journal is not None:
            there = self._read(self.path(record.image))
            before = self._journaled.get(record.image)
            if before is not None and there == self._text(before):  # of the image as it was
                there = before.existing
            record = replace(record, existing=there)
            self._journal.write(record)
        self._note(record)  # a note without a file does no harm, a file without a note is not known as ours
        self._put(record)

    def finish(self) -> None:
        """See Output."""
        if self._journal is not None:
            self._journal.remove()
        if self._log is not None:
            self._log.tidy()

    def close(self, *, failed: bool = False) -> None:
        """See Output."""
        if self._journal is not None:
            self._journal.close(failed=failed)

    def _continue(self, record: Record, noted: Record | None) -> None:
        """Write the file of a record of the journal, which came first. A caption that somebody has edited
        since stays. noted: what the log has of the image"""
        there = self._read(self.path(record.image))
        if not there.strip():
            record = replace(record, existing="")
        elif there not in (record.existing, self._text(record)):
            return
        if noted is None or replace(noted, image=record.image) != self._whole(record):
            self._note(record)
        self._put(record)

    def _note(self, record: Record) -> None:
        if self._log is not None:
            self._log.add(self._whole(record))

    def _whole(self, record: Record) -> Record:
        """A record with the caption as the file has it, which the log knows without that of before."""
        if record.existing and self._how != "overwrite":
            record = replace(record, caption=self._text(record))
        return replace(record, existing="")

    def _text(self, record: Record) -> str:
        """The caption file's text of a record."""
        return combine(record.existing, self._form.shown(record.caption), self._how, self._separator)

    def _read(self, path: Path) -> str:
        """The caption that is there; "" if there is none, or something else."""
        try:
            with open_regular(path) as file:
                return self._form.read(file.read(LARGEST + 1))
        except (OSError, ValueError):
            return ""

    def _put(self, record: Record) -> None:
        """Write the caption file of a record. Raises OSError."""
        path = self.path(record.image)
        try:
            with open_regular(path) as file:
                old = file.read(LARGEST + 1)
        except FileNotFoundError:
            old = b""
        if old:
            self._check(path, record, old)
        text = self._text(record)
        try:
            data = self._form.write(old, text, record.caption)
        except XmpError as e:
            raise FileExistsError(errno.EEXIST, f"it exists, and {e}; move it away", os.fspath(path)) from e
        if data != old:
            try:
                with replacing(path, durable=True, overwrite=bool(old)) as file:
                    file.write(data)
            except FileExistsError:
                if self._read(path) != text:  # another run has made the same caption
                    raise

    def _check(self, path: Path, record: Record, old: bytes) -> None:
        """Check that a file may be replaced or added to. Raises OSError."""
        try:
            text = self._form.read(old)
            fits = self._form.kind.fits(path)
        except ValueError as e:
            text, fits = str(e), False
        known = (self._expected.get(record.image), self._text(record))  # the second: of another run
        if not fits:
            words = f"it exists and is not a {self._form.kind.name}; move it away"
        elif self._journal is not None or not text.strip() or text in known:
            return
        else:
            words = "it was made or edited meanwhile; it stays"
        raise FileExistsError(errno.EEXIST, words, os.fspath(path))


class SidecarLog:
    """Which captions this program wrote beside images, a line each. Several runs may add to it."""

    def __init__(self, path: Path) -> None:
        """path: touched when there is something to note"""
        self._path = path
        self._format = Jsonl()

    def read(self) -> dict[str, Record]:
        """The last record of each image, by its path without links. A file that cannot be read has none."""
        found: dict[str, Record] = {}
        with suppress(OSError), open_regular(self._path) as file:
            for line in file:
                with suppress(ValueError, TypeError, RecursionError):
                    for record in self._format.read(line.decode("utf-8", "surrogateescape")):
                        found[os.path.realpath(self._path.parent / record.image)] = record
        return found

    def add(self, record: Record) -> None:
        """Note a caption. That it cannot be noted is not error: a later run then knows less."""
        image = os.path.relpath(os.path.realpath(record.image), os.path.realpath(self._path.parent))
        with suppress(OSError):
            file, _ = open_locked(self._path, _WAIT)
            with file:
                size = file.seek(0, os.SEEK_END)
                try:
                    if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # a kill cut the last line
                        append(file, b"\n")
                    append(file, self._format.line(replace(record, image=image)))
                finally:
                    remove_empty(file, self._path)

    def tidy(self) -> None:
        """Keep the last line of each image."""
        with suppress(OSError):
            file, _ = open_locked(self._path, _WAIT, create=False)
            with file:
                records = []
                for line in file.readall().splitlines():
                    with suppress(ValueError, TypeError, RecursionError):
                        records += self._format.read(line.decode("utf-8", "surrogateescape"))
                last = last_of_each(records)
                if len(last) < len(records):
                    with replacing(self._path) as new:
                        new.write(b"".join(self._format.line(record) for record in last.values()))


def read_sidecars(images: Iterable[str], suffix: str, full_name: bool = False) -> dict[str, str]:
    """The captions that files beside images hold; images without one are left out. Raises RequestError for a
    text that is not a suffix."""
    found = Sidecars(suffix, (), full_name=full_name)
    captions = {image: found.caption(image) for image in images}
    return {image: caption for image, caption in captions.items() if caption.strip()}


def check_suffix(suffix: str) -> None:
    """Check that caption files may have this suffix. Raises RequestError."""
    if not suffix.startswith(".") or not suffix.strip(".") or set(suffix) & {"/", os.sep, "\0"}:
        raise RequestError(f"--sidecar takes a suffix like .txt, not {suffix!r}")
    if os.path.splitext(f"x{suffix}")[1].strip().lower() in MEDIA_SUFFIXES:
        raise RequestError(
            f"--sidecar {suffix}: this suffix belongs to images or films, which captions would replace; "
            "give another, as in .txt"
        )


def _is_text(file: BinaryIO) -> bool:
    data = file.read(LARGEST_CAPTION + 1)
    data.decode("utf-8")
    return len(data) <= LARGEST_CAPTION and b"\0" not in data


def _identity(path: AnyPath) -> tuple[int, int] | None:
    """Tells files apart, whatever their names."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None
    return info.st_dev, info.st_ino
