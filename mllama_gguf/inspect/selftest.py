"""A known answer: the demo model's states and logits for one image, as double precision computes them.

The numbers in data/selftest.json come from `scripts/make_selftest.py`: the model in plain numpy, independent
of libmllama. `compare` computes the same on a device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend.types import Floats
from ..model import Mllama
from ..store.resolve import resolve
from ..words import one_line

FILE = Path(__file__).parents[1] / "data" / "selftest.json"
# Relative L2. ggml rounds what it multiplies with F16 weights, and keeps K and V in F16; a GPU may sum in F16
# too. Two right computations are then up to 2e-3 apart; wrong ones by more than 0.1.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Known:
    """The inputs, and of the results a sample.

    tokens: with one image token
    states: float32, every STATES_STEP-th value of [tiles, positions, width]
    logits: float32 [vocab_size], of the last position
    """

    tokens: tuple[int, ...]
    states: Floats
    logits: Floats


STATES_STEP = 97


def known() -> Known:
    """The numbers of data/selftest.json."""
    content = json.loads(FILE.read_text("utf-8"))
    return Known(
        tuple(content["tokens"]),
        np.array(content["states"], np.float32),
        np.array(content["logits"], np.float32),
    )


def image() -> npt.NDArray[np.uint8]:
    """The image: stripes and slopes, uint8 [120, 200, 3]; on tiles of 80 pixels it takes several."""
    rows, columns = np.mgrid[0:120, 0:200]
    return np.stack(
        [(columns * 255 // 199), (rows * 255 // 119), ((rows // 8 + columns // 8) % 2) * 255], axis=-1
    ).astype(np.uint8)


def relative_error(actual: Floats, expected: Floats) -> float:
    """L2 norm of the difference over that of the expected values; inf if it is not finite."""
    difference = np.asarray(actual, np.float64) - expected
    error = float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))
    return error if np.isfinite(error) else float("inf")


def compare(device: str, *, is_cpu: bool) -> tuple[float, float]:
    """The errors of states and logits that a device computes. All layers run there, in a process of their
    own. Raises MllamaError."""
    expected = known()
    place: dict[str, Any] = (
        {} if is_cpu else {"n_gpu_layers": -1, "devices": [device], "vision_device": device}
    )
    with Mllama(resolve("demo").text, isolate=True, image_cache=False, **place) as model:
        states = model.encode_image(image()).states
        logits = model.logits(expected.tokens, [image()])
    return (
        relative_error(states.reshape(-1)[::STATES_STEP], expected.states),
        relative_error(logits[-1], expected.logits),
    )


def verdict(errors: tuple[float, float]) -> tuple[bool, str]:
    """Whether the errors are those of rounding, and both in words."""
    words = f"error {errors[0]:.1e} (states), {errors[1]:.1e} (logits)"
    return max(errors) <= TOLERANCE, one_line(words)
