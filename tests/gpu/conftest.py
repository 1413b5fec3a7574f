"""A GPU of this machine, whichever backend of ggml brings it. Without one these tests fail, on purpose.

scripts/gpu_check.sh runs them.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from mllama_gguf.backend.local import devices
from mllama_gguf.backend.types import Device


@pytest.fixture(scope="session")
def gpus() -> list[Device]:
    """The GPUs, started."""
    precision: Any = os.environ.get("MLLAMA_GPU_PRECISION", "fast")
    found = [d for d in devices(start=True, precision=precision) if d.type in ("gpu", "igpu")]
    if not found:
        pytest.fail("ggml shows no GPU; GGML_BACKEND_PATH names a backend that is a library of its own")
    broken = [d.error for d in found if d.error is not None]
    assert not broken, broken
    return found


@pytest.fixture(scope="session")
def gpu(gpus: list[Device]) -> str:
    """The name of the first GPU."""
    return gpus[0].name
