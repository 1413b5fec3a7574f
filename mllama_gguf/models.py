"""Models by name."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ModelError

BUNDLED = {"demo": Path(__file__).parent / "data" / "demo.gguf"}


def bundled_path(name: str) -> Path:
    """The file of a model that comes with the package. Raises ModelError for another name."""
    path = BUNDLED.get(name)
    if path is None:
        raise ModelError(f"no model is called {name!r}; there are: {', '.join(BUNDLED)}")
    if not path.is_file():
        raise ModelError(f"the model {name!r} is missing from the installed package ({path})")
    return path


def model_path(name_or_path: str | os.PathLike[str]) -> Path:
    """A path to a file as it is, or the file of a bundled model. Raises ModelError if there is neither."""
    path = Path(name_or_path)
    if path.exists() or str(name_or_path) not in BUNDLED:
        if not path.exists():
            raise ModelError(f"{path}: no such file, nor a model's name ({', '.join(BUNDLED)})")
        return path
    return bundled_path(str(name_or_path))
