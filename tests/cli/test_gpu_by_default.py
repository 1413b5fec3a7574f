"""Without -ngl a machine's GPUs are used, and a line on stderr says so. The GPUs are stand-ins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import elsewhere
from standin import standin_library

IMAGE = Path(__file__).parents[2] / "examples" / "apple.png"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin_library(tmp_path_factory.mktemp("standin"))


def mllama(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mllama_gguf", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **elsewhere(**env))


@pytest.fixture(scope="module")
def without() -> subprocess.CompletedProcess[str]:
    """The caption on a machine without GPUs."""
    return mllama("caption", str(IMAGE), "-m", "demo")


def test_without_gpus_nothing_is_said(without: subprocess.CompletedProcess[str]) -> None:
    assert without.returncode == 0 and without.stdout and not without.stderr


def test_all_layers_that_fit(library: Path, without: subprocess.CompletedProcess[str]) -> None:
    done = mllama("caption", str(IMAGE), GGML_BACKEND_PATH=str(library))
    assert done.returncode == 0 and done.stdout == without.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("GPU: ") and "layers on Standin0 (" in line and "-ngl 0" in line
    n, of = line.split()[1], line.split()[3]
    assert n == of != "0"


@pytest.mark.parametrize("words", [("-ngl", "0"), ("-ngl", "1"), ("-ngl", "-1")])
def test_what_is_asked_for_is_not_said(
    words: tuple[str, str], library: Path, without: subprocess.CompletedProcess[str]
) -> None:
    done = mllama("caption", str(IMAGE), *words, GGML_BACKEND_PATH=str(library))
    assert done.returncode == 0 and done.stdout == without.stdout and not done.stderr


def test_in_a_child_process(library: Path, without: subprocess.CompletedProcess[str]) -> None:
    code = (
        "import logging, sys\n"
        "from mllama_gguf import Mllama\n"
        "logging.basicConfig(level='INFO', format='%(name)s %(message)s')\n"
        f"with Mllama.from_pretrained('demo', isolate=True) as model: print(model.caption({str(IMAGE)!r}))"
    )
    for env, said in (({}, False), ({"GGML_BACKEND_PATH": str(library)}, True)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **elsewhere(**env)
        )
        assert done.returncode == 0 and done.stdout == without.stdout, done.stderr
        assert ("mllama_gguf.backend.opening GPU: " in done.stderr) == said
