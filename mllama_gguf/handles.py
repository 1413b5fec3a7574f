"""Objects that belong to one process, and the C objects that they hold.

Such an object cannot be copied: both copies would free the same memory. After `os.fork()` the child process
has a copy all the same. There it can neither compute, for the threads stay in the parent, nor be freed, for
devices and child processes are the parent's. So it says that it must be opened in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, NoReturn, SupportsIndex, TypeVar, overload

from .errors import CopyError, MllamaError

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
        self._users = 0
        self._closed = False
        if needs is not None:
            needs.__enter__()
        # Runs at exit too, before Python takes the callbacks away.
        self._free = finalize(self, _free, free, pointer, needs)

    def __enter__(self) -> Any:
        self.check_process()
        with self._lock:
            if self._closed:
                raise MllamaError(f"{self._what} is closed")
            self._users += 1
        return self._pointer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            is_last = self._closed and self._users == 0
        if is_last:
            self._free()

    def check_process(self) -> None:
        if self.is_inherited:
            raise MllamaError(
                f"{self._what} was opened in process {self._made_in}, from which this process "
                f"({os.getpid()}) was forked; open it in the child, after the fork"
            )

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
            is_unused = self._users == 0
        if is_first and is_unused:
            self._free()


def finalize(owner: object, release: Callable[..., object], *args: Any) -> weakref.finalize[..., Any]:
    """As `weakref.finalize`, but a forked process releases nothing: it belongs to its parent."""
    return weakref.finalize(owner, _release, os.getpid(), release, args)


def _release(process: int, release: Callable[..., object], args: tuple[Any, ...]) -> None:
    if os.getpid() == process:
        release(*args)


def _free(free: Callable[[Any], object], pointer: Any, needs: Handle | None) -> None:
    free(pointer)
    if needs is not None:
        needs.__exit__(None, None, None)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
