"""Which of ggml's layouts of weights for faster products on the CPU can be used here.

ggml offers each layout that the processor has instructions for. That is not enough: ggml's AMX products end
the process with SIGILL where the compiler has left out their set-up, as GCC 12 does. So a layout is used only
if it is in `TRUSTED`, or if a trial in a process of its own has multiplied with it and got what the plain
layout gets. The result of a trial is kept for this build of ggml and this processor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import RequestError
from ..files import write_whole
from ..reading import read_text
from ..words import one_line, os_reason
from .library import Native, load
from .types import Floats

logger = logging.getLogger(__name__)

TRUSTED = ("CPU_REPACK",)
TRIAL_SECONDS = 60.0
VERSION = 1  # of the trial and of its record; another number makes all trials again
# A layout may round activations in its own way: by a few thousandths. Wrong products are off by all.
TOLERANCE = 0.05  # relative L2
# ggml's numbers of the types that can be tried
TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10,
    "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq3_xxs": 18, "iq3_s": 21, "iq4_nl": 20, "iq4_xs": 23,
    "mxfp4": 39,
}  # fmt: skip
SHAPES = ((512, 64), (1024, 160))  # of matrices: values in and out
COLUMNS = (1, 3, 16, 33)  # single tokens, full tiles of a processor's matrix unit, and the rest of one
THREADS = (1, 3)

# (layout, None: the plain one; type; weights; columns; threads) -> products [columns, values out], or None
# where the layout has none
Product: TypeAlias = "Callable[[str | None, int, Floats, Floats, int], Floats | None]"


@dataclass(frozen=True)
class Trial:
    """What became of a trial. words: why the layout does not work, or what was multiplied."""

    works: bool
    words: str


def usable_layouts() -> tuple[str, ...]:
    """The layouts that a model may be repacked to, in ggml's order. The first time on a machine, each that is
    not trusted takes a trial: seconds. Raises BackendError."""
    names = offered_layouts()
    if set(names) <= set(TRUSTED):
        return names
    record = _Record()
    return tuple(name for name in names if name in TRUSTED or record.trial(name).works)


def offered_layouts() -> tuple[str, ...]:
    """The names of all layouts that ggml offers on this processor. Raises BackendError."""
    native = load()
    names: list[str] = []
    while name := native.text(native.lib.mllama_repack_layout(len(names))):
        names.append(name)
    return tuple(names)


# ---- the record of trials ----------------------------------------------------------------------------------


def record_path() -> Path:
    """Where the results of trials are kept: in the user's cache directory. Without the file, or with a
    damaged one, trials are made again."""
    import platformdirs

    return platformdirs.user_cache_path("mllama_gguf") / "layouts.json"


class _Record:
    """The trials of this build of ggml on this processor."""

    def __init__(self) -> None:
        self._path = record_path()
        self._key = _build_and_processor()

    def trial(self, layout: str) -> Trial:
        """The trial of a layout: the one that is kept, or else a new one."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            trial = Trial(**self._read()[self._key][layout])
            if type(trial.works) is bool:
                return trial
        trial = run_trial(layout)
        if not trial.works:
            logger.warning(
                "repack: ggml's layout %s is not used, because its trial failed: %s; remove %s to try again",
                layout, trial.words, self._path,
            )  # fmt: skip
        self._keep(layout, trial)
        return trial

    def _read(self) -> dict[str, Any]:
        content = json.loads(read_text(self._path))
        if content["version"] != VERSION:
            return {}
        trials = content["trials"]
        if not isinstance(trials, dict):
            raise ValueError("trials are not an object")
        return trials

    def _keep(self, layout: str, trial: Trial) -> None:
        try:
            trials = self._read()
        except (OSError, ValueError, TypeError, KeyError):
            trials = {}
        of_this = trials.get(self._key)
        trials[self._key] = {**(of_this if isinstance(of_this, dict) else {}), layout: asdict(trial)}
        try:
            write_whole(self._path, json.dumps({"version": VERSION, "trials": trials}, indent=1) + "\n")
        except OSError as e:  # a read-only home: the next process tries again
            logger.info("%s: cannot be written: %s", self._path, os_reason(e))


def _build_and_processor() -> str:
    """Another text for every build of ggml and libmllama, and every processor as the system shows it."""
    import llama_cpp

    native = load()
    ggml = native.text(native.lib.mllama_ggml_version_loaded())
    libraries = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml*"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (native.path, *libraries)]
    return hashlib.sha256(repr((ggml, digests, processor())).encode()).hexdigest()


_PROCESSOR_LINES = re.compile(
    r"(vendor_id|cpu family|model|model name|stepping|microcode|flags|features|isa|uarch|"
    r"cpu (implementer|architecture|variant|part|revision))\s*:.*",
    re.IGNORECASE,
)


def processor() -> str:
    """The processor: what distinguishes it from others, as far as the system tells."""
    words = [platform.machine(), platform.processor()]
    with suppress(OSError, ValueError):
        first, *_ = read_text("/proc/cpuinfo").split("\n\n", 1)
        words += [line for line in first.splitlines() if _PROCESSOR_LINES.fullmatch(line)]
    return "\n".join(words)


# ---- the trial ---------------------------------------------------------------------------------------------


def command(layout: str) -> list[str]:
    """How to start the process that tries a layout."""
    code = "from mllama_gguf.backend.repack import main; main"
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}({layout!r})"]


def run_trial(layout: str) -> Trial:
    """Try a layout in a process of its own. Its death, its silence and wrong products all mean no."""
    try:
        done = subprocess.run(
            command(layout),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Trial(False, f"no result after {TRIAL_SECONDS:g} s")
    except OSError as e:
        return Trial(False, f"its process cannot be started: {os_reason(e)}")
    if done.returncode < 0:
        return Trial(False, f"its process ended with {_signal_name(-done.returncode)}")
    try:
        trial = Trial(**json.loads(done.stdout))
        if done.returncode == 0 and type(trial.works) is bool and isinstance(trial.words, str):
            return trial
    except (ValueError, TypeError):
        pass
    return Trial(False, f"its process ended with exit code {done.returncode} and no result")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def compare(layout: str, product: Product) -> Trial:
    """Products in a layout against the same in the plain one: all types, some shapes, columns and threads."""
    chance, tried = np.random.default_rng(1), []
    for kind, number in TYPES.items():
        for n_in, n_out in SHAPES:
            w = chance.standard_normal((n_out, n_in), np.float32)
            for columns in COLUMNS:
                x = chance.standard_normal((columns, n_in), np.float32)
                for threads in THREADS:
                    y = product(layout, number, w, x, threads)
                    if y is None:
                        break
                    tried.append(kind)
                    plain = product(None, number, w, x, threads)
                    if plain is None:
                        return Trial(False, f"there is no plain {kind} product to compare with")
                    error = float(np.linalg.norm(y - plain) / np.linalg.norm(plain))
                    if not error <= TOLERANCE:
                        size = f"{n_in} x {n_out}, {columns} columns, {threads} threads"
                        return Trial(False, f"a {kind} product ({size}) is off by {error:.3g}")
    if not tried:
        return Trial(False, "it has no products of the types and sizes that were tried")
    return Trial(True, f"{len(tried)} products of {', '.join(dict.fromkeys(tried))}")


def native_product(native: Native) -> Product:
    """`mllama_repack_product`."""
    ffi = native.ffi

    def product(layout: str | None, kind: int, w: Floats, x: Floats, threads: int) -> Floats | None:
        y = np.empty((len(x), len(w)), np.float32)
        name = ffi.NULL if layout is None else ffi.new("char[]", layout.encode())
        pointers = [ffi.cast("float *", array.ctypes.data) for array in (w, x, y)]
        status = native.lib.mllama_repack_product(name, kind, *pointers, w.shape[1], len(w), len(x), threads)
        try:
            native.check(status)
        except RequestError:
            return None
        return y

    return product


def main(layout: str) -> None:
    """The process of a trial."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its death is expected: leave no core file
    try:
        trial = compare(layout, native_product(load()))
    except Exception as e:
        trial = Trial(False, one_line(e))
    sys.stdout.write(json.dumps(asdict(trial)))
    sys.stdout.flush()
    os._exit(0)  # what happens at exit is not tried
