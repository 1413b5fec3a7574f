"""The native library: found, loaded once, its status codes turned into exceptions, its words into `logging`.

ggml lives in llama-cpp-python (`llama_cpp/lib`). Importing llama_cpp first loads that copy, and libmllama,
which names the same libraries, binds to it: one ggml in the process, one list of devices.

MLLAMA_LIBRARY, an environment variable for developers, names another libmllama to load (a debug or sanitizer
build).

Logging: libmllama, llama.cpp and ggml all speak through the logger "mllama_gguf.native". That replaces the
process-wide log callback that llama_cpp sets when it is imported.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ..errors import (
    Aborted,
    BackendError,
    ContextFullError,
    MllamaError,
    ModelError,
    OutOfMemoryError,
    RequestError,
)
from ..handles import ModuleLock
from ..words import one_line, show_name

logger = logging.getLogger("mllama_gguf.native")
warnings = logging.getLogger("mllama_gguf.native.warnings")  # of libmllama itself, for everybody
# Silent unless the program sets logging up.
logging.getLogger("mllama_gguf").addHandler(logging.NullHandler())

_PACKAGE = Path(__file__).parents[1]
_LIBRARY = "libmllama.dylib" if sys.platform == "darwin" else "libmllama.so"
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir . (in the source folder)"

OK = 0
_ERRORS: dict[int, type[MllamaError]] = {
    -1: RequestError,
    -2: ModelError,
    -3: OutOfMemoryError,
    -4: BackendError,
    -5: ContextFullError,
    -6: Aborted,
}

_OWN_WARNING = 6
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # ggml_log_level


@dataclass(frozen=True)
class Native:
    """The loaded library and what must live as long as it."""

    ffi: Any
    lib: Any
    path: Path
    keep: tuple[Any, ...]  # callbacks that C holds pointers to

    def error(self, status: int) -> MllamaError:
        """The exception for a status, with the library's words. To be called on the thread of the
        failure."""
        words = self.last_error() or f"libmllama: error {status}"
        return _ERRORS.get(status, BackendError)(words)

    def last_error(self) -> str:
        """The library's words for the last failure of this thread."""
        return self.text(self.lib.mllama_last_error())

    def check(self, status: int) -> None:
        """Raise the exception for a status other than MLLAMA_OK."""
        if status != OK:
            raise self.error(status)

    def cpu_kernel(self, name: str = "") -> str:
        """The shortest name of this kernel for the CPU. "": the one that $MLLAMA_CPU_KERNEL and the processor
        give now, without a trial. The result is "" where there is none of that name."""
        return self.text(self.lib.mllama_cpu_kernel_named(os.fsencode(name) if name else self.ffi.NULL))

    def text(self, pointer: Any) -> str:
        """A C string, or "" for NULL."""
        return "" if pointer == self.ffi.NULL else self.ffi.string(pointer).decode("utf-8", "replace")


_loaded: Native | None = None
_loading = ModuleLock()


def load() -> Native:
    """Load llama.cpp's libraries and libmllama. Later calls return the same object.

    Raises BackendError saying what to install when a library is missing or does not fit.
    """
    global _loaded
    with _loading:
        if _loaded is None:
            _loaded = _load()
        return _loaded


def _load() -> Native:
    from cffi import FFI

    try:
        from llama_cpp import llama_cpp as llama
    except ImportError as e:
        raise BackendError(f"llama-cpp-python is missing ({e}); run: pip install llama-cpp-python") from e
    except (OSError, RuntimeError) as e:
        raise BackendError(
            f"llama-cpp-python does not load ({one_line(e)}); "
            "run: pip install --force-reinstall --no-cache-dir llama-cpp-python"
        ) from e

    ffi = FFI()
    ffi.cdef(declarations(_header().read_text("utf-8")))
    path = _library()
    try:
        lib = ffi.dlopen(str(path))
        built, found = (
            ffi.string(version()).decode()
            for version in (lib.mllama_ggml_version_built, lib.mllama_ggml_version_loaded)
        )
    except (OSError, AttributeError) as e:
        chosen = os.environ.get("MLLAMA_LIBRARY")
        way_out = "MLLAMA_LIBRARY names it; unset that" if chosen else f"run: {_REINSTALL}"
        raise BackendError(f"{path.name} does not load ({one_line(e)}); {way_out}") from e
    if built != found:
        raise BackendError(
            f"libmllama was built for ggml {built}, but the installed llama-cpp-python brings ggml {found}; "
            f"run: {_REINSTALL}"
        )

    _end_pool_before_fork(path)
    log = _Log()
    llama_callback = llama.llama_log_callback(lambda level, text, _: log(level, text))
    llama.llama_log_set(llama_callback, None)
    callback = ffi.callback("mllama_log_callback", lambda level, text, _: log(level, ffi.string(text)))
    lib.mllama_log_set(callback, ffi.NULL)  # after llama.cpp's, which sets ggml's callback too
    return Native(ffi, lib, path, (llama_callback, callback))


def _end_pool_before_fork(library: Path) -> None:
    """Let a forked process compute with objects of its own. OpenMP, by which ggml may start its threads,
    keeps them for the next computation of the same thread. In the forked process it would wait for them for
    ever: they stay in the parent."""
    try:
        end_pool = ctypes.CDLL(str(library)).omp_pause_resource_all  # found in what libmllama is linked with
    except (OSError, AttributeError):
        return
    soft = 1  # omp_pause_soft: settings stay
    os.register_at_fork(before=lambda: end_pool(soft))


def declarations(header: str) -> str:
    """The plain C of mllama.h: without preprocessor lines and without what only a C++ compiler sees."""
    kept = []
    in_cplusplus = False
    for line in header.splitlines():
        word = line.split(maxsplit=2)
        if line.startswith("#"):
            if word[:2] == ["#ifdef", "__cplusplus"]:
                in_cplusplus = True
            elif word[0] == "#endif":
                in_cplusplus = False
        elif not in_cplusplus:
            kept.append(line)
    return "\n".join(kept)


def _header() -> Path:
    return _installed("mllama.h", _PACKAGE.parent / "native" / "include" / "mllama.h")


def _library() -> Path:
    chosen = os.environ.get("MLLAMA_LIBRARY")
    if not chosen:
        return _installed(_LIBRARY)
    if not os.path.isfile(chosen):
        raise BackendError(f"MLLAMA_LIBRARY: {show_name(chosen)}: no such file")
    return Path(chosen)


def _installed(name: str, *others: Path) -> Path:
    """A file that the build puts into the package; in a source tree that of the installed package, if any."""
    for path in (_PACKAGE / "lib" / name, *others):
        if path.is_file():
            return path
    try:
        path = Path(str(distribution("mllama_gguf").locate_file(f"mllama_gguf/lib/{name}")))
    except PackageNotFoundError:
        raise BackendError(f"{name} is not built yet; in the source tree run: pip install .") from None
    if not path.is_file():
        raise BackendError(f"{name} is missing from the installed package; run: {_REINSTALL}")
    return path


class _Log(threading.local):
    """Whole lines to the logger; C sends pieces of lines. Each thread has its own line."""

    def __init__(self) -> None:
        self._line = ""
        self._level = logging.INFO

    def __call__(self, level: int, text: bytes | None) -> None:
        if not text or sys.is_finalizing():
            return
        if level == _OWN_WARNING:  # always a whole line
            warnings.warning("%s", text.decode("utf-8", "replace").rstrip())
            return
        if level in _LOG_LEVELS:  # else a piece that continues the line
            self._level = _LOG_LEVELS[level]
        self._line += text.decode("utf-8", "replace")
        while "\n" in self._line:
            line, self._line = self._line.split("\n", 1)
            if line.strip():
                logger.log(self._level, "%s", line.rstrip())
