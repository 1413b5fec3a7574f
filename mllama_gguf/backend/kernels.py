"""Which CPU kernel of libmllama is used: chosen by measuring.

A kernel is put together of parts, and a part can be computed with one of several tables: instruction sets of
the processor, or ggml's operation. Which is the fastest depends on the processor and not on the age of its
instructions: an Intel Xeon computes BF16 weights faster with F32 factors than with its AVX512-BF16. So where
the library has more than one table of its own for a part, a trial in another process runs all of them, and
the fastest that computes rightly is used. A table that dies or hangs is not.

The trial takes less than a second; its result is kept (see `trials`). $MLLAMA_CPU_KERNEL takes the choice
away, or changes some parts of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from ..handles import ModuleLock
from ..settings import VisionPrecision
from . import kernel_trial
from .library import Native, load
from .trials import Record, cache_file, run

logger = logging.getLogger(__name__)

VARIABLE = "MLLAMA_CPU_KERNEL"
VERSION = 1  # of the trial and of its record; another number makes all trials again
TRIAL_SECONDS = 10.0  # of a process, at most; usually less than one
NOISE = 1.05  # what is not faster by this is not faster: then the order of the list counts
# What is not measured against the tables of a part: ggml would round the factors of F16 files, the portable
# table has the smallest vectors, and ggml's attention has other operations around it.
_NOT_MEASURED = dict.fromkeys(("attention", "linear", "cache"), ("portable", "ggml"))
# Where no table of a part works
_LAST_RESORT = {"attention": "portable", "linear": "ggml", "bf16": "f32", "cache": "portable"}

# By part, the tables that can be chosen, the best first, as far as known without a trial
Candidates: TypeAlias = "Mapping[str, Sequence[str]]"


@dataclass(frozen=True)
class Trial:
    """What became of a trial of one table.

    seconds: that a fixed piece of work took; infinite if it does not work
    error:   the largest of a value, beside the usual size of the results
    words:   why it does not work, or ""
    """

    seconds: float
    error: float
    words: str = ""

    @property
    def works(self) -> bool:
        """Whether it may be used."""
        return not self.words


# By part, the trials of all its candidates by name
Trials: TypeAlias = "Mapping[str, Mapping[str, Trial]]"


@dataclass(frozen=True)
class Part:
    """What computes a part of a kernel. trials: of all candidates; empty: there was none."""

    table: str
    trials: Mapping[str, Trial] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        """How fast each table that works is beside the fastest."""
        best = min((trial.seconds for trial in self.trials.values()), default=math.inf)
        return {name: best / trial.seconds for name, trial in self.trials.items() if trial.works}

    @property
    def failed(self) -> dict[str, str]:
        """Why the other tables do not work."""
        return {name: trial.words for name, trial in self.trials.items() if not trial.works}

    def in_words(self) -> str:
        """As in "amx (avx512bf16 0.31, f32 0.52)": the one in use, and how fast the others are beside the
        fastest."""
        others = [f"{name} {rate:.2f}" for name, rate in self.rates.items() if name != self.table]
        others += [f"{name} fails" for name in self.failed]
        return f"{self.table} ({', '.join(others)})" if others else self.table


@dataclass(frozen=True)
class Kernel:
    """The kernel of contexts that are opened now. name "": $MLLAMA_CPU_KERNEL names none. parts: by name;
    empty without a kernel."""

    name: str
    parts: Mapping[str, Part]

    def in_words(self) -> str:
        """One line: the name, and the parts with the figures of their trials."""
        parts = ", ".join(f"{name} {part.in_words()}" for name, part in self.parts.items())
        return f"{self.name or 'none'}: {parts}" if parts else self.name or "none"

    def facts(self) -> dict[str, Any]:
        """The same for programs, values of JSON."""
        parts = {
            name: {"table": part.table, "rates": part.rates, "failed": part.failed}
            for name, part in self.parts.items()
        }
        return {"name": self.name or None, "parts": parts}


def cpu_kernel() -> str:
    """The name of the kernel for contexts that are opened now; "": $MLLAMA_CPU_KERNEL names none, which
    opening a context says. The first time on a machine that takes a trial, unless the variable names a
    kernel or there is nothing to choose. Raises BackendError."""
    native = load()
    wanted = os.environ.get(VARIABLE, "")
    if _is_whole(wanted):
        return native.cpu_kernel()
    trials = _measured(native)
    if not trials:
        return native.cpu_kernel()
    spec = ",".join(f"{part}={winner(part, of_part)}" for part, of_part in trials.items())
    return native.cpu_kernel(f"{spec},{wanted}" if wanted else spec)


def kernel_for(flash_attn: bool, vision_precision: VisionPrecision) -> str:
    """As `cpu_kernel`, for these settings. Without flash attention no kernel is used, and none is tried."""
    if not flash_attn:
        return load().cpu_kernel()
    name = cpu_kernel()
    if vision_precision == "exact" or name in ("", "off"):
        return name
    return load().cpu_kernel(f"{name},f16=bf16")


def describe() -> Kernel:
    """The kernel for contexts that are opened now, and the figures of its trial. Raises BackendError."""
    native, name = load(), cpu_kernel()
    if not name or name == "off":
        return Kernel(name, {})
    trials = _measured(native) if not _is_whole(os.environ.get(VARIABLE, "")) else {}
    uses = native.lib.mllama_cpu_kernel_uses
    return Kernel(
        name,
        {
            part: Part(native.text(uses(name.encode(), index)), trials.get(part, {}))
            for index, part in enumerate(_parts(native))
            if part != "f16"
        },
    )


def winner(part: str, trials: Mapping[str, Trial]) -> str:
    """The fastest table that works; of those that are about as fast, the first of the list."""
    works = {name: trial.seconds for name, trial in trials.items() if trial.works}
    best = min(works.values(), default=math.inf)
    return next((name for name, s in works.items() if s <= best * NOISE), _LAST_RESORT.get(part, "ggml"))


def _is_whole(wanted: str) -> bool:
    """Whether a value of the variable names a kernel, and not only some parts of one."""
    return bool(wanted) and "=" not in wanted.split(",", 1)[0]


def _parts(native: Native) -> Iterator[str]:
    for index in count():
        part = native.text(native.lib.mllama_cpu_part(index))
        if not part:
            return
        yield part


def candidates(native: Native) -> dict[str, list[str]]:
    """By part, the tables that can be chosen here."""
    found: dict[str, list[str]] = {}
    for index, part in enumerate(_parts(native)):
        if part == "f16":  # not a question of speed
            continue
        names: list[str] = []
        while name := native.text(native.lib.mllama_cpu_table(index, len(names))):
            names.append(name)
        ours = [name for name in names if name not in _NOT_MEASURED.get(part, ())]
        found[part] = ours or names[:1]
    return found


def has_choice(offered: Candidates) -> bool:
    """Whether a trial can find something: a part has several tables of this library."""
    return any(len([name for name in names if name != "ggml"]) > 1 for names in offered.values())


# ---- the record --------------------------------------------------------------------------------------------


def record_path() -> Path:
    """Where the results of the trial are kept."""
    return cache_file("kernels.json")


_found: dict[str, Trials] = {}  # of this process, by the candidates
_finding = ModuleLock()  # of a trial: two at the same time would disturb each other


def _measured(native: Native) -> Trials:
    """The trials of all candidates; empty where there is no choice, or no trial could be made."""
    offered = candidates(native)
    if not has_choice(offered):
        return {}
    name = json.dumps(offered)
    with _finding:
        if name not in _found:
            _found[name] = _recorded(native, offered)
        return _found[name]


def _recorded(native: Native, offered: Candidates) -> Trials:
    """The trials that are kept, or else new ones."""
    record = Record(record_path(), VERSION)
    try:
        kept = record.get("kernel")
        if _is_good(kept, offered):
            return _from_json(kept)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    start = time.monotonic()
    trials = try_all(native, offered)
    if not trials:
        return {}
    for part, of_part in trials.items():
        for table, trial in of_part.items():
            if not trial.works:
                logger.warning(
                    "kernel: the table %s is not used for the part %s, because its trial failed: %s; "
                    "remove %s to try again", table, part, trial.words, record.path,
                )  # fmt: skip
    logger.info("kernel: the trial took %.2f s", time.monotonic() - start)
    value = {part: {table: _to_json(t) for table, t in of_part.items()} for part, of_part in trials.items()}
    return _from_json(record.keep("kernel", value, lambda other: _is_good(other, offered)))


def _to_json(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in asdict(trial).items() if value != math.inf}


def _from_json(kept: Any) -> Trials:
    no_numbers = {"seconds": math.inf, "error": math.inf}
    return {
        part: {name: Trial(**{**no_numbers, **trial}) for name, trial in of_part.items()}
        for part, of_part in kept.items()
    }


def _is_good(kept: Any, offered: Candidates) -> bool:
    """Whether a record has a trial of every candidate, and nothing else."""
    if not isinstance(kept, dict) or list(kept) != list(offered):
        return False
    for part, one in kept.items():
        if not isinstance(one, dict) or list(one) != list(offered[part]):
            return False
        for trial in one.values():
            if not isinstance(trial, dict) or not trial.keys() <= {"seconds", "error", "words"}:
                return False
            words, numbers = trial.get("words"), [trial.get(name) for name in ("seconds", "error")]
            if not isinstance(words, str):
                return False
            if not words and not all(type(n) is float and 0 <= n < math.inf for n in numbers):
                return False
            if words and any(n is not None and type(n) is not float for n in numbers):
                return False
    return True


# ---- the trial ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One table of a part. index: of the part; kernel: one with this table."""

    index: int
    part: str
    table: str
    kernel: str


def command(library: Path, tasks: Sequence[tuple[int, str]]) -> list[str]:
    """How to start the process that tries tables; see `kernel_trial`."""
    return [sys.executable, "-I", "-S", kernel_trial.__file__, str(library), json.dumps(tasks)]


def _environment() -> dict[str, str]:
    """Of that process: ggml is found where llama-cpp-python has it, and starts no GPU."""
    import llama_cpp

    folder = str(Path(llama_cpp.__file__).parent / "lib")
    paths = dict.fromkeys(("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"), folder)
    none = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"), "")
    return {**os.environ, **paths, **none}


def try_all(native: Native, offered: Candidates) -> Trials:
    """Try all candidates in one process; if one ends it, all others in another process. Empty: that could not
    be done."""
    plain = {part: offered[part][0] for part in ("attention", "linear", "cache")}
    tasks = [
        _Task(index, part, table, ",".join(f"{p}={t}" for p, t in {**plain, part: table}.items()))
        for index, (part, names) in enumerate(offered.items())
        for table in names
    ]
    failed: dict[_Task, Trial] = {}
    while left := [task for task in tasks if task not in failed]:
        sent = [(task.index, task.kernel) for task in left]
        done = run(command(native.path, sent), TRIAL_SECONDS, _environment())
        try:
            found, running = _read(done.output, len(left))
        except (ValueError, TypeError, IndexError):
            logger.warning("kernel: the trial of CPU kernels failed: %s; the usual one is used", done.words)
            return {}
        if running is None:
            failed |= dict(zip(left, found, strict=True))
            break
        failed[left[running]] = Trial(math.inf, math.inf, done.words)
    result: dict[str, dict[str, Trial]] = {part: {} for part in offered}
    for task in tasks:
        result[task.part][task.table] = failed[task]
    return result


def _read(output: bytes, n: int) -> tuple[list[Trial], int | None]:
    """What the process of a trial has said of n tables: their trials, or the index of the table that it was
    computing with when it ended. Raises ValueError, TypeError, IndexError for anything else."""
    seconds, errors, words = [math.inf] * n, [0.0] * n, [""] * n
    rounds, running = [0] * n, None
    lines = output.split(b"\n")
    for line in lines[:-1]:  # what comes after the last end of a line is half a line
        number, index, *result = json.loads(line)
        if type(index) is not int or not 0 <= index < n or number != rounds[index]:
            raise ValueError("a line of something else")
        if not result:
            running = index
            continue
        took, error, why = result
        running = None
        rounds[index] += 1
        if why:
            words[index] = str(why)
            continue
        if not 0 < took < math.inf or not 0 <= error < math.inf:
            raise ValueError("no time or no error")
        seconds[index], errors[index] = min(seconds[index], took), max(errors[index], error)
    if running is None and any(r < kernel_trial.ROUNDS and not w for r, w in zip(rounds, words, strict=True)):
        raise ValueError("it ended early")
    return [
        Trial(math.inf, math.inf, w) if w else Trial(s, e)
        for s, e, w in zip(seconds, errors, words, strict=True)
    ], running
