"""What a page shows: the captions and the failures that a batch left."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..batch.failures import output_name, read_failures
from ..batch.records import read_records
from ..batch.sidecars import read_sidecars
from ..batch.sources import list_images
from ..errors import RequestError
from ..words import show_name


@dataclass(frozen=True)
class Entry:
    """An image of a batch.

    image:        path, as the batch was told
    file:         absolute path where the image is now, or None
    caption:      "" if it has none
    is_cut:       the caption was cut by max_tokens or n_ctx
    error:        why it has no caption, or ""
    duplicate_of: path of the image with the same content whose caption this is, or ""
    """

    image: str
    file: Path | None
    caption: str = ""
    is_cut: bool = False
    error: str = ""
    duplicate_of: str = ""


def entries_of(
    source: str, *, sidecar: str = ".txt", full_name: bool = False, recursive: bool = False
) -> list[Entry]:
    """What a batch left, in its order; then the failures.

    source:    a file of captions (JSONL or CSV), or a folder of images with caption files beside them
    sidecar, full_name, recursive: of a folder, as `mllama caption` has them

    Failures are read from the errors.jsonl beside it, those of images that have a caption left out. Raises
    RequestError for a source that is something else, and for one that names no image.
    """
    if os.path.isdir(source):
        home = Path(source)
        logs = {home: f"--sidecar {sidecar}"}
        images = list_images([source], recursive=recursive)
        captions = read_sidecars(images, sidecar, full_name)
        made = [Entry(image, Path(os.path.abspath(image)), captions.get(image, "")) for image in images]
    else:
        home = Path(os.path.realpath(source)).parent
        # A run notes failures beside the name that it was given, which may be a link.
        logs = {folder: output_name(source, folder) for folder in (home, Path(source).parent)}
        made = [
            Entry(
                image,
                _found(image, home),
                record.caption,
                record.finish_reason == "length",
                duplicate_of=str(record.duplicate_of),
            )
            for image, record in read_records(source).items()
        ]
    failures = {
        image: words.removeprefix(f"{show_name(image)}: ")
        for folder, output in logs.items()
        for image, words in read_failures(folder, output).items()
    }
    entries = [
        entry if entry.caption else replace(entry, error=failures.get(entry.image, "")) for entry in made
    ]
    known = {entry.image for entry in made}
    for image, error in failures.items():
        if image not in known:
            entries.append(Entry(image, _found(image, home), error=error))
    if not entries:
        raise RequestError(f"{show_name(source)}: holds no captions")
    return entries


def common_folder(paths: Iterable[str]) -> str:
    """The folder that all paths are in, with a slash at its end; "" if they have none in common."""
    folders = {os.path.dirname(path) for path in paths}
    try:
        common = os.path.commonpath(folders)
    except ValueError:  # some are absolute and others not, or there are none
        return ""
    return os.path.join(common, "") if common else ""


def _found(image: str, home: Path) -> Path | None:
    """Where an image is: paths are relative to the current folder, or to that of the captions."""
    for path in (image, os.path.join(home, image)):
        if os.path.isfile(path):
            return Path(os.path.abspath(path))
    return None
