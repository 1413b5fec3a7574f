"""`mllama doctor`: what it finds, and what it does not tell."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import elsewhere

from mllama_gguf import BackendError, Device
from mllama_gguf.cli.main import run
from mllama_gguf.inspect import doctor, selftest
from mllama_gguf.inspect.private import private

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
    assert "; built with " in str(found["library"]["words"])
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
        ("/old/anna-backup/x_anna Anna's .anna", "/old/USER-backup/x_USER USER's .USER"),
        ("annas-laptop.example.org, annas-laptop: NVIDIA H100", "HOST, HOST: NVIDIA H100"),
        ("https://me:secret@example.org/x", "https://...@example.org/x"),
    ],
)
def test_private(words: str, expected: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "anna")
    monkeypatch.setattr(socket, "gethostname", lambda: "annas-laptop.example.org")
    assert private(words.format(home=place)) == expected.format(home=place)


def test_names_that_are_words_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user called ollama, one of two letters, and a machine called like a device."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h100")
    for name, expected in (
        ("ollama", "ollama:x of /ok/ollama, NVIDIA H100"),
        ("ok", "ollama:x of /USER/ollama, NVIDIA H100"),
    ):
        monkeypatch.setattr(getpass, "getuser", lambda name=name: name)
        assert private("ollama:x of /ok/ollama, NVIDIA H100") == expected


def test_keys_are_not_told(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    for name in ("MLLAMA_API_KEY", "GGML_AUTH_TOKEN", "MLLAMA_SOME_PASSWORD"):
        monkeypatch.setenv(name, "tuppence")
    for args in (["doctor"], ["doctor", "--json"]):
        run(args)
        shown = capsys.readouterr().out
        assert "tuppence" not in shown and "MLLAMA_API_KEY" in shown


def test_what_fails_is_in_the_report_and_tells_no_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An unexpected error, a broken lock file and the log show no path of the home; the rest is looked at."""
    monkeypatch.setattr(getpass, "getuser", lambda: "wilhelmine")
    monkeypatch.setenv("MLLAMA_LOCK", str(place / "broken.lock"))
    (place / "broken.lock").write_text("]")

    def broken() -> None:
        raise PermissionError(13, "Permission denied", str(place / "wilhelmine" / "x"))

    monkeypatch.setattr("psutil.virtual_memory", broken)
    for args in (["doctor", "--json"], ["doctor", "--json", "--verbose"]):
        assert run(args) == 1
        told = capfd.readouterr()
        found = {one["name"]: one for one in map(json.loads, told.out.splitlines())}
        assert "PermissionError" in found["memory"]["words"] and "~/USER/x" in found["memory"]["words"]
        assert found["models.lock"]["mark"] == "problem" and "device CPU" in found
        for text in (told.out, told.err):
            assert str(place) not in text and "wilhelmine" not in text


def test_a_user_without_a_name_and_a_home(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """As in a container that was started with a number."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    code, found = findings(capsys)
    assert code == 0, found
    assert private("/home/anna") == "/home/anna"


def test_folders_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is a file, and one write-protected (os.access says so: root may write everywhere)."""
    (place / "file").touch()
    (place / "closed").mkdir()
    monkeypatch.setattr(doctor, "REAL_DISK", 0)
    monkeypatch.setenv("MLLAMA_IMAGE_CACHE", str(place / "file"))
    monkeypatch.setenv("MLLAMA_DOWNLOADS", str(place / "closed" / "models"))
    monkeypatch.setattr("os.access", lambda path, mode: "closed" not in str(path))
    _, downloads = doctor._disk()
    assert downloads.mark == "note" and downloads.words.endswith("closed cannot be written")
    assert downloads.advice.startswith("set MLLAMA_DOWNLOADS to a folder")
    found = doctor._writable(doctor.Finding("x", "ok", "y"), place / "file" / "z", "V")
    assert found.mark == "note" and found.words.endswith("file is not a folder")
    monkeypatch.setenv("MLLAMA_IMAGE_CACHE_SIZE", "abc")
    cache, _ = doctor._disk()
    assert cache.mark == "problem" and "is not a size" in cache.words and not cache.advice


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


def test_variables_that_name_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Captured, place: Path) -> None:
    for name in ("nope", str(place / "nope.gguf"), __file__):
        monkeypatch.setenv("MLLAMA_MODEL", name)
        monkeypatch.setenv("OLLAMA_MODELS", str(place / "nothing"))
        code, found = findings(capsys)
        assert (code, found["MLLAMA_MODEL"]["mark"], found["OLLAMA_MODELS"]["mark"]) == (1, "problem", "note")


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
