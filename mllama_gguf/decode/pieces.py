"""An iterator that computes, for one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from ..errors import BusyError
from ..handles import OneProcess

T = TypeVar("T")


class Pieces(OneProcess, Generic[T]):
    """What a generator gives, piece by piece.

    A generator that is asked while it computes raises ValueError, which says nothing to whoever reads a
    reply. Here a second thread, or a callback of the computation, gets BusyError.
    """

    def __init__(self, pieces: Iterator[T]) -> None:
        """pieces: a generator"""
        self._pieces = pieces
        self._reading = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self._begin()
        try:
            return next(self._pieces)
        finally:
            self._reading.release()

    def close(self) -> None:
        """For the reader: end it here. Nothing follows."""
        self._begin()
        try:
            close = getattr(self._pieces, "close", None)
            if close is not None:
                close()
        finally:
            self._reading.release()

    def _begin(self) -> None:
        """Keep other threads out. Raises BusyError if one is in, MllamaError in a forked process."""
        self.check_process()
        if not self._reading.acquire(blocking=False):
            raise BusyError("this reply is being read, by another thread or around this callback")
