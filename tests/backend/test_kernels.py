"""The CPU kernel is chosen by a trial in another process.

The stand-ins are what a trial may meet on another processor: tables that are slower than expected, wrong, or
the end of their process.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyFiles

from mllama_gguf import Mllama, RequestError
from mllama_gguf.backend import kernels, trials
from mllama_gguf.backend.kernels import VARIABLE, Trial, winner
from mllama_gguf.backend.library import load

Files = Callable[[str], TinyFiles]
LogText = pytest.LogCaptureFixture

# The process of a trial, as `kernel_trial` talks. Each table takes so many seconds, or does what its word
# says.
PROGRAM = """
import json, os, signal, sys, time
def say(*values):
    os.write(1, json.dumps(values).encode() + b"\\n")
tables = json.loads(sys.argv[1])
for number in range(3):
    for index, it in enumerate(tables):
        if it == "wrong" and number:
            continue
        say(number, index)
        if it == "wrong":
            say(number, index, None, None, "a result is off by 0.9 of the usual size")
        elif it in ("dies", "faults") or (it == "dies late" and number == 2):
            os.kill(os.getpid(), signal.SIGILL if it != "faults" else signal.SIGSEGV)
        elif it == "exits":
            os._exit(3)
        elif it == "hangs":
            time.sleep(600)
        elif it == "lies":
            say(number, 99, 1.0, 0.0, "")
        elif it == "stops":
            say(number, index, 1.0, 0.0, "")
            os._exit(0)
        elif it == "nan":
            say(number, index, float("nan"), 0.0, "")
        else:
            it = 1.0 if it == "dies late" else it
            say(number, index, it * (1.5 if number == 0 else 1.0), 1e-6, "")
"""


class StandIn:
    """Tables a, b and c are offered for two parts, and the trial is done by `PROGRAM`.

    acts: what each does, by "part=table"; 1.0 if it is not named
    """

    offered: Mapping[str, Sequence[str]] = {
        "attention": ["a"], "linear": ["a", "b"], "bf16": ["c", "f32", "ggml"], "cache": ["a"],
        "quantized": ["b", "c", "ggml"],
    }  # fmt: skip

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record = folder / "cache" / "kernels.json"
        self.acts: dict[str, float | str] = {}
        self.runs: list[int] = []  # how many tables each process tried
        self.before: Callable[[], None] = lambda: None
        self.real_command = kernels.command
        monkeypatch.setattr(kernels, "_found", {})
        monkeypatch.setattr(kernels, "record_path", lambda: self.record)
        monkeypatch.setattr(kernels, "candidates", lambda native: self.offered)
        monkeypatch.setattr(kernels, "command", self.command)
        monkeypatch.delenv(VARIABLE, raising=False)
        self._patch = monkeypatch

    def command(self, library: Path, tasks: Sequence[tuple[int, str]]) -> list[str]:
        parts = list(self.offered)
        tables = []
        for index, kernel in tasks:
            named = dict(word.split("=") for word in kernel.split(","))
            tables.append(self.acts.get(f"{parts[index]}={named[parts[index]]}", 1.0))
        self.runs.append(len(tables))
        self.before()
        return [sys.executable, "-I", "-S", "-c", PROGRAM, json.dumps(tables)]

    def forget(self) -> None:
        """As in another process."""
        self._patch.setattr(kernels, "_found", {})

    def choice(self) -> dict[str, str]:
        """What is chosen, by part, in a new process; empty: nothing is known."""
        self.forget()
        return {part: winner(part, of_part) for part, of_part in kernels._measured(load()).items()}


FIRST = {"attention": "a", "linear": "a", "bf16": "c", "cache": "a", "quantized": "b"}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


# ---- what is chosen ----------------------------------------------------------------------------------------


def test_the_fastest_is_used_and_remembered(stand_in: StandIn) -> None:
    stand_in.acts = {"linear=b": 0.5, "bf16=f32": 0.9, "bf16=ggml": 0.8, "quantized=c": 2.0}
    for _ in range(3):
        assert stand_in.choice() == {**FIRST, "linear": "b", "bf16": "ggml"}
    assert stand_in.runs == [10]
    stand_in.acts = {}
    assert stand_in.choice()["linear"] == "b"


def test_noise_keeps_the_order(stand_in: StandIn) -> None:
    stand_in.acts = {"linear=b": 0.96, "bf16=f32": 0.97, "bf16=ggml": 0.94, "quantized=c": 1.0}
    assert stand_in.choice() == {**FIRST, "bf16": "f32"}  # within 5 % of the fastest, and before it


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("wrong", "off by 0.9"),
        ("dies", "SIGILL"),
        ("faults", "SIGSEGV"),
        ("dies late", "SIGILL"),
        ("exits", "exit code 3"),
        ("hangs", "no result after"),
    ],
)
def test_a_table_that_does_not_work_is_left_out(
    act: str, words: str, stand_in: StandIn, caplog: LogText, monkeypatch: pytest.MonkeyPatch
) -> None:
    if act == "hangs":
        monkeypatch.setattr(kernels, "TRIAL_SECONDS", 3.0)
    stand_in.acts = {"linear=a": act, "linear=b": 3.0, "bf16=ggml": 0.5}
    for _ in range(2):
        assert stand_in.choice() == {**FIRST, "linear": "b", "bf16": "ggml"}
    assert stand_in.runs == ([10] if act == "wrong" else [10, 9])
    (message,) = caplog.messages
    assert "table a is not used for the part linear" in message and words in message
    assert str(stand_in.record) in message


def test_several_do_not_work(stand_in: StandIn) -> None:
    stand_in.acts = {"linear=a": "dies", "linear=b": "faults", "bf16=c": "exits", "quantized=b": "wrong"}
    assert stand_in.choice() == {**FIRST, "linear": "ggml", "bf16": "f32", "quantized": "c"}
    assert stand_in.runs == [10, 9, 8, 7]
    stand_in.record.unlink()
    stand_in.acts = {f"{part}={name}": "dies" for part, names in stand_in.offered.items() for name in names}
    portable = dict.fromkeys(("attention", "cache"), "portable")
    assert stand_in.choice() == {**portable, "linear": "ggml", "bf16": "f32", "quantized": "ggml"}


@pytest.mark.parametrize("act", ["lies", "stops", "nan"])
def test_a_trial_that_says_nonsense_is_none(act: str, stand_in: StandIn, caplog: LogText) -> None:
    stand_in.acts = {"linear=b": act}
    assert stand_in.choice() == {}
    assert "the usual one is used" in caplog.messages[0] and not stand_in.record.exists()
    assert kernels.cpu_kernel() == load().cpu_kernel()
    assert len(stand_in.runs) == 1  # once in a process


def test_a_process_that_cannot_be_started(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    python = [sys.executable, "-c"]
    for program in (["/nonexistent/python"], [""], [*python, "pass"], [*python, "1/0"]):
        monkeypatch.setattr(kernels, "command", lambda library, tasks, program=program: program)
        assert stand_in.choice() == {} and not stand_in.record.exists()


def test_nothing_to_choose(stand_in: StandIn) -> None:
    stand_in.offered = {
        "attention": ["a"], "linear": ["ggml"], "bf16": ["f32", "ggml"], "cache": ["a"],
        "quantized": ["b", "ggml"],
    }  # fmt: skip
    assert stand_in.choice() == {} and stand_in.runs == [] and not stand_in.record.exists()
    stand_in.offered = {}
    assert stand_in.choice() == {}


# ---- the record --------------------------------------------------------------------------------------------

GOOD = {
    part: {name: {"seconds": 1.0, "error": 0.0, "words": ""} for name in names}
    for part, names in StandIn.offered.items()
}
SLOW_A = {**GOOD, "linear": {**GOOD["linear"], "a": {"seconds": 2.0, "error": 0.0, "words": ""}}}


def write_record(stand_in: StandIn, value: Any) -> None:
    stand_in.record.parent.mkdir(exist_ok=True)
    of_this = {trials.build_and_processor(): {"kernel": value}}
    stand_in.record.write_text(json.dumps({"version": kernels.VERSION, "trials": of_this}))


def test_a_record_is_used(stand_in: StandIn) -> None:
    write_record(stand_in, SLOW_A)
    assert stand_in.choice() == {**FIRST, "linear": "b"} and stand_in.runs == []
    broken = {"seconds": math.inf, "error": math.inf, "words": "SIGILL"}
    write_record(stand_in, {**GOOD, "linear": {**GOOD["linear"], "a": {"words": "SIGILL"}}})
    assert stand_in.choice()["linear"] == "b" and stand_in.runs == []
    assert kernels._measured(load())["linear"]["a"] == Trial(**broken)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {**GOOD, "more": {}},
        {part: GOOD[part] for part in list(GOOD)[1:]},
        {**GOOD, "linear": []},
        {**GOOD, "linear": {"a": GOOD["linear"]["a"]}},
        {**GOOD, "linear": {**GOOD["linear"], "z": GOOD["linear"]["a"]}},
        *(
            {**GOOD, "linear": {**GOOD["linear"], "a": trial}}
            for trial in (
                None,
                {},
                {"words": ""},
                {"seconds": 1.0, "error": 0.0, "words": None},
                {"seconds": True, "error": 0.0, "words": ""},
                {"seconds": "1", "error": 0.0, "words": ""},
                {"seconds": -1.0, "error": 0.0, "words": ""},
                {"seconds": math.nan, "error": 0.0, "words": ""},
                {"seconds": math.inf, "error": 0.0, "words": ""},
                {"seconds": 1.0, "words": ""},
                {"seconds": 1.0, "error": 0.0, "words": "", "more": 1},
                {"seconds": [], "words": "SIGILL"},
            )
        ),
    ],
)
def test_a_wrong_record_costs_a_trial(stand_in: StandIn, value: Any) -> None:
    write_record(stand_in, value)
    for _ in range(2):
        assert stand_in.choice() == FIRST
    assert stand_in.runs == [10]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff", b"[]", b"{}", b'{"version": 1, "trials": []}', b'{"version": 99, "trials": {}}'],
)
def test_a_damaged_record_costs_a_trial(stand_in: StandIn, content: bytes) -> None:
    stand_in.record.parent.mkdir()
    stand_in.record.write_bytes(content)
    for _ in range(2):
        assert stand_in.choice() == FIRST
    assert stand_in.runs == [10]


def test_another_processor_is_tried_again(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.choice()
    monkeypatch.setattr(trials, "processor", lambda: "another one")
    stand_in.acts = {"linear=b": 0.5}
    assert stand_in.choice()["linear"] == "b"
    monkeypatch.setattr(trials, "processor", lambda: "a third one")
    stand_in.offered = {**stand_in.offered, "linear": ["b", "a"]}  # and another list of tables
    assert stand_in.choice()["linear"] == "b"
    assert len(stand_in.runs) == 3
    assert len(json.loads(stand_in.record.read_text())["trials"]) == 3


def test_a_record_that_cannot_be_written(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path / "file" / "kernels.json", Path("/proc/kernels.json")):
        stand_in.record = place
        assert stand_in.choice() == FIRST
        assert kernels._measured(load()) and kernels._measured(load())  # kept in the process
    assert stand_in.runs == [10, 10]


def test_another_process_was_faster(stand_in: StandIn) -> None:
    """Its choice stays, so that both compute the same bits."""
    stand_in.before = lambda: write_record(stand_in, SLOW_A)
    assert stand_in.choice() == {**FIRST, "linear": "b"}
    stand_in.record.unlink()
    stand_in.before = lambda: write_record(stand_in, {**GOOD, "linear": "damaged"})
    assert stand_in.choice() == FIRST
    assert stand_in.choice() == FIRST and len(stand_in.runs) == 2


def test_many_at_the_same_time(stand_in: StandIn) -> None:
    chosen = []

    def choose() -> None:
        found = kernels._recorded(load(), stand_in.offered)
        chosen.append({part: winner(part, of_part) for part, of_part in found.items()})

    threads = [threading.Thread(target=choose) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [FIRST] * 4
    assert stand_in.choice() == FIRST and len(stand_in.runs) == 4


# ---- models ------------------------------------------------------------------------------------------------


@pytest.fixture
def real(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The tables of this processor, the portable one with the others."""
    found: dict[str, list[str]] = {}
    native = load()
    for index, part in enumerate([part for part in kernels._parts(native) if part != "f16"]):
        names = (native.text(native.lib.mllama_cpu_table(index, i)) for i in range(20))
        found[part] = [name for name in names if name and (name, part) != ("ggml", "linear")]
    for part in ("attention", "cache"):
        found[part].remove("ggml")
    found["linear"] = found["linear"] or ["ggml"]
    monkeypatch.setattr(StandIn, "offered", found)
    return stand_in


def test_a_model_is_opened_with_what_was_chosen(
    real: StandIn, tiny_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_files("square").one
    real.acts = {"cache=portable": 0.5, "bf16=ggml": 0.5}
    expected = load().cpu_kernel(",".join(f"{p}={t}" for p, t in real.choice().items()))
    assert "portable" in expected
    keys = set()
    for wanted, name in (
        ("", expected),
        ("portable", "portable"),
        ("off", "off"),
        ("portable,cache=ggml", "portable,cache=ggml"),
        ("cache=ggml", load().cpu_kernel(f"{expected},cache=ggml")),
    ):
        monkeypatch.setenv(VARIABLE, wanted)
        with Mllama(path, n_ctx=64) as model:
            assert model._backend.cpu_kernel == name
            with model._conversation.context.handle as pointer:
                assert load().text(load().lib.mllama_kernel_name(pointer)) == name
            keys.add(model._shared.keys.prefix_kv([1, 2, 3], 1))
    assert len(keys) == 5
    assert len(real.runs) == 1
    real.forget()
    monkeypatch.setenv(VARIABLE, "portable")
    with Mllama(path, n_ctx=64):
        pass
    monkeypatch.setenv(VARIABLE, "")
    with Mllama(path, n_ctx=64, flash_attn=False):
        pass
    assert kernels._found == {}  # a trial is asked for only where its result is used
    for wrong, words in (("cache=abacus", "here the part cache can be"), ("x=ggml", "the parts are ")):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(RequestError, match=f"{VARIABLE} has '{wrong}': {words}"):
            Mllama(path, n_ctx=64)


def test_the_trial_of_this_processor(real: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: LogText) -> None:
    """Everything that runs here computes rightly."""
    monkeypatch.setattr(kernels, "command", real.real_command)
    caplog.set_level(logging.INFO)
    found = kernels._measured(load())
    assert {part: list(of_part) for part, of_part in found.items()} == real.offered
    exact = ("attention", "linear", "cache")
    for part, of_part in found.items():
        for name, trial in of_part.items():
            assert trial.works, (part, name, trial)
            assert 0 < trial.seconds < 5 and trial.error < (1e-3 if part in exact else 0.1)
    about = kernels.describe()
    assert about.name == kernels.cpu_kernel() and set(about.parts) == set(found)
    for part in about.parts.values():
        assert max(part.rates.values()) == 1.0 and part.rates[part.table] >= 1 / kernels.NOISE
    assert json.loads(json.dumps(about.facts()))["name"] == about.name


def test_what_cannot_be_tried() -> None:
    native = load()
    result = native.ffi.new("mllama_cpu_trial *")
    for kernel, part, threads, seconds in (
        ("portable", -1, 1, 0.0),
        ("portable", 6, 1, 0.0),  # F16
        ("portable", 7, 1, 0.0),
        ("portable", 0, 0, 0.0),
        ("portable", 0, 513, 0.0),
        ("portable", 0, 1, -1.0),
        ("portable", 0, 1, math.nan),
        ("abacus", 0, 1, 0.0),
        ("off", 4, 1, 0.0),
        ("portable,attention=ggml", 0, 1, 0.0),
        ("portable,cache=ggml", 3, 1, 0.0),
    ):
        with pytest.raises(RequestError):
            native.check(native.lib.mllama_cpu_try(kernel.encode(), part, threads, seconds, True, result))
    for index in (-1, 7, 99):
        assert native.text(native.lib.mllama_cpu_part(index)) == ""
        assert native.text(native.lib.mllama_cpu_table(index, 0)) == ""
    assert native.text(native.lib.mllama_cpu_table(0, -1)) == ""


def test_the_lines_for_people() -> None:
    broken = Trial(math.inf, math.inf, "SIGILL")
    part = kernels.Part("b", {"a": Trial(2.0, 0.0), "b": Trial(1.0, 0.0), "c": broken})
    assert part.in_words() == "b (a 0.50, c fails)"
    assert kernels.Part("a").in_words() == "a"
    kernel = kernels.Kernel("x,linear=b", {"linear": part, "cache": kernels.Part("a")})
    assert kernel.in_words() == "x,linear=b: linear b (a 0.50, c fails), cache a"
    assert kernel.facts()["parts"]["linear"] == {
        "table": "b", "rates": {"a": 0.5, "b": 1.0}, "failed": {"c": "SIGILL"},
    }  # fmt: skip
    assert kernels.Kernel("off", {}).in_words() == "off"
