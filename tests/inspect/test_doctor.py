"""`mllama doctor`: what it finds, and what it does not tell."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import elsewhere

from mllama_gguf import BackendError, Device
from mllama_gguf.cli.main import run
from mllama_gguf.inspect import doctor, selftest

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    for name in ("MLLAMA_MODEL", "MLLAMA_IMAGE_CACHE", "MLLAMA_DOWNLOADS", "OLLAMA_MODELS", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def findings(capsys: Captured) -> tuple[int, dict[str, dict[str, object]]]:
    code = run(["doctor", "--json"])
    lines = capsys.readouterr().out.splitlines()
    return code, {finding["name"]: finding for finding in map(json.loads, lines)}


def test_a_sound_installation(capsys: Captured) -> None:
    code, found = findings(capsys)
    assert code == 0, found
    assert {"versions", "library", "processor", "memory", "image cache", "downloads", "caption"} <= set(found)
    assert found["model demo"]["mark"] == "ok"
    cpu = found["device CPU"]
    assert cpu["mark"] == "ok"
    assert 0 < cpu["facts"]["states_error"] < selftest.TOLERANCE  # type: ignore[index]


def test_the_lines_are_for_people(capsys: Captured) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("device CPU: " in line for line in lines) == 1
    assert all(line[:2] in ("\u2713 ", "! ", "  ") for line in lines)


def test_a_terminal_without_unicode() -> None:
    there = elsewhere(PYTHONIOENCODING="ascii")
    done = subprocess.run([sys.executable, "-m", "mllama_gguf", "doctor"], **there, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"+ device CPU: " in done.stdout


def test_nothing_private_is_told(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "wilhelmine")
    monkeypatch.setenv("MLLAMA_DOWNLOADS", str(place / "models"))
    monkeypatch.setenv("OLLAMA_MODELS", "/media/wilhelmine/disk")
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert str(place) not in shown and "wilhelmine" not in shown
    assert "MLLAMA_DOWNLOADS=~/models" in shown and "OLLAMA_MODELS=/media/USER/disk" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("{home}", "~"),
        ("{home}/a and {home}/b", "~/a and ~/b"),
        ("{home}x/a", "{home}x/a"),
        ("/mnt/anna/annabel/anna.txt", "/mnt/USER/annabel/USER.txt"),
    ],
)
def test_private(words: str, expected: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "anna")
    assert doctor.private(words.format(home=place)) == expected.format(home=place)


def test_a_device_that_computes_nonsense_or_dies(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    there = [
        Device("CPU", "a processor", "cpu", 1, 2),
        Device("GPU0", "a card", "gpu", 1, 2),
        Device("GPU1", "a card", "gpu", 1, 2),
        Device("GPU2", "a card", "gpu", 1, 2, "no driver"),
    ]

    def compare(device: str, *, is_cpu: bool) -> tuple[float, float]:
        assert is_cpu == (device == "CPU")
        if device == "GPU1":
            raise BackendError("the process ended with signal SIGILL")
        return (1e-6, 0.5) if device == "GPU0" else (1e-6, 1e-4)

    monkeypatch.setattr("mllama_gguf.backend.local.devices", lambda start=False: there)
    monkeypatch.setattr(selftest, "compare", compare)
    code, found = findings(capsys)
    assert code == 1
    assert [found[f"device {device.name}"]["mark"] for device in there] == ["ok", *["problem"] * 3]
    assert "5.0e-01" in str(found["device GPU0"]["words"])
    assert "SIGILL" in str(found["device GPU1"]["words"]) and "no driver" in str(
        found["device GPU2"]["words"]
    )


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def broken() -> None:
        raise BackendError("llama-cpp-python is missing")

    monkeypatch.setattr("mllama_gguf.backend.library.load", broken)
    code, found = findings(capsys)
    assert code == 1
    assert found["library"]["mark"] == "problem" and "pip install" in str(found["library"]["advice"])


def test_a_wrong_answer_is_seen() -> None:
    expected = np.array([1.0, 2.0], np.float32)
    assert selftest.relative_error(expected, expected) == 0
    assert selftest.relative_error(np.array([np.nan, 2.0], np.float32), expected) == float("inf")
    assert selftest.verdict((0.0, 1e-4))[0] and not selftest.verdict((0.0, float("inf")))[0]


def test_the_known_answer_is_that_of_double_precision() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_selftest.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
