"""From a model's name to its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..reading import can_be_file
from ..words import os_reason, show_name
from .defaults import Defaults
from .digests import stored_sha256

if TYPE_CHECKING:
    from .ollama import OllamaModel

BUNDLED = {"demo": Path(__file__).parents[1] / "data" / "demo.gguf"}


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model.

    sha256:     what they must hash to, where that is known
    parameters: arguments of `Mllama` that the model needs
    defaults:   the model's own settings of replies
    ollama:     the model in Ollama's store that this is
    """

    name: str
    text: Path
    mmproj: Path | None = None
    sha256: Mapping[Path, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    defaults: Defaults = field(default_factory=Defaults)
    ollama: OllamaModel | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.text,) if self.mmproj is None else (self.text, self.mmproj)


def default_model() -> str:
    """The name of the default model: $MLLAMA_MODEL or the bundled one."""
    return os.environ.get("MLLAMA_MODEL") or "demo"


def resolve(
    name: str | os.PathLike[str] | None = None, mmproj: str | os.PathLike[str] | None = None
) -> ModelFiles:
    """The files of a model that is on this machine; nothing is fetched.

    name:   `demo`; a path; `ollama:[[HOST/]NAMESPACE/]NAME[:TAG]`; `hf:OWNER/REPO[@REVISION]/FILE`; a name in
            models.lock; None: `default_model()`
    mmproj: vision encoder, a path or `hf:...`, in place of the model's own; a file of the hub that
            models.lock knows brings its own

    Raises ModelError: there is no such model, or it is not here.
    """
    words = os.fspath(name) if name is not None else default_model()
    if not words or not can_be_file(words):
        raise ModelError(f"{show_name(words, 80) or 'an empty name'}: no model has such a name")
    if words.startswith("ollama:"):
        files = _from_ollama(words)
    elif words.startswith("hf:"):
        files = _from_hub(words)
    elif words in BUNDLED and not _is_no_folder(words):
        files = _bundled(words)
    elif _is_no_folder(words) or (os.path.isdir(words) and not _is_locked(words)):
        files = _from_path(Path(words))
    else:
        files = _from_lock(words)
    if mmproj is None:
        return files
    other = _from_hub(os.fspath(mmproj)) if os.fspath(mmproj).startswith("hf:") else _from_path(Path(mmproj))
    return replace(files, mmproj=other.text, sha256={**files.sha256, **other.sha256})


def _is_no_folder(words: str) -> bool:
    """Whether there is something at a path that may be a model. A folder that has a model's name is none."""
    return os.path.exists(words) and not os.path.isdir(words)


def _is_locked(words: str) -> bool:
    from .lockfile import find_locked

    return find_locked(words) is not None


def _from_path(path: Path) -> ModelFiles:
    sha256 = stored_sha256(path)
    return ModelFiles(str(path), path, sha256={path: sha256} if sha256 else {})


def _bundled(name: str) -> ModelFiles:
    path = BUNDLED[name]
    if not os.path.isfile(path):
        raise ModelError(f"the model {name!r} is missing from the installed package ({path})")
    return ModelFiles(name, path)


def _from_ollama(words: str) -> ModelFiles:
    from . import ollama
    from .references import OllamaRef

    ref = OllamaRef.parse(words)
    model = ollama.find(ref)
    if model is None:
        raise ModelError(f"{words} is not on this machine; fetch it: mllama pull {words}")
    paths = model.files
    sha256 = {path: blob.sha256 for path, blob in zip(paths, model.manifest.blobs, strict=True)}
    mmproj = paths[1] if len(paths) > 1 else None
    return ModelFiles(str(ref), paths[0], mmproj, sha256, model.settings, model.defaults, model)


def _from_hub(words: str) -> ModelFiles:
    from . import hub
    from .lockfile import find_locked_file
    from .references import HubRef

    ref = HubRef.parse(words)
    locked = find_locked_file(ref)
    if locked is not None:
        return _from_lock(locked.name, words)
    path = hub.find_cached(ref)
    if path is None:
        raise ModelError(f"{words} is not on this machine; fetch it: mllama pull {words}")
    sha256 = stored_sha256(path)
    return ModelFiles(str(ref), path, sha256={path: sha256} if sha256 else {})


def _from_lock(name: str, asked: str | None = None) -> ModelFiles:
    from .lockfile import find_locked, known_names

    locked = find_locked(name)
    if locked is None:
        try:
            os.stat(name)
        except PermissionError as e:
            raise ModelError(f"{show_name(name)}: {os_reason(e)}") from e
        except OSError:
            pass
        raise ModelError(f"{name}: no such file, nor a model's name ({known_names()}, ollama:..., hf:...)")
    paths = locked_paths(locked)
    if paths is None:
        raise ModelError(f"{asked or name} is not on this machine; fetch it: mllama pull {asked or name}")
    by_role = {file.role: path for file, path in zip(locked.files, paths, strict=True)}
    sha256 = {path: file.sha256 for file, path in zip(locked.files, paths, strict=True)}
    return ModelFiles(name, by_role["model"], by_role.get("mmproj"), sha256, locked.parameters)


def locked_paths(locked: Any) -> list[Path] | None:
    """Where the files of a `LockedModel` are, in its order; None if one is not on this machine."""
    from . import hub, ollama
    from .lockfile import DATA

    paths = []
    for file in locked.files:
        if locked.source == "bundled":
            path: Path | None = DATA / file.file
        elif locked.source.startswith("hf:"):
            path = hub.find_cached(locked.hub_ref(file))
        else:
            path = ollama.find_blob(file.blob)
        if path is None:
            return None
        paths.append(path)
    return paths
