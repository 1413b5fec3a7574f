"""What several tests need."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiny

import mllama_gguf

# Most seconds between a wish to stop and the end. On a quiet machine it is a fraction of a second; what is
# stopped would go on for longer than this.
STOP_SECONDS = 8.0


@dataclass(frozen=True)
class TinyFiles:
    """One architecture of tests/tiny.py as GGUF, F32."""

    arch: tiny.Arch
    text: Path
    mmproj: Path
    one: Path


def noisy_image(seed: int, height: int = 40, width: int = 40) -> npt.NDArray[np.uint8]:
    """A noisy image, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def elsewhere(**env: str) -> dict[str, Any]:
    """How to start another Python: outside the source tree, with the package that this one uses."""
    package = Path(mllama_gguf.__file__).parents[1]
    return {"cwd": tempfile.gettempdir(), "env": {**os.environ, "PYTHONPATH": str(package), **env}}
