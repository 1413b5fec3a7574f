"""Trials: what works on this processor and how fast, found in a process of its own and remembered.

What is tried may end its process or never return. So it runs in a child, and the result is kept in the user's
cache directory for this build of ggml and libmllama and this processor. A record that is missing, damaged or
of something else costs another trial and no more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import replacing
from ..reading import parse_json, read_text
from ..words import os_reason, signal_name
from .library import load

logger = logging.getLogger(__name__)

HASHED_BYTES = 32 << 20  # of a library, at most
WAIT_SECONDS = 5.0  # for another process that writes the same record


def cache_file(name: str) -> Path:
    """A file of the user's cache directory."""
    import platformdirs

    return platformdirs.user_cache_path("mllama_gguf") / name


# ---- records -----------------------------------------------------------------------------------------------


class Record:
    """A file with the results of trials, by build and processor, and by name. They are values of JSON."""

    def __init__(self, path: Path, version: int) -> None:
        """version: of the trials; a record of another version is not read."""
        self.path = path
        self._version = version
        self._key = build_and_processor()

    def get(self, name: str) -> Any:
        """A result for this build and processor, which may be anything. Raises OSError, ValueError,
        TypeError, KeyError where there is none."""
        return self._read()[self._key][name]

    def keep(self, name: str, value: Any, is_good: Callable[[Any], bool]) -> Any:
        """Keep a result, and return it. If another process has kept a good one meanwhile, that one stays and
        is returned. A folder that cannot be written to is not an error."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path, wait=WAIT_SECONDS) as file:
                trials: dict[str, Any] = {}
                with suppress(OSError, ValueError, TypeError, KeyError):
                    trials = self._read()
                of_this = trials.get(self._key)
                of_this = of_this if isinstance(of_this, dict) else {}
                if name in of_this and is_good(of_this[name]):
                    value = of_this[name]
                trials[self._key] = {**of_this, name: value}
                content = {"version": self._version, "trials": trials}
                file.write((json.dumps(content, indent=1) + "\n").encode())
        except OSError as e:  # a read-only home: the next process tries again
            logger.info("%s: cannot be written: %s", self.path, os_reason(e))
        return value

    def _read(self) -> dict[str, Any]:
        content = parse_json(read_text(self.path))
        if content["version"] != self._version:
            return {}
        trials = content["trials"]
        if not isinstance(trials, dict):
            raise ValueError("trials are not an object")
        return trials


def build_and_processor() -> str:
    """Another text for every build of ggml and libmllama, and every processor as the system shows it."""
    import llama_cpp

    native = load()
    ggml = native.text(native.lib.mllama_ggml_version_loaded())
    libraries = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml*"))
    files = [_content(path) for path in (native.path, *libraries)]
    return hashlib.sha256(repr((ggml, files, processor())).encode()).hexdigest()


def _content(path: Path) -> tuple[Any, ...]:
    """Names the content of a library. One for GPUs has hundreds of megabytes: its size and time tell."""
    info = path.stat()
    if info.st_size > HASHED_BYTES:
        return path.name, info.st_size, info.st_mtime_ns
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest()


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


# ---- the process of a trial --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """What became of a process.

    output: what it wrote, as far as it came
    code:   its exit code; None: it was not started, or ended by a signal or by us
    words:  how it ended
    """

    output: bytes
    code: int | None
    words: str


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program that may die or hang; it is ended after so many seconds. environment: None: ours."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired as e:
        return Ended(e.stdout or b"", None, f"no result after {seconds:g} s")
    except (OSError, ValueError) as e:
        reason = os_reason(e) if isinstance(e, OSError) else str(e)
        return Ended(b"", None, f"its process cannot be started: {reason}")
    if done.returncode < 0:
        return Ended(done.stdout, None, f"its process ended with {signal_name(-done.returncode)}")
    return Ended(done.stdout, done.returncode, f"its process ended with exit code {done.returncode}")
