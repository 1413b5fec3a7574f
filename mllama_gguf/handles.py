"""Objects that belong to one process, and the C objects that they hold.

Such an object cannot be copied: both copies would free the same memory. After `os.fork()` the child process
has a copy anyway. There it can neither compute, because the threads stay in the parent, nor be freed, because
devices and child processes belong to the parent. So it says that it must be opened in the child.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NoReturn, SupportsIndex, TypeVar, overload

from .errors import CopyError, MllamaError

END_SECONDS = 5.0  # for daemon threads to leave C when Python ends

T = TypeVar("T", bound="OneProcess")
R = TypeVar("R")


class FoundOnce(Generic[R]):
    """A property whose value is found when it is first asked for, and kept in the object.

    `functools.cached_property` has a lock before Python 3.12, one for all objects: if another thread holds it
    when a process forks, the child waits for it for ever. Here two threads may find the same value twice.
    """

    def __init__(self, find: Callable[[Any], R]) -> None:
        self._find = find
        self.__doc__ = find.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, one: None, owner: type) -> FoundOnce[R]: ...
    @overload
    def __get__(self, one: object, owner: type) -> R: ...
    def __get__(self, one: object | None, owner: type) -> FoundOnce[R] | R:
        if one is None:
            return self
        return one.__dict__.setdefault(self._name, self._find(one))  # type: ignore[no-any-return]


class ModuleLock:
    """A lock of a module, which lives as long as Python. A forked process has it free: the thread that held
    it is not there, and would be waited for without an end."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class OneProcess:
    """Base of objects that are used only in the process that made them, and never copied."""

    _made_in: int  # process id

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        made = super().__new__(cls)
        made._made_in = os.getpid()
        return made

    @property
    def is_inherited(self) -> bool:
        """Whether this is the copy in a process that was forked from the one that made the object."""
        return self._made_in != os.getpid()

    def check_process(self) -> None:
        """Raise MllamaError in a forked process."""
        if self.is_inherited:
            raise MllamaError(
                f"this {type(self).__name__} was opened in process {self._made_in}, from which this process "
                f"({os.getpid()}) was forked; open it in the child, after the fork"
            )

    def __copy__(self) -> NoReturn:
        self._refuse_copy()

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse_copy()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self._refuse_copy()

    def _refuse_copy(self) -> NoReturn:
        raise CopyError(
            f"{_article(type(self).__name__)} cannot be copied or pickled: it holds memory, threads and "
            "devices of this process; open another one from the same files"
        )


# ---- the end of Python -------------------------------------------------------------------------------------

_handles: weakref.WeakSet[Handle] = weakref.WeakSet()
_ending = False


def is_ending() -> bool:
    """Whether Python ends. What C computes for a daemon thread is to stop then: the memory will be gone."""
    return _ending


def _end() -> None:
    """Let daemon threads leave C before anything is freed."""
    global _ending
    _ending = True
    mine = [handle for handle in _handles if not handle.is_inherited]
    until = time.monotonic() + END_SECONDS
    while any(handle.is_used for handle in mine) and time.monotonic() < until:
        time.sleep(0.005)


def _freeze_at_end() -> None:
    """Python waits for all threads but daemons before it ends, and then stops these wherever they are. A
    daemon that is stopped here is not in C, and shows no error to anybody. Raises MllamaError if that does
    not happen: the program waits for this thread."""
    if _ending and threading.current_thread() is not threading.main_thread():
        time.sleep(2 * END_SECONDS)
        raise MllamaError("Python ends")


# What is registered last runs first: before the functions of weakref, which free what is left.
weakref.finalize(_end, bool)
atexit.register(_end)


class Handle(OneProcess):
    """A C object: used in a with block, freed once and by its last user, never in a forked process.

        with handle as pointer:
            lib.function(pointer)

    Threads may use and close it at the same time: those that are inside keep it alive, those that come after
    `close` get an error.
    """

    def __init__(
        self, what: str, pointer: Any, free: Callable[[Any], object], needs: Handle | None = None
    ) -> None:
        """what: for the error, as in "this model"; needs: another C object, which is freed after this one."""
        self._what = what
        self._pointer = pointer
        self._lock = threading.RLock()  # the garbage collector may free another one meanwhile
        self._users = _Users()
        self._closed = False
        self._inside = 0  # threads
        if needs is not None:
            needs.check_process()
            needs._hold()
        # Runs at exit too, before Python takes the callbacks away.
        self._free = finalize(self, _free, free, pointer, needs, self._users)
        _handles.add(self)

    def __enter__(self) -> Any:
        self.check_process()
        _freeze_at_end()
        with self._lock:
            self._hold()
            self._inside += 1
        return self._pointer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
        self._let_go()
        _freeze_at_end()

    def _hold(self) -> None:
        """One user more: a thread, or another C object. Raises MllamaError if it is closed."""
        with self._lock:
            if self._closed:
                raise MllamaError(f"{self._what} is closed")
            self._users.number += 1

    def _let_go(self) -> None:
        with self._lock:
            self._users.number -= 1
            is_last = self._closed and self._users.number == 0
        if is_last:
            self._free()

    def check_process(self) -> None:
        if self.is_inherited:
            raise MllamaError(
                f"{self._what} was opened in process {self._made_in}, from which this process "
                f"({os.getpid()}) was forked; open it in the child, after the fork"
            )

    @property
    def is_used(self) -> bool:
        """Whether a thread uses it now."""
        return self._inside > 0

    @property
    def closed(self) -> bool:
        """Whether nobody may use it any more."""
        return self._closed

    def close(self) -> None:
        """Free it, now or as soon as its last user is done. Twice is fine."""
        if self.is_inherited:
            return
        with self._lock:
            is_first, self._closed = not self._closed, True
            is_unused = self._users.number == 0
        if is_first and is_unused:
            self._free()


def finalize(owner: object, release: Callable[..., object], *args: Any) -> weakref.finalize[..., Any]:
    """As `weakref.finalize`, but a forked process releases nothing: it belongs to its parent."""
    return weakref.finalize(owner, _release, os.getpid(), release, args)


def _release(process: int, release: Callable[..., object], args: tuple[Any, ...]) -> None:
    if os.getpid() == process:
        release(*args)


@dataclass(eq=False)
class _Users:
    """How many use a C object now."""

    number: int = 0


def _free(free: Callable[[Any], object], pointer: Any, needs: Handle | None, users: _Users) -> None:
    if users.number:  # Python ends, and a daemon thread is still in there
        return
    free(pointer)
    if needs is not None:
        needs._let_go()


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
