"""The C code calls backends through the guard alone, and the library has all that its header declares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mllama_gguf.backend.library import declarations, load

NATIVE = Path(__file__).parents[2] / "native"

# These only look into ggml's own structures. All others ask a backend, which may throw: see guard.h.
HARMLESS = {
    "ggml_backend_buffer_get_base",  # of the CPU's memory
    "ggml_backend_buffer_get_size",
    "ggml_backend_buffer_get_type",
    "ggml_backend_buffer_set_usage",
    "ggml_backend_buft_get_alignment",  # of the CPU's memory
    "ggml_backend_buft_get_device",
    "ggml_backend_cpu_buffer_type",
    "ggml_backend_cpu_set_n_threads",
    "ggml_backend_dev_backend_reg",
    "ggml_backend_get_device",
    "ggml_backend_sched_get_buffer_size",
    "ggml_backend_sched_get_buffer_type",
    "ggml_backend_sched_reset",
    "ggml_backend_sched_set_eval_callback",
    "ggml_backend_sched_set_tensor_backend",
}


@pytest.mark.parametrize("path", sorted((NATIVE / "src").rglob("*.[ch]")), ids=lambda path: path.name)
def test_backends_are_called_through_the_guard(path: Path) -> None:
    code = re.sub(r"//.*|\"[^\"]*\"", "", path.read_text("utf-8"))
    # ggml_init ends the process where there is no memory.
    names = re.findall(r"\b(ggml_backend_\w+|ggml_init)\s*\(", code)
    called = {name for name in names if not name.endswith("_t")}
    assert called <= HARMLESS, f"{path.name} calls {called - HARMLESS}"


def test_the_library_has_what_its_header_declares() -> None:
    header = declarations((NATIVE / "include" / "mllama.h").read_text("utf-8"))
    names = re.findall(r"^[\w *]*?\b(mllama_\w+)\(", header, re.MULTILINE)
    assert len(names) > 40
    native = load()
    for name in names:
        assert getattr(native.lib, name) is not None
