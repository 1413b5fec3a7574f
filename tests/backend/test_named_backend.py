"""A backend that is a library of its own, named by GGML_BACKEND_PATH: its devices are there like the others,
and a wrong name costs one warning."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TinyFiles, elsewhere
from standin import standin_library

Files = Callable[[str], TinyFiles]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin_library(tmp_path_factory.mktemp("standin"))


def mllama(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mllama_gguf", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **elsewhere(**env))


def test_its_devices_are_listed(library: Path) -> None:
    done = mllama("devices", GGML_BACKEND_PATH=str(library))
    assert done.returncode == 0, done.stderr
    assert "Standin0" in done.stdout and "Standin1" in done.stdout and "CPU" in done.stdout
    assert not done.stderr


def test_layers_run_there(library: Path, tiny_files: Files) -> None:
    model = str(tiny_files("gqa").one)
    done = mllama("plan", model, "-ngl", "1", GGML_BACKEND_PATH=str(library))
    assert done.returncode == 0, done.stderr
    assert "Standin0" in done.stdout


def test_a_backend_without_devices_is_one_warning(library: Path) -> None:
    env = {"GGML_BACKEND_PATH": str(library), "STANDIN_DEVICES": "0"}
    idle = "ggml's Standin backend finds no device here, so nothing runs on it; is its driver installed?"
    idle = f"Warning: {idle}"
    done = mllama("devices", "--json", **env)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and done.stderr == f"{idle}\n"
    image = str(Path(__file__).parents[2] / "examples" / "apple.png")
    done = mllama("caption", image, "-m", "demo", "-ngl", "2", **env)
    none = "Warning: n_gpu_layers is 2, but ggml has no usable GPU device here: everything runs on the CPU"
    assert done.returncode == 0 and done.stdout and done.stderr.splitlines() == [idle, none]


@pytest.mark.parametrize("name", ["missing.so", "text.so", "other.so"])
def test_a_wrong_name_is_one_warning(name: str, tmp_path: Path) -> None:
    import _ctypes

    path = tmp_path / name
    if name == "text.so":
        path.write_text("no library")
    elif name == "other.so":  # a library, but no backend
        path.symlink_to(_ctypes.__file__)
    code = (
        "import logging, sys; logging.basicConfig(level='WARNING', format='%(message)s')\n"
        "from mllama_gguf.backend.local import devices\n"
        "devices(); print(*(d.name for d in devices()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        **elsewhere(GGML_BACKEND_PATH=str(path)),
    )
    assert done.returncode == 0 and "CPU" in done.stdout
    ours = [line for line in done.stderr.splitlines() if line.startswith("GGML_BACKEND_PATH")]
    assert len(ours) == 1 and str(path) in ours[0] and not ours[0].rstrip().endswith(":")
    shown = mllama("devices", GGML_BACKEND_PATH=str(path)).stderr
    assert shown == f"Warning: {ours[0]}\n"


def test_an_empty_name_is_none() -> None:
    assert os.environ.get("GGML_BACKEND_PATH", "") == ""
    done = mllama("devices", GGML_BACKEND_PATH="")
    assert done.returncode == 0 and not done.stderr
