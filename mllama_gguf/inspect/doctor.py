"""The facts about an installation that somebody needs who helps its user, and its problems.

`examine` looks at one thing after another. What it says can be shown to others: see `private`.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from ..backend.kernels import Kernel, describe, record_path
from ..backend.repack import offered_layouts, usable_layouts
from ..cpus import processor_name, usable_cpus
from ..errors import MllamaError, RequestError
from ..words import one_line, show_size
from .private import private, private_value, variable

logger = logging.getLogger(__name__)
Mark = Literal["ok", "note", "problem"]
PACKAGES = ("llama-cpp-python", "gguf", "llguidance", "numpy", "pillow")
# A note below this: what the 11B model as Q4_K_M takes.
REAL_MEMORY, REAL_DISK = 9_000_000_000, 8_000_000_000
VARIABLES = ("MLLAMA_", "OLLAMA_MODELS", "HF_HOME", "GGML_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    mark:   ok; note: good to know; problem: something does not work
    words:  one line
    advice: what to do about it, one line, or ""
    facts:  the same for programs, values of JSON
    """

    name: str
    mark: Mark
    words: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def examine(own_version: str) -> Iterator[Finding]:
    """Look at everything, the quick things first. Nothing is written but what trials found. What fails in
    an unexpected way is a finding too."""
    for finding in _look(own_version):
        yield replace(
            finding,
            name=private(finding.name),
            words=private(finding.words),
            advice=private(finding.advice),
            facts=private_value(finding.facts),
        )


def _look(own_version: str) -> Iterator[Finding]:
    yield _versions(own_version)
    try:
        yield _library()
    except Exception as e:
        yield _problem("library", e, "in the source folder: pip install --force-reinstall --no-cache-dir .")
        return  # nothing else can be looked at
    looks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("processor", _processor),
        ("memory", _memory),
        ("disk", _disk),
        ("variables", _environment),
        ("models", _models),
        ("devices", _devices),
        ("caption", _caption),
    )
    for name, look in looks:
        try:
            yield from look()
        except Exception as e:  # in the report, where the user's names are taken out
            logger.debug("%s", name, exc_info=True)
            yield _problem(name, e, "please report this")


def _problem(name: str, error: BaseException, advice: str = "") -> Finding:
    words = str(error) if isinstance(error, MllamaError) else f"{type(error).__name__}: {error}"
    return Finding(name, "problem", one_line(private(words)), advice)


def _report(error: MllamaError) -> str:
    """What to advise about an error: one about what the user asked says it itself."""
    return "" if isinstance(error, RequestError) else "please report this"


def _versions(own: str) -> Finding:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    missing = [package for package, number in found.items() if number is None]
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    words = f"mllama_gguf {own}, {system}, " + ", ".join(
        f"{package} {number or 'missing'}" for package, number in found.items()
    )
    advice = f"pip install {' '.join(missing)}" if missing else ""
    facts = {"mllama_gguf": own, "python": platform.python_version(), "packages": found}
    facts |= {"system": platform.system(), "machine": platform.machine()}
    return Finding("versions", "problem" if missing else "ok", words, advice, facts)


def _library() -> Finding:
    from ..backend.library import load
    from ..backend.local import devices

    native = load()
    ggml = native.text(native.lib.mllama_ggml_version_loaded())
    has_rpc = bool(native.lib.mllama_rpc_available())
    found = {device.name.rstrip("0123456789") for device in devices()} | ({"RPC"} if has_rpc else set())
    backends = sorted(found)
    built = _build_flags()
    words = f"libmllama {native.text(native.lib.mllama_version())}, ggml {ggml} with {', '.join(backends)}"
    words += f"; built with {built}" if built else ""
    facts = {"ggml": ggml, "backends": backends, "rpc": has_rpc, "built_with": built}
    return Finding("library", "ok", words, "", facts)


def _build_flags() -> str:
    """What ggml was built with, as it says itself: instructions of the processor, OpenMP and so on."""
    from llama_cpp import llama_cpp

    parts = llama_cpp.llama_print_system_info().decode("utf-8", "replace").replace("CPU :", "").split("|")
    return " ".join(part.split("=")[0].strip() for part in parts if part.strip().endswith("= 1"))


def _processor() -> Iterator[Finding]:
    chosen = describe()
    kernel = chosen.name
    usable = usable_layouts()
    layouts = {layout: layout in usable for layout in offered_layouts()}
    name, cpus = processor_name(), usable_cpus()
    words = f"{name}, {cpus} usable CPU{'s' if cpus > 1 else ''}, kernel {kernel or 'off'}"
    if layouts:
        states = (f"{layout} {'works' if works else 'fails'}" for layout, works in layouts.items())
        words += f", repacked layouts: {', '.join(states)}"
    facts = {"name": name, "cpus": cpus, "kernel": kernel or None, "layouts": layouts}
    advice = "" if kernel else "unset MLLAMA_CPU_KERNEL to use the fast kernels"
    yield Finding("processor", "ok" if kernel else "note", words, advice, facts)
    if chosen.parts:
        yield _kernel(chosen)


def _kernel(kernel: Kernel) -> Finding:
    """What computes each part, and how fast the others are beside the fastest."""
    failed = [f"{name}: {words}" for part in kernel.parts.values() for name, words in part.failed.items()]
    words, facts = kernel.in_words(), kernel.facts()
    if not failed:
        return Finding("kernel", "ok", words, "", facts)
    advice = f"{'; '.join(failed)}; the others are used; remove {record_path()} to try again"
    return Finding("kernel", "note", words, one_line(private(advice)), facts)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    words = f"{show_size(free)} of {show_size(total)} available"
    facts = {"available": free, "total": total}
    if free >= REAL_MEMORY:
        yield Finding("memory", "ok", words, "", facts)
        return
    advice = f"the 11B model as Q4_K_M takes about {show_size(REAL_MEMORY)}; close other programs"
    yield Finding("memory", "note", words, advice, facts)


def _disk() -> Iterator[Finding]:
    from ..cache.disk import ImageCache
    from ..store.ollama import downloads

    try:
        info = ImageCache().info()
        used = f"{show_size(info.n_bytes)} of at most {show_size(info.max_bytes)}"
        place = info.directory
        words = f"{used} in {place}, {show_size(_free(place))} free"
        facts = {"bytes": info.n_bytes, "max_bytes": info.max_bytes, "directory": str(place)}
        yield _writable(Finding("image cache", "ok", words, "", facts), place, "MLLAMA_IMAGE_CACHE")
    except OSError as e:
        yield _problem("image cache", e, "set MLLAMA_IMAGE_CACHE to a folder that you may write to")
    except MllamaError as e:  # of the size
        yield _problem("image cache", e)
    try:
        place = downloads()
        free = _free(place)
    except OSError as e:
        yield _problem("downloads", e, "set MLLAMA_DOWNLOADS to a folder that you may write to")
        return
    words = f"{show_size(free)} free for models in {place}"
    facts = {"free": free, "directory": str(place)}
    if free >= REAL_DISK:
        yield _writable(Finding("downloads", "ok", words, "", facts), place, "MLLAMA_DOWNLOADS")
    else:
        need = f"the 11B model as Q4_K_M takes {show_size(REAL_DISK)}"
        advice = f"{need}; set MLLAMA_DOWNLOADS to a folder on a larger disk"
        yield Finding("downloads", "note", words, advice, facts)


def _writable(finding: Finding, folder: Path, variable: str) -> Finding:
    """The finding, or that a folder is none that this user may write to."""
    there = _existing(folder)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return finding
    why = f"{there} cannot be written" if there.is_dir() else f"{there} is not a folder"
    return replace(
        finding,
        mark="note",
        words=f"{finding.words}; {why}",
        advice=f"set {variable} to a folder that can be",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the innermost one around it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _free(folder: Path) -> int:
    """Bytes for this user on the disk where a folder is or would be. Raises OSError."""
    return shutil.disk_usage(_existing(folder)).free


def _environment() -> Iterator[Finding]:
    chosen = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    found = {name: variable(name, value) for name, value in chosen.items()}
    if found:
        words = ", ".join(f"{name}={one_line(value, 60)}" for name, value in found.items())
        yield Finding("variables", "note", words, "", found)


def _models() -> Iterator[Finding]:
    from ..store.lockfile import locked_models, without_warning
    from .inventory import closed_stores, inventory

    try:
        locked_models()
    except MllamaError as e:
        yield _problem("models.lock", e, "this file is ignored; mend it or move it away")
    yield from _named_model()
    with without_warning():
        models = inventory()
    for found in models:
        name, words = f"model {found.name}", f"{found.place}, {show_size(found.size)}"
        facts = {"name": found.name, "place": found.place, "size": found.size}
        facts |= {"memory": found.memory, "fits": found.fits}
        if found.problem:
            yield Finding(name, "problem", one_line(private(found.problem)), "", facts)
        elif found.fits:
            yield Finding(name, "ok", f"{words}, needs {show_size(found.memory or 0)}", "", facts)
        else:
            words += f", needs {show_size(found.memory or 0)}: more than the available memory"
            yield Finding(name, "note", words, "", facts)
    if all(found.place == "bundled" for found in models):
        advice = "mllama pull llama3.2-vision-11b, or see the README for files that you have"
        yield Finding("models", "note", "no model but the bundled demo", advice)
    for store in closed_stores():
        advice = "run as the user that owns it, or make it readable"
        yield Finding("models", "note", f"{store}: this user may not read it", advice)


def _named_model() -> Iterator[Finding]:
    """What is wrong with the model that MLLAMA_MODEL names, and with the store that OLLAMA_MODELS names."""
    from ..gguf.reader import read_gguf
    from ..store.resolve import resolve

    if name := os.environ.get("MLLAMA_MODEL"):
        try:
            read_gguf(resolve(name).text)
        except MllamaError as e:
            yield _problem("MLLAMA_MODEL", e, "every command without -m wants it; mend it or unset it")
    store = os.environ.get("OLLAMA_MODELS")
    if store and not os.path.isdir(store):
        advice = "name the folder that holds blobs and manifests, or unset it"
        yield Finding("OLLAMA_MODELS", "note", f"{private(store)}: no folder", advice)


def _devices() -> Iterator[Finding]:
    """Each device computes a known answer."""
    from ..backend.local import devices
    from .selftest import compare, verdict

    for device in devices(start=True):
        name, advice = f"device {device.name}", ""
        about = device.description
        if device.type != "cpu":  # ggml takes all of the memory for free there; `_memory` knows better
            about += f", {show_size(device.memory_free)} of {show_size(device.memory_total)} free"
        facts: dict[str, Any] = {"type": device.type, "error": device.error}
        facts |= {"free": device.memory_free, "total": device.memory_total}
        if device.error is not None:
            words = f"{about}, cannot be used: {device.error}"
            advice = "the other devices work; look at its driver"
            yield Finding(name, "problem", one_line(private(words)), advice, facts)
            continue
        if device.type not in ("cpu", "gpu", "igpu"):
            yield Finding(name, "ok", f"{about}; it helps the CPU", "", facts)
            continue
        start = time.perf_counter()
        try:
            errors = compare(device.name, is_cpu=device.type == "cpu")
        except MllamaError as e:
            words = f"{about}; {one_line(private(str(e)))}"
            yield Finding(name, "problem", words, _report(e), facts)
            continue
        seconds = time.perf_counter() - start
        is_right, words = verdict(errors)
        facts |= {"states_error": errors[0], "logits_error": errors[1], "seconds": seconds}
        if not is_right:
            advice = "its answers are wrong; please report this, and use -ngl 0" + (
                " with MLLAMA_CPU_KERNEL=off" if device.type == "cpu" else ""
            )
        yield Finding(name, "ok" if is_right else "problem", f"{about}; known answer: {words}", advice, facts)


def _caption() -> Iterator[Finding]:
    """The way of an image from end to end, in this process."""
    from ..model import Mllama
    from ..store.resolve import resolve
    from .selftest import image

    start = time.perf_counter()
    try:
        with Mllama(resolve("demo").text, image_cache=False) as model:
            opened = time.perf_counter() - start
            text = model.caption(image(), max_tokens=20)
    except MllamaError as e:
        yield _problem("caption", e, _report(e))
        return
    seconds = time.perf_counter() - start
    words = f"{len(text)} characters in {seconds:.2f} s, {opened:.2f} of them to open the demo model"
    yield Finding("caption", "ok", words, "", {"seconds": seconds, "open_seconds": opened})
