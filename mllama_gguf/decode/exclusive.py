"""Calls that take a context which several conversations share, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ..backend.base import SharedContext
from ..backend.types import Bytes, Floats
from ..handles import OneProcess

Stop = Callable[[], bool]


class Owner(Protocol):
    """Whoever has the context."""

    def exclusive(self, stop: Stop) -> AbstractContextManager[SharedContext]:
        """The sole use of it. Raises Aborted once `stop` says so."""


class Exclusive(OneProcess):
    """The image functions of `Context`, each with the sole use of a shared one."""

    def __init__(self, owner: Owner, stop: Stop) -> None:
        """stop: whether to wait no longer, and to stop what computes."""
        self._owner = owner
        self._stop = stop

    def _use(self) -> AbstractContextManager[SharedContext]:
        return self._owner.exclusive(self._stop)

    def image_fill(self, states: Sequence[Floats | int]) -> int:
        """As `Context.image_fill`."""
        with self._use() as context:
            return context.image_fill(states)

    def image_mapped_size(self, n_tiles: int) -> int:
        """As `Context.image_mapped_size`."""
        with self._use() as context:
            return context.image_mapped_size(n_tiles)

    def image_map(self, n_tiles: int, path: Path, offset: int) -> int:
        """As `Context.image_map`."""
        with self._use() as context:
            return context.image_map(n_tiles, path, offset)

    def image_free(self, slot: int) -> None:
        """As `Context.image_free`."""
        with self._use() as context:
            context.image_free(slot)

    def image_size(self, slot: int, image: int) -> int:
        """As `Context.image_size`."""
        with self._use() as context:
            return context.image_size(slot, image)

    def image_get(self, slot: int, image: int, offset: int, n_bytes: int) -> Bytes:
        """As `Context.image_get`."""
        with self._use() as context:
            return context.image_get(slot, image, offset, n_bytes)

    def image_set(self, slot: int, image: int, offset: int, data: Bytes) -> None:
        """As `Context.image_set`."""
        with self._use() as context:
            context.image_set(slot, image, offset, data)
