"""Model files with weights that are not finite."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np

NAN, INF = float("nan"), float("inf")


def damaged(source: Path, target: Path, tensor: str, value: float | None, *, row: int | None = 0) -> Path:
    """A copy of a model with one number of a tensor replaced, the first of a row.

    value: None: the whole tensor is overwritten with noise; of Q8_0 a block's scale becomes that
    row: None: all numbers are replaced
    """
    shutil.copy(source, target)
    (found,) = (t for t in gguf.GGUFReader(source).tensors if t.name == tensor)
    n_bytes = int(found.n_bytes)
    data = np.memmap(target, np.uint8, "r+", int(found.data_offset), (n_bytes,))
    if value is None:
        data[:] = np.random.default_rng(0).integers(0, 256, n_bytes, np.uint8)
    elif found.tensor_type.name == "Q8_0":
        rows = data.reshape(int(found.shape[1]), -1)
        rows[row, :2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    else:
        types = {"F32": np.float32, "F16": np.float16}
        numbers = data.view(types[found.tensor_type.name]).reshape(-1, int(found.shape[0]))
        if row is None:
            numbers[:] = value
        else:
            numbers[row, 0] = value
    data.flush()
    return target
