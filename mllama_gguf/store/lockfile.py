"""`models.lock`: published models by name, with their source and the sha256 of each file (TOML).

Names are looked up in the user's file ($MLLAMA_LOCK, or models.lock in the current folder), then in the one
that comes with the package. Nothing in such a file can point outside the folders that models live in.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import ModelError
from ..files import AnyPath, Kind, cannot_write, check_output, replacing
from ..reading import decode_text, read_text
from ..words import brief, one_line, os_reason, show_name
from .digests import Blob, is_sha256, is_size
from .references import HubRef, OllamaRef

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

VERSION = 1
DATA = Path(__file__).parents[1] / "data"
SHIPPED = DATA / "models.lock"
# What a model may need to be opened with: arguments of `Mllama`.
PARAMETERS = {"chat_template": str, "allow_quantized_vision": bool}


@dataclass(frozen=True)
class Licence:
    name: str
    url: str
    notice: str

    @property
    def key(self) -> str:
        """Its name in a lock file."""
        return "-".join(self.name.lower().replace(".", " ").split())


@dataclass(frozen=True)
class LockedFile:
    """One file. size: bytes, None if not known; size_about: rounded, where there is no size."""

    role: Literal["model", "mmproj"]
    sha256: str
    size: int | None = None
    size_about: int | None = None
    file: str | None = None  # in the hub's repository, or in the package

    @property
    def blob(self) -> Blob:
        return Blob(self.sha256, self.size)

    @property
    def likely_size(self) -> int:
        """Bytes, exact or not; 0 if nothing is known."""
        return self.size or self.size_about or 0


@dataclass(frozen=True)
class LockedModel:
    """One model of a lock file. parameters: arguments that it must be opened with, of PARAMETERS."""

    name: str
    source: str  # "bundled", "ollama:NAME:TAG", or "hf:OWNER/REPO[@REVISION]"
    files: tuple[LockedFile, ...]
    lock: Path
    title: str = ""
    layout: str | None = None
    licence: Licence | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> LockedFile:
        return next(file for file in self.files if file.role == "model")

    @property
    def mmproj(self) -> LockedFile | None:
        return next((file for file in self.files if file.role == "mmproj"), None)

    def ollama_ref(self) -> OllamaRef:
        return OllamaRef.parse(self.source)

    def hub_ref(self, file: LockedFile) -> HubRef:
        return HubRef.parse(f"{self.source}/{file.file}")


def lock_paths() -> list[Path]:
    """The lock files that exist, the one with priority first."""
    chosen = os.environ.get("MLLAMA_LOCK")
    user = Path(os.path.expanduser(chosen)) if chosen else Path("models.lock")
    own = chosen or (os.path.isfile(user) and not user.samefile(SHIPPED))
    return [user, SHIPPED] if own else [SHIPPED]


def locked_models() -> dict[str, LockedModel]:
    """All models by name. Raises ModelError for a lock file that is no good."""
    found: dict[str, LockedModel] = {}
    for path in reversed(lock_paths()):
        found.update(read_lock(path))
    return found


def usable_locked_models() -> dict[str, LockedModel]:
    """As `locked_models`, without the user's lock file if that is no good; this is logged. For what needs no
    lock file."""
    try:
        return locked_models()
    except ModelError as e:
        logger.warning("%s (this lock file is ignored; mend it or move it away)", e)
        return read_lock(SHIPPED)


@contextmanager
def without_warning() -> Iterator[None]:
    """In the block, `usable_locked_models` does not log a lock file that is no good."""
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def known_names() -> str:
    """The names of all models, for an error. Raises ModelError."""
    return show_name(", ".join(sorted(locked_models())), 1000)


def find_locked(name: str) -> LockedModel | None:
    """The model of that name, if any lock file has it. Raises ModelError."""
    return locked_models().get(name)


def find_locked_file(ref: HubRef) -> LockedModel | None:
    """The model whose text file is this one of the hub, if any lock file has it. Raises ModelError."""
    for model in locked_models().values():
        if model.source.startswith("hf:") and ref == model.hub_ref(model.model):
            return model
    return None


def read_lock(path: Path) -> dict[str, LockedModel]:
    """The models of one lock file, checked. Raises ModelError naming the file and the entry."""
    try:
        text = read_text(path)
    except OSError as e:
        raise ModelError(f"{path}: {os_reason(e)}") from e
    except ValueError as e:
        raise ModelError(f"{path}: is not a lock file: not UTF-8") from e
    return _parse(path, text)


def _parse(path: Path, text: str) -> dict[str, LockedModel]:
    """The models of a lock file's text. path: for messages, and to know the package's own."""
    try:
        words = tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: is not a lock file: not TOML: {one_line(e)}") from e
    if words.get("version") != VERSION:
        raise ModelError(
            f"{path}: version {brief(words.get('version'))} of a lock file is not supported ({VERSION} is)"
        )
    return {
        name: _model(path, name, entry, words.get("licences"))
        for name, entry in _table(path, "models", words.get("models", {})).items()
    }


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"{path}: {where} is not a table")
    return value


def _model(path: Path, name: str, entry: Any, licences: Any) -> LockedModel:
    where = f"models.{show_name(name, 100)}"
    entry = _table(path, where, entry)
    files = entry.get("files")
    if not isinstance(files, list):
        raise ModelError(f"{path}: {where} has no files")
    model = LockedModel(
        name=name,
        source=_value(path, where, entry, "source", str),
        files=tuple(_file(path, f"{where}.files[{i}]", file) for i, file in enumerate(files)),
        lock=path,
        title=_value(path, where, entry, "title", str, ""),
        layout=_value(path, where, entry, "layout", str, None),
        licence=_licence(path, where, entry, licences),
        parameters=_table(path, f"{where}.parameters", entry.get("parameters", {})),
    )
    roles = [file.role for file in model.files]
    if roles.count("model") != 1 or roles.count("mmproj") != len(roles) - 1 or len(roles) > 2:
        raise ModelError(f"{path}: {where} must have one file of role model and at most one of role mmproj")
    for key, value in model.parameters.items():
        if key not in PARAMETERS or not isinstance(value, PARAMETERS[key]):
            raise ModelError(
                f"{path}: {where}.parameters.{show_name(key, 60)} = {brief(value)} is not supported"
            )
    _check_source(path, model)
    return model


def _check_source(path: Path, model: LockedModel) -> None:
    """Check that no file of it can lie outside its folder."""
    try:
        if model.source.startswith("ollama:"):
            model.ollama_ref()
        elif model.source.startswith("hf:"):
            for file in model.files:
                if file.file is None:
                    raise ModelError("a file of the hub needs its name in the repository: file = ...")
                model.hub_ref(file)
        elif not (model.source == "bundled" and (path == SHIPPED or _is_shipped(model))):
            raise ModelError(
                f"{brief(model.source, 100)} is not a source; write ollama:NAME:TAG or hf:OWNER/REPO"
            )
    except ModelError as e:
        raise ModelError(f"{path}: models.{show_name(model.name, 100)}: {e}") from e


def _is_shipped(model: LockedModel) -> bool:
    """Whether it is the package's own entry: a user's file may have begun as a copy of ours."""
    shipped = read_lock(SHIPPED).get(model.name)
    return shipped is not None and (shipped.source, shipped.files) == (model.source, model.files)


def _file(path: Path, where: str, entry: Any) -> LockedFile:
    entry = _table(path, where, entry)
    file = LockedFile(
        role=_value(path, where, entry, "role", str),
        sha256=_value(path, where, entry, "sha256", str),
        size=_value(path, where, entry, "size", int, None),
        size_about=_value(path, where, entry, "size_about", int, None),
        file=_value(path, where, entry, "file", str, None),
    )
    if not is_sha256(file.sha256):
        raise ModelError(f"{path}: {where}.sha256 = {brief(file.sha256, 100)} is not 64 hexadecimal digits")
    return file


def _licence(path: Path, where: str, entry: dict[str, Any], licences: Any) -> Licence | None:
    name = _value(path, where, entry, "licence", str, None)
    if name is None:
        return None
    at = f"licences.{show_name(name, 100)}"
    words = _table(path, at, _table(path, "licences", licences).get(name))
    return Licence(*(_value(path, at, words, key, str) for key in ("name", "url", "notice")))


_REQUIRED = object()


def _value(
    path: Path, where: str, entry: dict[str, Any], key: str, kind: Any, default: Any = _REQUIRED
) -> Any:
    value = entry.get(key, default)
    if value is _REQUIRED:
        raise ModelError(f"{path}: {where} has no {key}")
    if key in entry and not (is_size(value) if kind is int else isinstance(value, kind)):
        raise ModelError(f"{path}: {where}.{key} = {brief(value)} is not a usable {kind.__name__}")
    return value


def write_locked(path: AnyPath, model: LockedModel) -> None:
    """Put a model into a lock file, in place of its old entry. The rest is unchanged, with its comments.

    The file is made if there is none. Raises ModelError, RequestError, MllamaError.
    """
    import tomlkit

    check_lock_output(path)
    try:
        with replacing(path) as file:  # another process that adds a model waits
            old = tomlkit.parse(read_text(path) if os.path.exists(path) else "")
            if not old:
                old.add("version", tomlkit.item(VERSION))
            if model.licence:
                licences = old.setdefault("licences", tomlkit.table(is_super_table=True))
                licences[model.licence.key] = {
                    "name": model.licence.name,
                    "url": model.licence.url,
                    "notice": model.licence.notice,
                }
            old.setdefault("models", tomlkit.table(is_super_table=True))[model.name] = _entry(model)
            words = tomlkit.dumps(old)
            _parse(Path(path), words)  # what is written can be read
            file.write(words.encode())
    except OSError as e:
        raise cannot_write(path, e) from e


def check_lock_output(path: AnyPath) -> None:
    """Check that a lock file can be written here. An existing one must be valid: all but one entry is kept.

    Raises RequestError, ModelError.
    """
    target = check_output(path, Kind("lock file of models", _is_lock), overwrite=True)
    if target.is_file() and target.stat().st_size:
        read_lock(Path(path))


def _is_lock(file: BinaryIO) -> bool:
    try:
        words = tomllib.loads(decode_text(file.read()))
    except RecursionError:
        return False
    return isinstance(words.get("version"), int) and set(words) <= {"version", "models", "licences"}


def _entry(model: LockedModel) -> dict[str, Any]:
    licence = model.licence and model.licence.key
    entry = {"title": model.title, "source": model.source, "layout": model.layout, "licence": licence}
    files = [
        {
            key: value
            for key in ("role", "file", "sha256", "size", "size_about")
            if (value := getattr(file, key)) is not None and not (key == "size_about" and file.size)
        }
        for file in model.files
    ]
    kept = {key: value for key, value in entry.items() if value}
    return {**kept, **({"parameters": dict(model.parameters)} if model.parameters else {}), "files": files}
