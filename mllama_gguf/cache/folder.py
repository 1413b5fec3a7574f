"""The folder of the image cache, and which files are ours.

The directory that the user names may hold anything. The cache has a subfolder of its own in it, with a marker
file that backup programs know too (CACHEDIR.TAG). Only there files are removed, and only files whose names
this package makes. A subfolder of that name without the marker is taken only if every file in it has such a
name, as after a removal of the marker.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..files import write_whole
from ..reading import open_regular
from ..temporary import is_temporary, remove_leftovers
from .entries import OLD_SUFFIXES, SUFFIXES

NAME = "mllama-images"
MARKER = "CACHEDIR.TAG"
DIGEST_SUFFIX = ".weights"
MARK = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder is the image cache of mllama_gguf. It may be deleted at any time: what was in it is\n"
    b"# computed again. Without this file, the cache does not use the folder.\n"
)
_ALL_SUFFIXES = (*SUFFIXES.values(), *OLD_SUFFIXES, DIGEST_SUFFIX)
_ENTRY = re.compile("[0-9a-f]{64}(" + "|".join(map(re.escape, _ALL_SUFFIXES)) + ")")
_ENTRY_MAGIC = b"mllama\0"


def make(folder: Path) -> None:
    """Make the folder and its marker if they are missing. Raises OSError, also for one that is not ours."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_ours(folder):
        return
    for name in os.listdir(folder):
        if name != MARKER and not (_ENTRY.fullmatch(name) or is_temporary(name)):
            words = "it has files of other programs; move them away, or set another folder"
            raise OSError(errno.EEXIST, words, os.fspath(folder))
    if (folder / MARKER).exists() and (folder / MARKER).stat().st_size:
        raise OSError(errno.EEXIST, f"its {MARKER} is another program's", os.fspath(folder))
    write_whole(folder / MARKER, MARK)


def is_ours(folder: Path) -> bool:
    """Whether the folder has our marker. Without it nothing may be removed."""
    try:
        with open_regular(folder / MARKER) as file:
            return file.read(len(MARK) + 1) == MARK
    except OSError:
        return False


def files(folder: Path, suffixes: str | tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
    """The regular files of ours with one of the suffixes. Raises OSError; nothing if there is no folder."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffixes) and _ENTRY.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another process removed it
                    if entry.is_file(follow_symlinks=False):
                        yield entry


def clear(folder: Path) -> None:
    """Remove all files of ours, the marker, and the folder if nothing else is in it. Raises OSError."""
    if not is_ours(folder):
        return
    for entry in files(folder, _ALL_SUFFIXES):
        Path(entry.path).unlink(missing_ok=True)
    remove_leftovers(folder)
    if os.listdir(folder) == [MARKER]:
        (folder / MARKER).unlink(missing_ok=True)
        with suppress(OSError):  # somebody uses it again
            folder.rmdir()


def remove_old(folder: Path) -> None:
    """Remove entries of our folder that only earlier versions read. Raises OSError."""
    for entry in files(folder, OLD_SUFFIXES):
        Path(entry.path).unlink(missing_ok=True)


def clear_old(folder: Path) -> None:
    """Remove entries that earlier versions wrote into the user's own folder: those whose names and contents
    can only be ours. Raises OSError."""
    for entry in files(folder, _ALL_SUFFIXES):
        path = Path(entry.path)
        with open_regular(path) as file:
            head = file.read(65)
        is_digest = path.suffix == DIGEST_SUFFIX
        if re.fullmatch(b"[0-9a-f]{64}", head) if is_digest else head.startswith(_ENTRY_MAGIC):
            path.unlink(missing_ok=True)
