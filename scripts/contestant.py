"""Programs of others that a benchmark compares with, each in a process of its own: its death is a result.

llama.cpp's faster layouts end the process with SIGILL on some processors, for one; see
mllama_gguf/backend/repack.py.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

from mllama_gguf.words import signal_name

T = TypeVar("T")
Setting = TypeVar("Setting")
END_SECONDS = 10.0


class Died(Exception):
    """The process of a contestant ended; the words say how."""


class Contestant:
    """An object in another process, on which functions are run there, so that they can take the time."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        """make: a function or class of a module, called there with these arguments.

        Raises Died, and RuntimeError with the words of what was raised there.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.made = self._hear()
        except BaseException:
            self.close()
            raise

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """What a function of a module returns when it is called there with the object and these
        arguments. Raises Died, RuntimeError."""
        with suppress(OSError):  # a death is heard of below
            self._connection.send((work, args))
        result: T = self._hear()
        return result

    def _hear(self) -> Any:
        try:
            went_well, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(END_SECONDS)
            raise Died(how_it_ended(self._process.exitcode)) from None
        if not went_well:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TextModel:
    """A text model where an environment variable has a value: MLLAMA_LIBRARY, or MLLAMA_CPU_KERNEL."""

    def __init__(self, variable: str, value: str, path: str, threads: int) -> None:
        os.environ[variable] = value
        from mllama_gguf.backend.callbacks import Callbacks
        from mllama_gguf.backend.library import load
        from mllama_gguf.backend.local import open_model

        callbacks = Callbacks(load())
        model = open_model(path, None, callbacks=callbacks, n_gpu_layers=0)
        self.hparams = model.hparams
        self.context = model.open_context(callbacks, n_ctx=1024, n_threads=threads)


def how_it_ended(code: int | None) -> str:
    """The end of a process in words, by its exit code."""
    if code is None:
        return "hangs"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"ended with {signal_name(-code)}"


def first_that_lives(
    settings: Iterable[Setting], work: Callable[[Setting], T]
) -> tuple[T | None, list[tuple[Setting, str]]]:
    """Work with the first of some settings in which nothing dies. Returns (its result, or None if all died;
    each setting before it with how it ended)."""
    deaths: list[tuple[Setting, str]] = []
    for setting in settings:
        try:
            return work(setting), deaths
        except Died as e:
            deaths.append((setting, str(e)))
    return None, deaths


def _serve(connection: Connection[Any, Any], make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The other process. The object stays here; what is sent of it is the type's name."""
    with suppress(EOFError, OSError, KeyboardInterrupt):
        try:
            thing = make(*args)
            connection.send((True, type(thing).__name__))
        except (Exception, SystemExit) as e:
            traceback.print_exc()
            connection.send((False, f"{type(e).__name__}: {e}"))
            return
        while True:
            work, more = connection.recv()
            try:
                connection.send((True, work(thing, *more)))
            except (Exception, SystemExit) as e:
                traceback.print_exc()
                connection.send((False, f"{type(e).__name__}: {e}"))
