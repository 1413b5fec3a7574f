"""Intermediate tensors by name, to find where two implementations begin to differ."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from ..backend.types import Floats
from ..model import Mllama
from ..settings import DEFAULT_PROMPT
from ..vision.embedding import Picture

# Names that ggml gives to unnamed tensors, and to views of tensors that are already shown.
_NAMELESS = re.compile(r"(node|leaf)_\d+$|.* \(")


@dataclass(frozen=True, eq=False)
class TracedTensor:
    """One tensor as it was computed.

    name:   its name in the graph
    number: how often the name came before; graphs are run once for each batch of the prompt
    values: float32, slowest dimension first
    """

    name: str
    number: int
    values: Floats

    @property
    def sha256(self) -> str:
        """Hex digest of the values as little-endian float32 in C order."""
        return hashlib.sha256(np.ascontiguousarray(self.values, "<f4").data).hexdigest()


def trace(
    model: Mllama,
    image: Picture,
    receive: Callable[[TracedTensor], None],
    *,
    prompt: str = DEFAULT_PROMPT,
    pattern: str = "*",
) -> None:
    """Encode an image, run the prompt with it from empty caches, and report the tensors.

    receive: called with each tensor that has a name, and one that fits; it may keep the values
    pattern: of names, with *, ? and [...] as in a shell

    The conversation of the model is cleared. Raises what `Mllama.caption` raises.
    """
    counts: Counter[str] = Counter()

    def on_tensor(name: str, values: Floats | None) -> bool:
        if values is None:
            return fnmatchcase(name, pattern) and not _NAMELESS.match(name)
        receive(TracedTensor(name, counts[name], values.copy()))
        counts[name] += 1
        return False

    model.reset()
    with model.tap(on_tensor):
        model.caption(image, prompt, max_tokens=1)
