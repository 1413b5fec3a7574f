"""Which of ggml's layouts of weights for faster products on the CPU can be used here.

ggml offers each layout that the processor has instructions for. That is not enough: ggml's AMX products end
the process with SIGILL where the compiler has left out their set-up, as GCC 12 does. So a layout is used only
if it is in `TRUSTED`, or if a trial in a process of its own has multiplied with it and got what the plain
layout gets.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import RequestError
from ..words import one_line
from .library import Native, load
from .trials import Record, cache_file, run
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
    return tuple(name for name in names if name in TRUSTED or _trial(name).works)


def offered_layouts() -> tuple[str, ...]:
    """The names of all layouts that ggml offers on this processor. Raises BackendError."""
    native = load()
    names: list[str] = []
    while name := native.text(native.lib.mllama_repack_layout(len(names))):
        names.append(name)
    return tuple(names)


# ---- the record of trials ----------------------------------------------------------------------------------


def record_path() -> Path:
    """Where the results of trials are kept."""
    return cache_file("layouts.json")


def _trial(layout: str) -> Trial:
    """The trial of a layout: the one that is kept, or else a new one."""
    record = Record(record_path(), VERSION)
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = record.get(layout)
        if _is_trial(kept):
            return Trial(**kept)
    trial = run_trial(layout)
    if not trial.works:
        logger.warning(
            "repack: ggml's layout %s is not used, because its trial failed: %s; remove %s to try again",
            layout, trial.words, record.path,
        )  # fmt: skip
    return Trial(**record.keep(layout, asdict(trial), _is_trial))


def _is_trial(kept: Any) -> bool:
    return (
        isinstance(kept, dict)
        and kept.keys() == {"works", "words"}
        and type(kept["works"]) is bool
        and isinstance(kept["words"], str)
    )


# ---- the trial ---------------------------------------------------------------------------------------------


def command(layout: str) -> list[str]:
    """How to start the process that tries a layout."""
    code = "from mllama_gguf.backend.repack import main; main"
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}({layout!r})"]


def run_trial(layout: str) -> Trial:
    """Try a layout in a process of its own. If it dies, says nothing or multiplies wrongly, it has failed."""
    done = run(command(layout), TRIAL_SECONDS)
    if done.code is None:
        return Trial(False, done.words)
    try:
        trial = Trial(**json.loads(done.output))
        if done.code == 0 and type(trial.works) is bool and isinstance(trial.words, str):
            return trial
    except (ValueError, TypeError):
        pass
    return Trial(False, f"{done.words} and no result")


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
