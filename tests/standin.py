"""The library with devices for tests, from native/tests/throwing_backend.cpp."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "native" / "tests"


def llama_cpp() -> Path:
    """The folder of the installed llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def standin_library(folder: Path) -> Path:
    """The library that MLLAMA_TEST_BACKEND names, else one compiled into the folder."""
    built = os.environ.get("MLLAMA_TEST_BACKEND")
    return Path(built) if built else compiled("throwing_backend.cpp", folder)


def compiled(source: str, folder: Path) -> Path:
    """A library from native/tests against the installed ggml."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "this test compiles C++, as installing the package does: install g++ or clang++"
    package = llama_cpp()
    target = folder / f"lib{Path(source).stem}.so"
    libraries = [f"-L{package / 'lib'}", "-lggml", "-lggml-base", f"-Wl,-rpath,{package / 'lib'}"]
    flags = ["-std=c++17", "-shared", "-fPIC", f"-I{package.parent / 'include'}"]
    command = [compiler, *flags, str(SOURCES / source), "-o", str(target), *libraries]
    subprocess.run(command, check=True)
    return target
