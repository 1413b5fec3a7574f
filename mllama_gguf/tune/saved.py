"""The settings that `mllama tune` found best, kept for each model, machine and choice of devices."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..cpus import usable_cpus
from ..errors import RequestError
from ..files import Kind, check_folder, check_output, replacing
from ..reading import open_regular, parse_json, read_text
from ..settings import Settings
from ..words import one_line, os_reason, show_name

logger = logging.getLogger(__name__)

VERSION = 1
HEAD_BYTES = 1024 * 1024  # a file is known by its size and beginning, which holds its keys
# The settings that are tried and kept.
TUNED = ("n_gpu_layers", "vision_device", "n_threads", "n_batch", "flash_attn")


def config_path() -> Path:
    """$MLLAMA_CONFIG_DIR/tuned.json, else in the user's folder for such files."""
    import platformdirs

    folder = os.environ.get("MLLAMA_CONFIG_DIR") or platformdirs.user_config_dir(
        "mllama_gguf", appauthor=False
    )
    return Path(folder) / "tuned.json"


def head_sha256(path: str | os.PathLike[str]) -> str:
    """Tells model files apart, wherever they lie: sha256 of the size and the first mebibyte."""
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
        return hashlib.sha256(str(os.fstat(file.fileno()).st_size).encode() + head).hexdigest()


def key_of(paths: Iterable[str | os.PathLike[str]], offload: Mapping[str, Any]) -> str:
    """The key of a model, on this machine, offloaded to these devices.

    paths:   its files
    offload: devices, tensor_split, main_gpu, offload_kqv, rpc_servers as `Mllama` takes them; those given

    Raises OSError, BackendError.
    """
    from ..backend.local import devices

    words = [head_sha256(path) for path in paths]
    machine = [usable_cpus(), *([d.name, d.description, d.type] for d in devices())]
    parts = [words, machine, sorted(offload.items())]
    return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()


def read_tuned(key: Callable[[], str]) -> dict[str, Any]:
    """The settings of `TUNED` kept for a key, which is asked for if there are any; {} if there are none, or
    if the key cannot be had for an OSError. A bad file is a warning. Raises what else `key` raises."""
    path = config_path()
    try:
        tuned = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as e:
        return _ignored(path, e)
    try:
        name = key() if tuned else ""
    except OSError:  # of the model's files: opening them says it better
        return {}
    kept = tuned.get(name, {})
    try:
        return _checked(kept.get("settings", {}) if isinstance(kept, dict) else kept)
    except ValueError as e:
        return _ignored(path, e)


def _ignored(path: Path, error: Exception) -> dict[str, Any]:
    logger.warning("%s is ignored: %s; mend it or move it away", path, one_line(error))
    return {}


def check_tuned() -> None:
    """Check that `write_tuned` may write its file: it is not another program's, and what it keeps can be
    read. Raises RequestError."""
    path = config_path()
    if check_folder(path.parent).is_dir():
        check_output(path, Kind("file of settings of `mllama tune`", _is_tuned), overwrite=True)
        _read_all(path)


def _is_tuned(file: BinaryIO) -> bool:
    content = parse_json(file.read())
    return isinstance(content, dict) and {"version", "tuned"} <= set(content)


def write_tuned(key: str, settings: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Keep settings for a key; about: more for the reader of the file. Returns the file.

    Raises RequestError if the file is another program's, OSError.
    """
    check_tuned()
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:  # another process that adds settings waits
        tuned = _read_all(path)
        tuned[key] = {"settings": _checked(dict(settings)), **about}
        file.write((json.dumps({"version": VERSION, "tuned": tuned}, indent=2) + "\n").encode())
    return path


def _read_all(path: Path) -> dict[str, Any]:
    """The settings of all keys, to add to. Raises RequestError for a file that would lose some."""
    try:
        return _read(path) if path.stat().st_size else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        reason = os_reason(e) if isinstance(e, OSError) else one_line(e)
        words = "the settings there would be lost; move it away, or use --no-save"
        raise RequestError(f"{show_name(path)}: {reason}: {words}") from e


def _read(path: Path) -> dict[str, Any]:
    content = parse_json(read_text(path))
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"not a file of version {VERSION}")
    tuned = content.get("tuned")
    if not isinstance(tuned, dict):
        raise ValueError("'tuned' is not an object")
    return tuned


def _checked(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ValueError("settings are not an object")
    for name in settings:
        if name not in TUNED:
            raise ValueError(f"{name!r} is not a setting that is tuned")
    plain = Settings.checked(settings)
    for name, value in settings.items():
        if value is None or getattr(plain, name) != value:
            raise ValueError(f"{name} is {value!r}")
    return settings
