"""Devices whose backend throws C++ exceptions: one error that names the device, and the others work.

native/tests/throwing_backend.cpp plays two GPUs. It is compiled here, unless MLLAMA_TEST_BACKEND names the
library that CMake's option of this name makes. What ggml registers stays in its process, so tests/throwing.py
runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyFiles, elsewhere
from standin import compiled, llama_cpp, standin_library
from throwing import PLACES

Files = Callable[[str], TinyFiles]
Rows = list[dict[str, Any]]

# No simple use of a device comes here: which of the two has thrown cannot be found out.
TOO_SELDOM = ("cpy_tensor", "graph_optimize", "get_proc_address")
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin_library(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="module")
def throwing(library: Path) -> Callable[..., Rows]:
    """Runs a function of throwing.py; what it told."""

    def run(*words: str, **env: str) -> Rows:
        script = TESTS / "throwing.py"
        settings = elsewhere(**env)
        settings["env"]["PYTHONPATH"] += os.pathsep + str(TESTS)
        done = subprocess.run(
            [sys.executable, str(script), str(library), *words],
            capture_output=True,
            text=True,
            timeout=300,
            **settings,
        )
        told = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert done.returncode == 0, f"after {told[-1:]}: {done.stderr[-3000:]}{done.stdout[-3000:]}"
        return [{"output": done.stdout, "errors": done.stderr}, *map(json.loads, told)]

    return run


@pytest.mark.parametrize(
    "place",
    ["get_name", "get_type", "get_description", "get_memory", "init_backend", "get_buffer_type", "free"],
)
def test_at_the_start(place: str, throwing: Callable[..., Rows], tiny_files: Files) -> None:
    _, *devices, rest, log, split, named, main, vision, again = throwing(
        "start", place, str(tiny_files("gqa").one)
    )
    name = "device2" if place == "get_name" else "Standin1"
    assert [device["name"] for device in devices] == ["CPU", "Standin0", name]
    assert devices[0]["error"] is devices[1]["error"] is None
    if place == "free":  # it was of use before
        assert devices[2]["error"] is None
        assert rest == {"same": True, "devices": ["CPU", "Standin0", "Standin1"]}
        return
    assert f"no luck in {place}" in devices[2]["error"] and "\n" not in devices[2]["error"]
    assert rest == {"same": True, "devices": ["CPU", "Standin0"]}
    assert len(log["warnings"]) == 1 and f"no luck in {place}" in log["warnings"][0]
    assert split == {"split": None}  # its share is left to the other
    for told in (named, main, vision):  # the caller wanted this one
        assert told["error"]["type"] == "BackendError"
        assert ("device 2 " if place == "get_name" else "Standin1") in told["error"]["words"]
    assert again == {"again": True}  # later all is well


@pytest.fixture(scope="module")
def computed(throwing: Callable[..., Rows], tiny_files: Files) -> Rows:
    return throwing("compute", str(tiny_files("gqa").one))[1:]


@pytest.mark.parametrize("place", PLACES)
def test_while_computing(place: str, computed: Rows) -> None:
    rows = [row for row in computed if row["place"] == place]
    assert all(row["same"] for row in rows if "same" in row)
    faults = [row for row in rows if "thrown" in row]
    assert any(row["thrown"] for row in faults), "the test does not reach this place"
    for row in faults:
        if place in ("free", "free_buffer") or not row["thrown"]:
            assert row["error"] is None  # what is given back is logged
            continue
        words = row["error"]["words"]
        assert row["error"]["type"] == ("OutOfMemoryError" if row["kind"] == "memory" else "BackendError")
        assert "\n" not in words and "Standin" in words
        reason = {"error": f"no luck in {place}", "memory": "out of memory", "odd": "an unknown exception"}
        reason["abort"] = f"Standin error: no luck in {place}"  # ggml wants to end the process
        assert reason[row["kind"]] in words
        if place not in TOO_SELDOM:
            assert "Standin1" in words and "Standin0" not in words


def test_in_a_child_process(throwing: Callable[..., Rows], tiny_files: Files) -> None:
    """With isolate=True: the same errors, and no process is lost."""
    _, opened, *rows, closed = throwing("isolated", str(tiny_files("gqa").one))
    assert opened == {"devices": ["CPU", "Standin0", "Standin1"]}
    assert closed == {"processes": 1}
    assert len(rows) == 24
    for row in rows:
        assert row["same"]
        if row["place"] == "clear":  # of caches, which are there already
            assert row["error"] is None
            continue
        words = row["error"]["words"]
        assert row["error"]["type"] == ("OutOfMemoryError" if row["kind"] == "memory" else "BackendError")
        assert "\n" not in words and "Standin1" in words


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
@pytest.mark.parametrize("when", ["vulkan", "always"])
def test_registration(when: str, tmp_path: Path) -> None:
    """ggml's own registration throws, which leaves not even the CPU: it is tried again without Vulkan."""
    preloaded = f"{os.environ.get('LD_PRELOAD', '')}:{compiled('throwing_registry.cpp', tmp_path)}".strip(":")
    ggml = str(llama_cpp() / "lib" / "libggml-cpu.so")
    apple = Path(__file__).parents[2] / "examples" / "apple.png"
    for command in (["devices"], ["caption", str(apple)]):
        done = subprocess.run(
            [sys.executable, "-m", "mllama_gguf", *command],
            capture_output=True,
            text=True,
            timeout=100,
            **elsewhere(LD_PRELOAD=preloaded, MLLAMA_TEST_REGISTRY=when, MLLAMA_TEST_GGML_CPU=ggml),
        )
        if when == "vulkan":
            assert done.returncode == 0, done.stderr
            assert "CPU" in done.stdout or "a red apple" in done.stdout
        else:
            assert done.returncode == 1
            assert done.stderr == (
                "Error: ggml cannot register the devices of this machine: Registry: no luck\n"
            )


def test_when_it_is_given_back(throwing: Callable[..., Rows], tiny_files: Files) -> None:
    told = throwing("closing", str(tiny_files("gqa").one))[1:]
    assert {row["place"] for row in told if row["thrown"]} >= {"free", "free_buffer"}


def test_command_devices(throwing: Callable[..., Rows]) -> None:
    first, *rows = throwing("command", "init_backend", "devices", "--json")
    assert [row.get("error") is None for row in rows[:-1]] == [True, True, False]
    assert rows[-1] == {"exit_code": 0}
    first, *_ = throwing("command", "init_backend", "devices")
    (line,) = [line for line in first["output"].splitlines() if line.startswith("Standin1")]
    assert "cannot be used: device Standin1 failed while starting: Standin: no luck in init_backend" in line


def test_command_caption(throwing: Callable[..., Rows]) -> None:
    """Without a layer on it, with the others, and on the device itself."""
    apple = str(Path(__file__).parents[2] / "examples" / "apple.png")
    for options in ([], ["-ngl", "-1"]):
        first, last = throwing("command", "init_backend", "caption", apple, *options)
        assert last == {"exit_code": 0} and "a red apple" in first["output"]
    # llama.cpp, which has the vocabulary, asks no device either.
    first, last = throwing("command", "get_props:odd", "caption", apple)
    assert last == {"exit_code": 0} and "a red apple" in first["output"]
    first, last = throwing("command", "init_backend", "caption", apple, "-ngl", "-1", "--device", "Standin1")
    assert last == {"exit_code": 1} and "Standin1 failed while starting" in first["errors"]
    assert first["errors"].count("\n") == 1
    first, last = throwing("command", "graph_compute", "caption", apple, "-ngl", "-1")
    assert last == {"exit_code": 1} and "Standin1 failed while computing" in first["errors"]
