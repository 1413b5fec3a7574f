"""Which existing captions belong to the present content of their image."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..files import quiet_stat
from ..reading import open_regular
from .choices import Redo
from .records import Record

# How much the clocks of this machine and of a file server may differ.
CLOCK_SECONDS = 2.0


def is_stale(
    record: Record, redo: Collection[Redo], unchanged_since: float | None, folders: dict[str, float]
) -> bool:
    """Whether an existing caption is to be made again. folders: what is known of them; empty at first"""
    if "length" in redo and record.finish_reason == "length":
        return True
    if "empty" in redo and not record.caption.strip():
        return True
    if unchanged_since is None or not record.sha256:
        return False
    try:
        info, link = os.stat(record.image), os.lstat(record.image)
        parent = os.path.dirname(record.image)
        if parent not in folders:
            folders[parent] = max(map(_renamed, [*Path(record.image).parents][:-1]), default=0.0)
        # A file that is renamed to this name keeps the time when it was written.
        if (
            max(info.st_mtime, info.st_ctime, link.st_ctime, folders[parent])
            < unchanged_since - CLOCK_SECONDS
        ):
            return False
        return file_sha256(record.image) != record.sha256
    except (OSError, ValueError):
        return False  # it is gone, and its caption stays


def _renamed(folder: Path) -> float:
    """When a folder may have been renamed, or a link made that stands for one; 0.0: not since its files
    changed."""
    info = folder.lstat()
    return info.st_ctime if stat.S_ISLNK(info.st_mode) or info.st_ctime > info.st_mtime else 0.0


def known_contents(known: Collection[Record], pending: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """The existing captions, by content. Caption files beside their images do not tell the content: an image
    is read for it only if it is as large as one that is still to be captioned."""
    sizes: set[int | None] = set()
    if any(not record.sha256 for record in known):
        sizes = {_size(path) for path in pending} - {None}
    for record in known:
        if record.sha256:
            yield record.sha256, record
        elif _size(record.image) in sizes:
            with suppress(OSError, ValueError):
                yield file_sha256(record.image), record


def file_sha256(path: str) -> str:
    """Hex digest of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(path: str) -> int | None:
    info = quiet_stat(path)
    return info.st_size if info else None
