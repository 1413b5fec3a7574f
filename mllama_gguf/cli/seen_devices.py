"""The devices that were listed last, for completion. Without the file only their names are not completed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import MllamaError
from ..files import replacing
from ..reading import read_text


def _path() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("mllama_gguf") / "devices"


def remember(names: Iterable[str]) -> None:
    """Keep the names; a folder that cannot be written to is not an error."""
    kept = list(names)
    text = "".join(f"{name}\n" for name in kept)
    with suppress(OSError, MllamaError, ValueError):
        path = _path()
        if seen() != kept:
            os.makedirs(path.parent, exist_ok=True)
            with replacing(path) as file:
                file.write(text.encode())


def seen() -> list[str]:
    """The names that were kept last."""
    with suppress(OSError, MllamaError, ValueError):
        return [line for line in read_text(_path()).splitlines() if line and line.isprintable()][:64]
    return []
