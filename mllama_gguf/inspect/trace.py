"""Intermediate tensors by name, to find where two implementations begin to differ."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from ..backend.types import Floats
from ..errors import ModelError
from ..model import Mllama
from ..settings import DEFAULT_PROMPT
from ..vision.embedding import ImageInput

# Names that ggml gives to unnamed tensors, and to views of tensors that are already shown.
_NAMELESS = re.compile(r"(node|leaf)_\d+$|.* \(")
_MASK = "text.mask"  # infinite, as it should be


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

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return bool(np.isfinite(self.values).all())


class NotFiniteError(ModelError):
    """Tensors of a model that are not finite.

    first: the name and number of the first one in the order of computation; None: it has no name
    """

    def __init__(self, error: ModelError, first: tuple[str, int] | None) -> None:
        where = "no tensor with a name" if first is None else f"{first[0]} (number {first[1]})"
        super().__init__(f"{error}; the first tensor that is not finite: {where}")
        self.first = first


def trace(
    model: Mllama,
    image: ImageInput,
    receive: Callable[[TracedTensor], None],
    *,
    prompt: str = DEFAULT_PROMPT,
    pattern: str = "*",
) -> None:
    """Encode an image, run the prompt with it from empty caches, and report the tensors.

    receive: called with each tensor that has a name, and one that fits; it may keep the values
    pattern: of names, with *, ? and [...] as in a shell

    The conversation of the model is cleared. Raises NotFiniteError for results that are not finite, after a
    second run that looks for the first such tensor among all; else what `Mllama.caption` raises.
    """
    try:
        _run(model, image, prompt, receive, lambda n: fnmatchcase(n, pattern) and not _NAMELESS.match(n))
    except ModelError as e:
        raise NotFiniteError(e, _first_not_finite(model, image, prompt)) from e


def _run(
    model: Mllama,
    image: ImageInput,
    prompt: str,
    receive: Callable[[TracedTensor], None],
    is_wanted: Callable[[str], bool],
) -> None:
    counts: Counter[str] = Counter()

    def on_tensor(name: str, values: Floats | None) -> bool:
        if values is None:
            return is_wanted(name)
        receive(TracedTensor(name, counts[name], values.copy()))
        counts[name] += 1
        return False

    model.reset()
    with model.tap(on_tensor):
        model.caption(image, prompt, max_tokens=1)


def _is_looked_at(name: str) -> bool:
    """Copies into a cache too: a value may be beyond the cache's type."""
    return (not _NAMELESS.match(name) or "(copy of" in name) and not name.startswith(_MASK)


def _first_not_finite(model: Mllama, image: ImageInput, prompt: str) -> tuple[str, int] | None:
    first: list[tuple[str, int]] = []

    def look(tensor: TracedTensor) -> None:
        if not first and not tensor.is_finite:
            first.append((tensor.name, tensor.number))

    with suppress(ModelError):
        _run(model, image, prompt, look, lambda name: not first and _is_looked_at(name))
    return first[0] if first else None
