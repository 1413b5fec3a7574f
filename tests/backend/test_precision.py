"""precision="exact": what GPUs are told before they start, and that a process has one precision."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
from helpers import TinyFiles

from mllama_gguf import Mllama, RequestError
from mllama_gguf.backend import precision
from mllama_gguf.backend.precision import begin
from mllama_gguf.settings import Precision

VARIABLES = ("GGML_VK_DISABLE_F16", "NVIDIA_TF32_OVERRIDE")


@pytest.fixture(autouse=True)
def nothing_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_begun", None)
    for name in precision._EXACT:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def told() -> list[bool]:
    return [name in os.environ for name in VARIABLES]


def test_without_gpus_nothing_is_told() -> None:
    begin("exact", lambda: False)
    begin("fast", lambda: False)
    assert told() == [False, False]


@pytest.mark.parametrize(("first", "second"), [("fast", "exact"), ("exact", "fast")])
def test_a_process_has_one_precision(first: Precision, second: Precision) -> None:
    begin(first, lambda: True)
    assert told() == [first == "exact"] * 2
    begin(first, lambda: True)
    begin(None, lambda: True)  # as `mllama devices` does
    with pytest.raises(RequestError, match=f"run with '{first}'; use another process"):
        begin(second, lambda: True)
    assert told() == [first == "exact"] * 2


def test_devices_that_are_only_looked_at_run_fast() -> None:
    begin(None, lambda: True)
    assert told() == [False, False]
    with pytest.raises(RequestError, match="run with 'fast'"):
        begin("exact", lambda: True)


@pytest.mark.parametrize("isolate", [False, True])
def test_the_cpu_is_as_exact_anyway(tiny_files: Callable[[str], TinyFiles], isolate: bool) -> None:
    found = []
    for chosen in ("fast", "exact"):
        with Mllama(
            tiny_files("gqa").one, precision=chosen, isolate=isolate, n_ctx=64, image_cache=False
        ) as model:
            found.append(model.logits([1, 2, 3, 4]))
    assert np.array_equal(*found)
