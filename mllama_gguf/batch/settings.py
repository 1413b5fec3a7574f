"""The settings of a run, kept beside its output, so that a later run notices when its own differ."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MllamaError, RequestError
from ..files import write_whole
from ..reading import open_regular, parse_json
from ..store.resolve import ModelFiles
from ..words import as_json, brief, os_reason, show_name
from .captions import CaptionOptions

_MARK = "settings of a run of mllama caption"  # what tells our files from others
_LARGEST = 16 << 20  # bytes
_SAMPLE = 1 << 20  # bytes at either end of a model file that are looked at
# The settings that captions of one output have in common, and what they are called.
_SAME = {
    "prompt": "prompt",
    "system": "system message",
    "begin": "--begin",
    "chat_template": "chat template",
    "model": "model",
    "model_says": "settings of the model itself",
    "form": "schema or other form",
    "prefix": "prefix",
    "suffix": "suffix",
}
# Those that may differ; one line says that they do.
_MAY_DIFFER = {
    "max_tokens": "--max-tokens",
    "temperature": "temperature",
    "seed": "seed",
    "sampling": "sampling options",
    "max_tiles": "--max-tiles",
}


def run_settings(options: CaptionOptions, files: ModelFiles, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes captions, as JSON. settings: those of the model that the user gave. Raises MllamaError for
    a model that cannot be read."""
    chat_template = settings.get("chat_template")
    defaults = files.defaults
    found = {
        "prompt": options.prompt,
        "system": options.system,
        "begin": options.begin,
        "chat_template": None if chat_template is None else _digest(chat_template.encode("utf-8", "replace")),
        "model": [_fingerprint(path) for path in files.paths],
        "model_says": repr((dict(defaults.options), defaults.system, len(defaults.messages))),
        "form": options.response_format,
        "prefix": options.prefix,
        "suffix": options.suffix,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "sampling": dict(options.sampling),
        "max_tiles": settings.get("max_tiles"),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _fingerprint(path: Path) -> str:
    """Tells a model file from others: its size, and a digest of its head and its end."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_SAMPLE)
            file.seek(max(0, size - _SAMPLE))
            return f"{size} {_digest(head + file.read(_SAMPLE))}"
    except OSError as e:
        raise MllamaError(f"{show_name(path)}: {os_reason(e)}") from e


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class KeptSettings:
    """Settings as an earlier run left them.

    looked: when all images that have a caption were last known to be unchanged, as `time.time` counts
    """

    settings: Mapping[str, Any]
    looked: float


class SettingsFile:
    """The file beside an output that keeps the settings of its last run."""

    def __init__(self, path: Path) -> None:
        """path: of a file of our own, which need not be there"""
        self.path = path

    @classmethod
    def beside(cls, folder: Path, name: str) -> SettingsFile:
        """The file for an output of that name."""
        hidden = f".{name}.mllama.json"
        if len(os.fsencode(hidden)) > 200:
            hidden = f".mllama-{_digest(os.fsencode(name))}.json"
        return cls(folder / hidden)

    def read(self) -> KeptSettings | None:
        """What an earlier run left; None if there is nothing. Raises RequestError for a file of others."""
        try:
            with open_regular(self.path) as file:
                words = parse_json(file.read(_LARGEST))
            if words["is"] != _MARK:
                raise ValueError
            kept = KeptSettings(dict(words["settings"]), float(words["looked"]))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise RequestError(f"{show_name(self.path)}: {os_reason(e)}") from e
        except (ValueError, TypeError, KeyError, OverflowError) as e:
            raise RequestError(
                f"{show_name(self.path)}: the settings of the run are kept in a file of this name, which "
                "is something else; move it away"
            ) from e
        return kept

    def write(self, settings: Mapping[str, Any], looked: float) -> None:
        """Keep settings. Raises OSError."""
        write_whole(self.path, as_json({"is": _MARK, "looked": looked, "settings": settings}) + "\n")


def check_same(output: str, kept: KeptSettings, settings: Mapping[str, Any]) -> list[str]:
    """Check that the captions of an output were made with these settings.

    output: its name, for the error

    Returns the names of settings that differ and may differ. Raises RequestError that names another one.
    """
    for key, name in _SAME.items():
        old, new = kept.settings.get(key), settings.get(key)
        if key in kept.settings and old != new:
            hidden = key in ("model", "model_says", "chat_template") or brief(old) == brief(new)
            shown = "" if hidden else f" ({brief(old)}, not {brief(new)})"
            raise RequestError(
                f"{show_name(output)}: the captions there were made with another {name}{shown}; give the "
                "same, or another output; --overwrite makes all once more, --any-settings mixes them"
            )
    return [
        name
        for key, name in _MAY_DIFFER.items()
        if key in kept.settings and kept.settings[key] != settings.get(key)
    ]


def now() -> float:
    """Seconds, as `KeptSettings.looked` counts."""
    return time.time()
