"""Writes the page: one HTML file with everything in it, which asks no network.

Texts of others stand only in blocks of JSON, in which no "<" is left, and the script shows them as text. The
policy in the page's head names the digests of its one script and its one style sheet, so that nothing else
runs. Images stand in blocks of `BLOCK` lines of base64, which the script reads when one of them comes into
view: a page of 10,000 images opens as quickly as one of 10.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote_from_bytes

from ..cpus import usable_cpus
from ..errors import ImageError
from ..files import Kind
from ..vision.thumbnail import SIDE, thumbnail
from ..words import one_line, printable, show_name
from .entries import Entry, common_folder

PARTS = Path(__file__).parent / "static"
BEGINS = b"<!doctype html>\n<!-- written by `mllama gallery` -->\n"
KIND = Kind.begins_with("page of `mllama gallery`", BEGINS)
BLOCK = 64  # images of a block

_A = TypeVar("_A")
_B = TypeVar("_B")


def write_page(
    file: BinaryIO,
    entries: Sequence[Entry],
    *,
    title: str,
    side: int = SIDE,
    beside: Path | None = None,
    progress: Callable[[bool], object] = lambda failed: None,
) -> None:
    """Write a page of entries.

    title:    of the page
    side:     longer side of the small images in pixels
    beside:   folder of the page, if it is to link to the image files; None: no links
    progress: called for each entry; failed: its image could not be shown

    Raises OSError.
    """
    script, style = (_part(name) for name in ("gallery.js", "gallery.css"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    icon = "data:image/svg+xml;base64," + base64.b64encode(_part("icon.svg").encode()).decode()
    head, tail = (
        _part("gallery.html")
        .replace("{{policy}}", html.escape(policy))
        .replace("{{icon}}", icon)
        .replace("{{style}}", style)
        .replace("{{title}}", html.escape(printable(title, keep="")))
        .split("{{data}}\n")
    )
    file.write(BEGINS + head.encode())
    common = common_folder(entry.image for entry in entries)
    facts = []
    block: list[str] = []
    for number, (entry, image) in enumerate(zip(entries, _images(entries, side), strict=True)):
        if number % BLOCK == 0 and number:
            _write_block(file, number // BLOCK - 1, block)
        block.append(base64.b64encode(image).decode() if isinstance(image, bytes) else "")
        facts.append(_facts(entry, common, "" if isinstance(image, bytes) else image, beside))
        progress(not isinstance(image, bytes))
    _write_block(file, (len(entries) - 1) // BLOCK, block)
    file.write(f'<script type="application/json" id="entries">{_json(facts)}</script>\n'.encode())
    file.write(tail.replace("{{script}}", script).encode())


def _facts(entry: Entry, common: str, unseen: str, beside: Path | None) -> dict[str, Any]:
    """What the script needs to know of an entry. common: the folder that is not told, or ""; unseen: why its
    image is not shown"""

    def told(words: str) -> str:
        return words.replace(show_name(common), "") if os.path.isabs(common) and len(common) > 1 else words

    name = os.path.normpath(entry.image).removeprefix(os.path.normpath(common) + os.sep if common else "")
    facts: dict[str, Any] = {"name": printable(name, keep=""), "caption": printable(entry.caption)}
    if entry.is_cut:
        facts["cut"] = True
    if entry.error:
        facts["error"] = told(printable(entry.error))
    if entry.duplicate_of:
        facts["same"] = printable(os.path.basename(entry.duplicate_of), keep="")
    if unseen:
        facts["unseen"] = unseen
    if beside is not None and entry.file is not None:
        facts["link"] = quote_from_bytes(os.fsencode(os.path.join(".", os.path.relpath(entry.file, beside))))
    return facts


def _images(entries: Iterable[Entry], side: int) -> Iterator[bytes | str]:
    """The small image of each entry, or why there is none."""

    def make(entry: Entry) -> bytes | str:
        if entry.file is None:
            return "missing"
        try:
            return thumbnail(entry.file, side)
        except ImageError as e:
            return one_line(str(e).replace(show_name(entry.file), "it").removeprefix("it: "))

    return _in_threads(make, entries)


def _in_threads(make: Callable[[_A], _B], items: Iterable[_A]) -> Iterator[_B]:
    """`map` with a thread for each CPU, a few results ahead."""
    workers = usable_cpus()
    with ThreadPoolExecutor(workers, "thumbnail") as pool:
        rest = iter(items)
        coming = [pool.submit(make, item) for item in islice(rest, 2 * workers)]
        try:
            while coming:
                yield coming.pop(0).result()
                coming += [pool.submit(make, item) for item in islice(rest, 1)]
        finally:
            for job in coming:
                job.cancel()


def _write_block(file: BinaryIO, number: int, lines: list[str]) -> None:
    words = "\n".join(lines)
    file.write(f'<script type="text/plain" id="images-{number}">{words}</script>\n'.encode())
    lines.clear()


def _json(value: Any) -> str:
    """JSON that may stand in a script element: ASCII, and nothing that ends the element or begins a
    comment."""
    words = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return words.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return (PARTS / name).read_text("utf-8").strip()


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
