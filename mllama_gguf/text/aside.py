"""Long calls of C and Rust in a thread of their own, so that Ctrl-C works in the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ..errors import Aborted, OutOfMemoryError
from ..handles import ModuleLock
from ..waiting import POLL_SECONDS
from ..words import one_line

T = TypeVar("T")

_starting = ModuleLock()


def aside(
    work: Callable[[], T],
    *,
    name: str,
    seconds: float | None = None,
    stack_bytes: int = 0,
    daemon: bool = False,
    abort: Callable[[], bool] | None = None,
) -> T:
    """What `work` returns, called in another thread.

    seconds:     most time, None: all that it takes
    stack_bytes: of that thread, 0: the system's default
    daemon:      whether Python may end while that thread runs. Only for work on memory that nobody frees.
    abort:       asked every 50 ms

    Raises what `work` raises, TimeoutError, Aborted, and OutOfMemoryError for no thread. After Ctrl-C,
    TimeoutError and Aborted the thread still runs to its end, and its result is lost.
    """
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as e:  # such as a panic of Rust, which is none of Exception's
            errors.append(e)
        done.set()

    with _starting:  # the size of stacks is a setting of the process
        before = threading.stack_size(stack_bytes)
        try:
            threading.Thread(target=run, daemon=daemon, name=name).start()
        except RuntimeError as e:
            raise OutOfMemoryError(f"no thread can be started: {one_line(e)}") from e
        finally:
            threading.stack_size(before)
    rest = seconds
    while not done.wait(POLL_SECONDS if abort is not None else rest):
        if abort is None:
            raise TimeoutError
        if abort():
            raise Aborted("stopped by the abort callback")
        if rest is not None:
            rest -= POLL_SECONDS
            if rest <= 0:
                raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
