"""The benchmarks' contestants: another program that dies is a result, and is tried again in another way."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crashing import Rival, add

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from contestant import Contestant, Died, first_that_lives, how_it_ended


def test_functions_run_in_another_process() -> None:
    with Contestant(Rival, "") as rival:
        (one, there), (two, still) = rival.run(add, 1, 2), rival.run(add, 3, 4)
        assert (one, two) == (3, 7) and there == still != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(there, 0)


@pytest.mark.parametrize(
    ("dies", "words"), [("later", "ended with SIGSEGV"), ("by exit", "ended with exit code 3")]
)
def test_a_death_is_an_error_that_says_how(dies: str, words: str) -> None:
    with Contestant(Rival, dies) as rival:
        for _ in range(2):
            with pytest.raises(Died, match=words):
                rival.run(add, 1, 2)


def test_a_death_at_the_beginning() -> None:
    with pytest.raises(Died, match="ended with SIGILL"):
        Contestant(Rival, "at once")
    assert not multiprocessing.active_children()


def test_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such model"):
        Contestant(Rival, "in words")
    with Contestant(Rival, "") as rival:
        with pytest.raises(RuntimeError, match="TypeError"):
            rival.run(add, 1, "2")
        assert rival.run(add, 1, 2)[0] == 3
    assert not multiprocessing.active_children()


def sum_with(dies: str) -> int:
    with Contestant(Rival, dies) as rival:
        return rival.run(add, 1, 2)[0]


@pytest.mark.parametrize(
    ("settings", "result", "deaths"),
    [
        ([""], 3, []),
        (["later", ""], 3, [("later", "ended with SIGSEGV")]),
        (["at once", "", "later"], 3, [("at once", "ended with SIGILL")]),
        (["later", "at once"], None, [("later", "ended with SIGSEGV"), ("at once", "ended with SIGILL")]),
    ],
)
def test_the_first_that_lives(settings: list[str], result: int | None, deaths: list[Any]) -> None:
    assert first_that_lives(settings, sum_with) == (result, deaths)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "hangs"),
        (0, "ended with exit code 0"),
        (-9, "ended with SIGKILL"),
        (-250, "ended with signal 250"),
    ],
)
def test_ends_in_words(code: int | None, words: str) -> None:
    assert how_it_ended(code) == words


@pytest.mark.parametrize(
    "script", ["bench_decode", "bench_encode", "bench_quantize", "bench_e2e", "bench_batch"]
)
def test_the_benchmarks_can_be_imported(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    module = import_module(script)
    main: Callable[[], None] = module.main
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
