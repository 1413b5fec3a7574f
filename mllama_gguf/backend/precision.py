"""How exactly GPUs compute: what ggml's backends read from the environment when their devices start.

By default they round the factors of products: Vulkan to F16, cuBLAS those of F32 matrices to TF32. Sums in
F32 are asked for in the graphs, by libmllama.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..errors import RequestError
from ..handles import ModuleLock
from ..settings import Precision

# Vulkan: no arithmetic in F16, no matrix units, no products of bytes, which all round. cuBLAS: no TF32.
_EXACT = {
    "GGML_VK_DISABLE_F16": "1",
    "GGML_VK_DISABLE_COOPMAT": "1",
    "GGML_VK_DISABLE_COOPMAT2": "1",
    "GGML_VK_DISABLE_INTEGER_DOT_PRODUCT": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
}
_lock = ModuleLock()
_begun: Precision | None = None


def begin(precision: Precision | None, has_gpus: Callable[[], bool]) -> None:
    """To be called before anything starts a device. Nothing happens without GPUs.

    precision: None: as the GPUs run already, else "fast"

    Raises RequestError if the GPUs of this process run with another precision.
    """
    global _begun
    with _lock:
        precision = precision or _begun or "fast"
        if _begun == precision or not has_gpus():
            return
        if _begun is not None:
            raise RequestError(
                f"precision {precision!r}: the GPUs of this process run with {_begun!r}; use another "
                f"process, or isolate=True"
            )
        if precision == "exact":
            os.environ.update(_EXACT)
        _begun = precision
