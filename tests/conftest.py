"""Random models that many tests share, made once."""

from __future__ import annotations

import glob
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
import tiny
from helpers import TinyFiles

from mllama_gguf.cache.disk import DIRECTORY_VARIABLE, SIZE_VARIABLE
from mllama_gguf.cache.folder import NAME
from mllama_gguf.convert.huggingface import convert

# Tests, and the processes that they start, neither find nor leave images on disk; those of the image cache
# turn it on.
os.environ[SIZE_VARIABLE] = "0"


# A shell starts what runs in the background (`pytest &`) with Ctrl-C ignored, and so would be our children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """A backend that the user has named brings devices, and only tests/gpu is about those."""
    named = [config.invocation_params.dir / arg for arg in config.args]
    if not any("gpu" in path.parts for path in named):
        os.environ.pop("GGML_BACKEND_PATH", None)


def children() -> set[int]:
    """The ids of the processes that this one has started, but for the one by which multiprocessing cleans
    up."""
    tasks = glob.glob("/proc/self/task/*/children")
    if not tasks:
        found = {child.pid for child in psutil.Process().children()}
    else:
        found = set()
        for task in tasks:
            with suppress(OSError), open(task) as file:
                found |= {int(word) for word in file.read().split()}
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    return found - {tracker}


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """A test that fails in its middle leaves no process behind."""
    before = children()
    yield
    for pid in children() - before:
        with suppress(psutil.NoSuchProcess):
            child = psutil.Process(pid)
            for process in (*child.children(recursive=True), child):
                process.kill()
            with suppress(psutil.TimeoutExpired):
                child.wait(10)


@pytest.fixture(autouse=True)
def no_user_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user of this machine has tuned is none of the tests' business."""
    monkeypatch.setenv("MLLAMA_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the image cache, which is on."""
    path = tmp_path / "cache" / "images"
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(path))
    monkeypatch.delenv(SIZE_VARIABLE)
    return path / NAME


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyFiles]:
    """The files of an architecture by its name."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, TinyFiles] = {}

    def files(name: str) -> TinyFiles:
        if name not in made:
            checkpoint = tiny.make_checkpoint(tiny.ARCHS[name], folder / name)
            text, mmproj = convert(checkpoint, folder / f"{name}.gguf", type="f32")
            (one,) = convert(checkpoint, folder / f"{name}.one.gguf", type="f32", single_file=True)
            made[name] = TinyFiles(tiny.ARCHS[name], text, mmproj, one)
        return made[name]

    return files


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vision encoder needs many seconds for four tiles."""
    folder = tmp_path_factory.mktemp("slow")
    arch = replace(
        tiny.ARCHS["square"],
        name="slow",
        image_size=448,
        patch_size=8,
        vision_width=64,
        local_layers=12,
        global_layers=4,
        max_positions=131072,
    )
    checkpoint = tiny.make_checkpoint(arch, folder / "hf")
    (path,) = convert(checkpoint, folder / "slow.gguf", type="f16", single_file=True)
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which layouts of weights the tests of repack got: that depends on the processor."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "layouts" and report.when == "call":
                terminalreporter.write_line(f"repack: {report.nodeid.rpartition('::')[2]}: {value}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--schemas", type=int, help="Random schemas of tests/text/test_schema.py.  [default: 300]"
    )
