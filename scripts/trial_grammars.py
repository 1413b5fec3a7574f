#!/usr/bin/env python3
"""Hostile schemas and grammars against child processes of 2 GiB: none may die, hang or ignore Ctrl-C.

    python scripts/trial_grammars.py [--cases N] [--seed TEXT] [--tokens N] [--reply N] [--only CASE ...]

Each case (tests/text/hostile.py) is a request for a form. Within 5 seconds it must either work, which is a
mask for the first token and some tokens drawn under it, or be refused with one line of bounded length. Then
Ctrl-C is sent into the middle of the slowest cases, and must work within a second. A child serves many
cases; one that dies or is late is a failure, and is replaced.

The vocabulary is the bundled model's, or with --tokens N one of N tokens (tests/vocabulary.py); 128256
are Llama 3.2's. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "text"))

MEMORY = 2 << 30  # bytes of address space
SECONDS = 5.0
HEARD_SECONDS = 1.0
START_SECONDS = 60.0
LONGEST_LINE = 700
INTERRUPTED = 20  # of the slowest cases
LEAST_SECONDS = 0.2  # in the middle of less than this nothing can be sent


@dataclass
class Result:
    """What became of a case.

    outcome: "works", "refused", "stopped" (refused after the first token), "interrupted", or a failure:
             "died", "late", "wrong", "deaf"
    """

    case: str
    outcome: str
    seconds: float = 0.0
    words: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome in ("died", "late", "wrong", "deaf")


# ---- the child ---------------------------------------------------------------------------------------------


def serve(vocabulary: str, n_tokens: int) -> None:
    """Do the cases that are named on stdin, and write a line of JSON for each to stdout."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import hostile

    from mllama_gguf.text.grammar import regex
    from mllama_gguf.text.vocab import Vocab

    vocab = Vocab(vocabulary)
    vocab.constraints.begin(vocab, regex("a"))
    answer(case="", outcome="ready")
    while case := sys.stdin.readline().strip():
        try:
            form = _FAULTS.get(case) or hostile.request(case)
            answer(case=case, outcome="begin")
            if callable(form):
                form()
            start = time.perf_counter()
            outcome, words = attempt(vocab, form, random.Random(case), n_tokens)
            # What is left of the request is none of the case's time.
            seconds = time.perf_counter() - start
            del form
            answer(case=case, outcome=outcome, seconds=seconds, words=words)
        except KeyboardInterrupt:
            answer(case=case, outcome="interrupted")


# Cases that fail, to try the trial itself.
_FAULTS: dict[str, Any] = {
    "!die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "!sleep": lambda: time.sleep(1000),
    "!wrong": "no form",
}


def attempt(vocab: Any, form: Any, rng: random.Random, n_tokens: int) -> tuple[str, str]:
    """The outcome of a case, and the words of what was raised."""
    from mllama_gguf.errors import RequestError
    from mllama_gguf.text.grammar import grammar_of

    n = 0
    try:
        grammar = grammar_of(None if form == "no form" else form, None)
        assert grammar is not None
        matcher = vocab.constraints.begin(vocab, grammar)
        for n in range(n_tokens):  # noqa: B007
            allowed = matcher.mask().ids()
            token = int(allowed[rng.randrange(len(allowed))])
            matcher.accept(token)
            if token in vocab.stop_ids or matcher.finished:
                break
        return "works", ""
    except RequestError as e:
        words = str(e)
        if "\n" in words or len(words) > LONGEST_LINE or not words.isprintable():
            return "wrong", f"no line of at most {LONGEST_LINE} characters: {words[:1000]!r}"
        return "stopped" if n else "refused", words
    except Exception as e:
        return "wrong", f"{type(e).__name__}: {e}"[:1000]


def answer(**values: Any) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")  # whole, whenever Ctrl-C comes


# ---- the parent --------------------------------------------------------------------------------------------


class Child:
    """A process that does cases. A dead one is replaced by the next case."""

    def __init__(self, vocabulary: Path, n_tokens: int, seconds: float) -> None:
        """n_tokens: most of a reply; seconds: most for a case"""
        self._vocabulary, self._n_tokens, self._seconds = vocabulary, n_tokens, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, case: str, interrupt_after: float | None = None) -> Result:
        """Do a case. interrupt_after: seconds until Ctrl-C is sent."""
        process = self._started()
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write(f"{case}\n".encode())
            process.stdin.flush()
        said, _ = self._hear(START_SECONDS)  # the case is made
        if said == "late":
            return Result(case, "late", words="before it began")
        if said != "died":
            if interrupt_after is not None:
                said, values = self._hear(interrupt_after)
                if said == "late":
                    process.send_signal(signal.SIGINT)
                    sent = time.monotonic()
                    said, values = self._hear(HEARD_SECONDS)
                    if said == "late":
                        self.close()
                        return Result(case, "deaf", words=f"nothing within {HEARD_SECONDS:g} s")
                    if said == "interrupted":
                        return Result(case, "interrupted", time.monotonic() - sent)
            else:
                said, values = self._hear(self._seconds)
            if said == "late":
                self.close()
                return Result(case, "late", self._seconds)
            if said != "died":
                return Result(**values)
        from mllama_gguf.words import signal_name  # not in the children, which have little memory

        code = process.wait()
        self._process = None
        name = signal_name(-code) if code < 0 else f"exit code {code}"
        return Result(case, "died", words=f"{name}; {self._errors()}")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115
            command = [sys.executable, __file__, "--serve", str(self._vocabulary)]
            command += ["--reply", str(self._n_tokens)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
            self._rest = b""
            said, _ = self._hear(START_SECONDS)
            if said != "ready":
                raise SystemExit(f"a child did not start: {self._errors()}")
        return self._process

    def _hear(self, seconds: float) -> tuple[str, dict[str, Any]]:
        """The next line of the child: its outcome, and all of it; or "late" or "died"."""
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return "late", {}
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                return "died", {}
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        values = json.loads(line)
        return values["outcome"], values

    def _errors(self) -> str:
        self._log.seek(0)
        return self._log.read()[-600:].decode(errors="replace").strip()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def run_all(make: Callable[[], Child], cases: list[str], processes: int) -> list[Result]:
    """All cases, in several children side by side."""

    def share(first: int) -> list[Result]:
        child = make()
        try:
            return [show(child.run(case)) for case in cases[first::processes]]
        finally:
            child.close()

    with ThreadPoolExecutor(processes) as pool:
        return [result for results in pool.map(share, range(processes)) for result in results]


def interrupt(make: Callable[[], Child], results: list[Result], number: int) -> list[Result]:
    """Ctrl-C in the middle of the slowest cases."""
    slowest = sorted(results, key=lambda result: result.seconds, reverse=True)[:number]
    child = make()
    try:
        return [
            show(child.run(result.case, result.seconds * share))
            for i, result in enumerate(slowest)
            if result.seconds >= LEAST_SECONDS
            for share in [(0.2, 0.5, 0.8)[i % 3]]
        ]
    finally:
        child.close()


def show(result: Result) -> Result:
    if result.failed:
        print(f"{result.outcome}: case {result.case}, {result.seconds:.1f} s: {result.words}", flush=True)
    return result


def json_path(words: str) -> Path:
    """The value of --json, for argparse: a new file, or one of such results, which is replaced."""
    from mllama_gguf.errors import MllamaError  # not in the children, which have little memory
    from mllama_gguf.files import Kind, check_output

    def is_results(file: BinaryIO) -> bool:
        line = json.loads(file.readline(1 << 20))
        return isinstance(line, dict) and {"case", "outcome", "seconds"} <= set(line)

    try:
        return check_output(words, Kind("file of results", is_results), overwrite=True)
    except MllamaError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--tokens", type=int, help="[default: those of the bundled model]")
    parser.add_argument("--reply", type=int, default=30, help="most tokens of a reply  [default: 30]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for a case  [default: {SECONDS:g}]")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", metavar="CASE", help="as they are named in the output")
    parser.add_argument("--json", type=json_path, help="write every result there")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.reply)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tokens:
            from vocabulary import write_vocabulary

            file = Path(folder) / "vocabulary.gguf"
            write_vocabulary(file, arguments.tokens)
        else:
            import mllama_gguf

            file = Path(mllama_gguf.__file__).parent / "data" / "demo.gguf"

        def make() -> Child:
            return Child(file, arguments.reply, arguments.seconds)

        cases = arguments.only or [f"{arguments.seed}-{i}" for i in range(arguments.cases)]
        start = time.monotonic()
        results = run_all(make, cases, min(arguments.processes, len(cases)))
        taken = time.monotonic() - start
        interrupted = interrupt(make, results, INTERRUPTED)
    counts = Counter(result.outcome for result in results)
    slowest = max(results, key=lambda result: result.seconds)
    print(f"{len(results)} cases in {taken:.0f} s: {', '.join(f'{n} {name}' for name, n in counts.items())}")
    print(f"slowest: {slowest.seconds:.2f} s, case {slowest.case} ({slowest.outcome})")
    heard = [result.seconds for result in interrupted if result.outcome == "interrupted"]
    if heard:
        print(f"Ctrl-C in {len(heard)} cases: heard within {max(heard):.2f} s")
    if arguments.json:
        lines = [json.dumps(vars(result)) for result in (*results, *interrupted)]
        arguments.json.write_text("\n".join(lines) + "\n")
    sys.exit(any(result.failed for result in (*results, *interrupted)))


if __name__ == "__main__":
    main()
