"""Waiting that the caller can stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .errors import Aborted

POLL_SECONDS = 0.05  # between two looks whether to stop


class Lock(Protocol):
    """A lock of `threading`."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Whether it was acquired in this time, in seconds."""


def acquire(lock: Lock, stop: Callable[[], bool], words: str) -> None:
    """Acquire a lock. Raises Aborted with these words once `stop` says True while it waits."""
    while not lock.acquire(timeout=POLL_SECONDS):
        if stop():
            raise Aborted(words)
