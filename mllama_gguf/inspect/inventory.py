"""The models that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import MllamaError, ModelError
from ..gguf.reader import read_gguf
from ..settings import DEFAULTS
from ..store import hub, ollama
from ..store.lockfile import usable_locked_models
from ..store.resolve import BUNDLED, ModelFiles, resolve

Place = Literal["bundled", "downloaded", "ollama", "hub"]
N_CTX: int = DEFAULTS["n_ctx"]  # tokens, for the memory that a model takes


@dataclass(frozen=True)
class Found:
    """One model. problem: why it cannot be used, in words; the fields after it are then None.

    memory: bytes for its weights and caches with N_CTX tokens and one image
    fits:   whether that much of the machine's memory is available now
    """

    name: str
    place: Place
    files: tuple[Path, ...] = field(default=())
    size: int = 0  # bytes, of all files
    problem: str | None = None
    layout: str | None = None  # as ModelInfo has it
    memory: int | None = None
    fits: bool | None = None


def inventory() -> list[Found]:
    """All models that `resolve` finds by name: bundled, downloaded, in Ollama's stores, in
    the hub's cache. Models of Ollama and of the hub that are not mllama are left out."""
    found: dict[tuple[object, ...], Found] = {}
    for name, place in names():
        try:
            files = resolve(name)
        except MllamaError as e:
            found[(name,)] = Found(name, place, problem=str(e))
            continue
        # Each name that Ollama has is one, also of the same weights, as `ollama list` shows them.
        key = (*files.paths, name if files.ollama else None)
        if key not in found and (place == "bundled" or is_text_model(files.text)):
            found[key] = look(name, place, files)
    return list(found.values())


def names() -> Iterator[tuple[str, Place]]:
    for name in BUNDLED:
        yield name, "bundled"
    seen = set()
    for store in ollama.find_stores():
        place: Place = "downloaded" if store == ollama.downloads() else "ollama"
        for ref, _ in ollama.list_tags(store):
            if ref.key not in seen:
                seen.add(ref.key)
                yield str(ref), place
    for name, locked in usable_locked_models().items():
        if locked.source != "bundled" and _is_here(name):
            yield name, "downloaded"
    for hub_ref, _ in hub.scan():
        yield str(hub_ref), "hub"


def _is_here(name: str) -> bool:
    try:
        resolve(name)
    except MllamaError:
        return False
    return True


def is_text_model(path: Path) -> bool:
    """An mllama text model: not another architecture, not a projector alone."""
    try:
        file = read_gguf(path)
    except ModelError:
        return True  # it is shown, with what is wrong with it
    return file.architecture == "mllama" and file.has_text


def look(name: str, place: Place, files: ModelFiles) -> Found:
    """The facts about a model."""
    from .info import model_info

    try:
        info = model_info(files.paths)[0]
    except MllamaError as e:
        size = sum(path.stat().st_size for path in files.paths)
        return Found(name, place, files.paths, size, str(e))
    size, needs = sum(file.size for file in info.files), info.memory
    memory = max(
        (need for need in needs if need.n_ctx <= N_CTX), key=lambda need: need.n_ctx, default=needs[0]
    ).total
    return Found(name, place, files.paths, size, None, info.layout, memory, memory <= available_memory())


def available_memory() -> int:
    """Bytes that programs can get without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def closed_stores() -> list[Path]:
    """Ollama stores that exist and that this user may not read."""
    return [store for store in ollama.find_stores() if _is_closed(store)]


def _is_closed(store: Path) -> bool:
    for folder in ollama.FOLDERS:
        try:
            os.listdir(store / folder)
        except PermissionError:
            return True
        except OSError:
            continue
    return False
