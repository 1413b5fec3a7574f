"""Shared by the benchmarks: facts about the machine, the table on the screen, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from rich.console import Console
from rich.table import Table

from mllama_gguf import __version__
from mllama_gguf.backend.kernels import cpu_kernel
from mllama_gguf.backend.library import load
from mllama_gguf.cpus import processor_name
from mllama_gguf.errors import MllamaError, RequestError
from mllama_gguf.files import Kind, check_folder, check_output, write_whole

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llama-cpp-python", "numpy", "torch", "transformers")


def about(**settings: Any) -> dict[str, Any]:
    """Machine, versions, commit, and the settings of a benchmark."""
    native = load()
    return {
        "cpu": processor_name(), "cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0], "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(), "mllama_gguf": __version__, "commit": _commit(),
        "ggml": native.text(native.lib.mllama_ggml_version_loaded()),
        "kernel": cpu_kernel(),
        **{name: _version(name) for name in PACKAGES},
        **settings,
    }  # fmt: skip


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def anonymous_memory() -> int:
    """Bytes of this process's own memory, without mapped files (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def peak_memory(work: Callable[[], Any]) -> int:
    """The most anonymous memory that the work adds, bytes; looked at every 20 ms (Linux)."""
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak


def peak_resident() -> int:
    """The most memory that this process had so far, bytes, mapped files included (Linux). Not ru_maxrss,
    which starts at what the parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; the first column is words, the others are numbers. Nothing is cut off."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    width = Console(width=1000).measure(table).maximum
    Console(width=max(width, Console().width)).print(table)


def _is_figures(file: BinaryIO) -> bool:
    content = json.load(file)
    return isinstance(content, dict) and isinstance(content.get("about"), dict)


def json_path(words: str) -> Path:
    """The value of --json, for argparse: a new file, or one of figures, which is replaced."""
    try:
        return check_output(words, Kind("file of figures", _is_figures), overwrite=True)
    except MllamaError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def folder(words: str) -> Path:
    """The value of --dir, for argparse: a folder, made if it is missing, in which a script makes a temporary
    one for its files."""
    try:
        path = check_folder(words)
        path.mkdir(parents=True, exist_ok=True)
    except (MllamaError, OSError) as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    return path


def check_replaced(path: Path, name: str, content: dict[str, Any]) -> None:
    """Check that a folder of outputs may be replaced: it does not exist, is empty, or has a JSON file of this
    name and content, as an earlier run wrote it. Raises MllamaError."""
    check_folder(path)
    if path.is_dir() and any(path.iterdir()):
        same = Kind("file of an earlier run", lambda file: bool(json.load(file) == content))
        if not (path / name).exists():
            raise RequestError(f"cannot write to {path}: it has other files; give another name")
        check_output(path / name, same, overwrite=True)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Keep the figures, if somebody wants them."""
    if path is not None:
        write_whole(path, json.dumps(result, indent=1, default=str) + "\n")
