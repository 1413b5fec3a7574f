"""Layouts that ggml offers for the CPU are used only if a trial in another process has shown that they work.

The stand-ins are what a trial may meet on another processor: a process that dies, hangs or says nothing, and
products that are wrong.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import TinyFiles

from mllama_gguf import Mllama, RequestError
from mllama_gguf.backend import repack, trials
from mllama_gguf.backend.library import load
from mllama_gguf.backend.repack import TYPES, Product, Trial
from mllama_gguf.backend.types import Floats
from mllama_gguf.convert.quantize import quantize

Files = Callable[[str], TinyFiles]
LogText = pytest.LogCaptureFixture

# What the process of a trial does; {calls} is a file in which it leaves a line.
WORKS = 'print(\'{"works": true, "words": "12 products of q4_0"}\')'
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
FAULTS = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANGS = "import time; time.sleep(600)"
SILENT = "pass"
EXITS = "raise SystemExit(3)"
WORKS_AND_DIES = f"{WORKS}; import sys; sys.stdout.flush(); {DIES}"
LIES = [
    "print('works')",
    "print('[true]')",
    "print('{}')",
    'print(\'{"works": 1, "words": ""}\')',
    'print(\'{"works": "yes", "words": ""}\')',
    'print(\'{"works": true, "words": null}\')',
    'print(\'{"works": true, "words": "", "more": 1}\')',
    f"{WORKS}; {WORKS}",
    f"{WORKS}; raise SystemExit(1)",
]


class StandIn:
    """Layouts AMX and CPU_REPACK are offered, and the trials are done by this program."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record = folder / "cache" / "layouts.json"
        self.calls = folder / "calls"
        self.code = WORKS
        monkeypatch.setattr(repack, "record_path", lambda: self.record)
        monkeypatch.setattr(repack, "offered_layouts", lambda: ("AMX", "CPU_REPACK"))
        monkeypatch.setattr(repack, "command", self.command)

    def command(self, layout: str) -> list[str]:
        note = f"open({str(self.calls)!r}, 'a').write({layout!r} + '\\n'); "
        return [sys.executable, "-c", note + self.code]

    @property
    def trials(self) -> list[str]:
        """The layouts tried so far."""
        return self.calls.read_text().split() if self.calls.exists() else []


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


# ---- what comes of a trial ---------------------------------------------------------------------------------


def test_a_layout_that_works_is_used_and_remembered(stand_in: StandIn) -> None:
    for _ in range(3):
        assert repack.usable_layouts() == ("AMX", "CPU_REPACK")
    assert stand_in.trials == ["AMX"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (DIES, "its process ended with SIGILL"),
        (FAULTS, "its process ended with SIGSEGV"),
        (WORKS_AND_DIES, "its process ended with SIGILL"),
        (SILENT, "exit code 0 and no result"),
        (EXITS, "exit code 3 and no result"),
        *((code, "and no result") for code in LIES),
        ('print(\'{"works": false, "words": "a q4_0 product is off by 0.9"}\')', "is off by 0.9"),
    ],
)
def test_all_else_means_no(stand_in: StandIn, caplog: LogText, code: str, words: str) -> None:
    stand_in.code = code
    for _ in range(2):
        assert repack.usable_layouts() == ("CPU_REPACK",)
    assert stand_in.trials == ["AMX"]
    (message,) = caplog.messages
    assert words in message and "AMX is not used" in message and str(stand_in.record) in message


def test_a_trial_that_hangs_is_ended(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "TRIAL_SECONDS", 1.0)
    note = stand_in.calls.with_name("pid")
    stand_in.code = f"import os; open({str(note)!r}, 'w').write(str(os.getpid())); {HANGS}"
    start = time.monotonic()
    assert repack.run_trial("AMX") == Trial(False, "no result after 1 s")
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_process_that_cannot_be_started(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "command", lambda layout: ["/nonexistent/python"])
    trial = repack.run_trial("AMX")
    assert not trial.works and "cannot be started: No such file" in trial.words


# ---- the record --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": 1, "trials": []}',
        b'{"version": 99, "trials": {}}',
        b'{"version": 1, "trials": {"KEY": []}}',
        b'{"version": 1, "trials": {"KEY": {"AMX": true}}}',
        b'{"version": 1, "trials": {"KEY": {"AMX": {"works": "yes", "words": ""}}}}',
        b'{"version": 1, "trials": {"another build": {"AMX": {"works": false, "words": ""}}}}',
    ],
)
def test_a_wrong_record_costs_a_trial(stand_in: StandIn, content: bytes) -> None:
    stand_in.record.parent.mkdir()
    stand_in.record.write_bytes(content.replace(b"KEY", trials.build_and_processor().encode()))
    for _ in range(2):
        assert repack.usable_layouts() == ("AMX", "CPU_REPACK")
    assert stand_in.trials == ["AMX"]
    kept = json.loads(stand_in.record.read_text())
    assert kept["version"] == repack.VERSION
    if b"another build" in content:
        assert kept["trials"]["another build"]["AMX"]["works"] is False


def test_another_processor_or_build_is_tried_again(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    repack.usable_layouts()
    monkeypatch.setattr(trials, "processor", lambda: "another one")
    stand_in.code = DIES
    assert repack.usable_layouts() == ("CPU_REPACK",)
    monkeypatch.undo()
    assert len(stand_in.trials) == 2


def test_several_layouts_are_remembered(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "offered_layouts", lambda: ("A", "B", "CPU_REPACK", "C"))
    stand_in.code = (
        f"import sys\nif {{'B'}} & set(open({str(stand_in.calls)!r}).read().split()[-1]): {DIES}\n{WORKS}"
    )
    for _ in range(2):
        assert repack.usable_layouts() == ("A", "CPU_REPACK", "C")
    assert stand_in.trials == ["A", "B", "C"]


def test_a_record_that_cannot_be_written(stand_in: StandIn, tmp_path: Path) -> None:
    for place in (tmp_path / "file" / "layouts.json", Path("/proc/layouts.json")):
        (tmp_path / "file").write_text("no folder")
        stand_in.record = place
        assert repack.usable_layouts() == ("AMX", "CPU_REPACK")
    assert stand_in.trials == ["AMX", "AMX"]


def test_a_record_that_is_a_pipe_or_a_folder(stand_in: StandIn) -> None:
    stand_in.record.parent.mkdir()
    os.mkfifo(stand_in.record)
    assert repack.usable_layouts() == ("AMX", "CPU_REPACK")
    if stat.S_ISREG(stand_in.record.stat().st_mode):
        stand_in.record.unlink()
        stand_in.record.mkdir()
        assert repack.usable_layouts() == ("AMX", "CPU_REPACK")


def test_no_trial_where_all_layouts_are_trusted(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "offered_layouts", lambda: ("CPU_REPACK",))
    assert repack.usable_layouts() == ("CPU_REPACK",)
    monkeypatch.setattr(repack, "offered_layouts", tuple)
    assert repack.usable_layouts() == ()
    assert not stand_in.trials and not stand_in.record.exists()


# ---- the products ------------------------------------------------------------------------------------------


def plain(layout: str | None, kind: int, w: Floats, x: Floats, threads: int) -> Floats | None:
    """Exact products, of two types."""
    return x @ w.T if kind in (TYPES["q4_0"], TYPES["q8_0"]) else None


def test_wrong_products_are_found() -> None:
    def wrong(how: Callable[[Floats, int, int], Floats | float]) -> Product:
        def product(layout: str | None, kind: int, w: Floats, x: Floats, threads: int) -> Floats | None:
            y = plain(layout, kind, w, x, threads)
            return y if layout is None or y is None else np.asarray(y * how(y, len(x), threads), np.float32)

        return product

    assert repack.compare("AMX", plain) == Trial(True, "32 products of q4_0, q8_0")
    chance = np.random.default_rng(1)
    assert repack.compare("A", wrong(lambda y, n, t: 1 + 0.005 * chance.standard_normal(y.shape))).works
    for how in (
        lambda y, n, t: 0.0,
        lambda y, n, t: 1.1,
        lambda y, n, t: np.nan,
        lambda y, n, t: np.inf,
        lambda y, n, t: 0.0 if n == 33 else 1.0,
        lambda y, n, t: 0.0 if t > 1 else 1.0,
        lambda y, n, t: np.arange(y.shape[1]) < y.shape[1] - 8,
    ):
        trial = repack.compare("AMX", wrong(how))
        assert not trial.works and "is off by" in trial.words
    assert "no products" in repack.compare("AMX", lambda *_: None).words


def test_the_layouts_of_this_processor(record_property: Callable[[str, object], None]) -> None:
    """Each that is usable multiplies rightly, here in this process."""
    offered, usable = repack.offered_layouts(), repack.usable_layouts()
    record_property("layouts", f"offered: {offered}; usable: {usable}")
    assert set(usable) <= set(offered)
    for layout in usable:
        assert repack.compare(layout, repack.native_product(load())).works
    for layout in set(offered) & set(repack.TRUSTED):
        assert repack.run_trial(layout).works
    assert not repack.run_trial("NONE").works


def test_products_that_cannot_be() -> None:
    lib, ffi = load().lib, load().ffi
    x = ffi.new("float[]", 4096)
    name = ffi.new("char[]", b"CPU_REPACK")
    for arguments in (
        (name, TYPES["q4_0"], x, x, x, 33, 8, 1, 1),
        (name, TYPES["f32"], x, x, x, 32, 8, 1, 1),
        (name, TYPES["q4_0"], x, x, x, 32, 8, 1, 513),
        (name, TYPES["q4_0"], x, x, x, 32, 8, 0, 1),
        (name, TYPES["q4_0"], x, x, ffi.NULL, 32, 8, 1, 1),
        (name, 9, x, x, x, 32, 8, 1, 1),  # q8_1, of activations
        (name, 16, x, x, x, 256, 8, 1, 1),  # iq2_xxs needs more than the values
        (name, -1, x, x, x, 32, 8, 1, 1),
        (name, 10**6, x, x, x, 32, 8, 1, 1),
        (ffi.new("char[]", b"NONE"), TYPES["q4_0"], x, x, x, 32, 8, 1, 1),
    ):
        with pytest.raises(RequestError):
            load().check(lib.mllama_repack_product(*arguments))
    assert lib.mllama_repack_layout(-1) == lib.mllama_repack_layout(99) == ffi.NULL


# ---- a model -----------------------------------------------------------------------------------------------


def test_a_model_is_repacked_to_usable_layouts_only(
    stand_in: StandIn, tiny_files: Files, tmp_path: Path
) -> None:
    path = tmp_path / "text.gguf"
    quantize(tiny_files("quant").one, path, "q4_0")
    stand_in.code = DIES
    with Mllama(path, n_ctx=64, repack=True) as model:
        assert {tensor.layout for tensor in model._backend.model.tensors()} <= {"", "CPU_REPACK"}
    assert stand_in.trials == ["AMX"]
    with Mllama(path, n_ctx=64) as model:
        assert {tensor.layout for tensor in model._backend.model.tensors()} == {""}
    assert stand_in.trials == ["AMX"]


def test_a_layout_that_does_not_work_is_never_touched(
    stand_in: StandIn, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if CPU_REPACK was not trusted and died: nothing is repacked."""
    path = tmp_path / "text.gguf"
    quantize(tiny_files("quant").one, path, "q4_0")
    monkeypatch.setattr(repack, "TRUSTED", ())
    monkeypatch.setattr(repack, "offered_layouts", lambda: ("CPU_REPACK",))
    stand_in.code = DIES
    with Mllama(path, n_ctx=64, repack=True) as model:
        assert {tensor.layout for tensor in model._backend.model.tensors()} == {""}
    assert stand_in.trials == ["CPU_REPACK"]


def test_the_child_process_dies_without_a_core_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real program, whose products meet an illegal instruction."""
    monkeypatch.chdir(tmp_path)
    real = repack.command("CPU_REPACK")
    killer = "mllama_gguf.backend.repack.compare = lambda *_: os.kill(os.getpid(), signal.SIGILL)"
    real[-1] = f"import os, signal, mllama_gguf.backend.repack; {killer}; {real[-1]}"
    monkeypatch.setattr(repack, "command", lambda layout: real)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert repack.run_trial("CPU_REPACK") == Trial(False, f"its process ended with {signal.SIGILL.name}")
    assert not list(tmp_path.iterdir())
