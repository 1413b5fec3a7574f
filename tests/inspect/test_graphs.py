"""The report of where a graph's operations run, on stand-ins for GPUs: no operation is left to the CPU, and
one that the device does not know is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import elsewhere
from standin import standin_library

IMAGE = Path(__file__).parents[2] / "examples" / "apple.png"
CODE = """
import json, sys
from mllama_gguf import Mllama
from mllama_gguf.inspect.graphs import watched_graphs
from mllama_gguf.store.resolve import BUNDLED
settings = json.loads(sys.argv[1])
with watched_graphs() as graphs, Mllama(BUNDLED["demo"], image_cache=False, **settings) as model:
    model.caption(sys.argv[2], max_tokens=3)
    of = model.hparams.n_layer + 1
print(json.dumps([[[s.device, s.n_inputs, s.operations] for s in g.splits] for g in graphs]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin_library(tmp_path_factory.mktemp("standin"))


def graphs(library: Path, settings: dict[str, Any], **env: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(settings), str(IMAGE)],
        capture_output=True,
        text=True,
        timeout=120,
        **elsewhere(GGML_BACKEND_PATH=str(library), **env),
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def on_cpu(graph: Any) -> list[list[str]]:
    return [operation for device, _, operations in graph if device == "CPU" for operation in operations]


@pytest.mark.parametrize("flash_attn", [True, False])
def test_nothing_is_left_to_the_cpu(library: Path, flash_attn: bool) -> None:
    encoder, *others = graphs(library, {"n_gpu_layers": -1, "main_gpu": 0, "flash_attn": flash_attn})
    assert len(encoder) == 1 and len(encoder[0][2]) > 100  # one run of operations on the device
    assert len(others) > 3
    for graph in others:
        # The embedding stays in the file's pages: its rows are few.
        assert on_cpu(graph) in ([], [["GET_ROWS", "text.token_embd"]])
        assert len(graph) <= 2


def test_half_of_the_layers(library: Path) -> None:
    encoder, *others = graphs(library, {"n_gpu_layers": 2, "main_gpu": 0})
    assert len(encoder) == 1
    assert any(len(graph) == 2 and len(on_cpu(graph)) > 5 for graph in others)


@pytest.mark.parametrize("name", ["NORM", "GELU_ERF"])
def test_an_operation_that_the_device_does_not_know_is_seen(library: Path, name: str) -> None:
    encoder, *_ = graphs(library, {"n_gpu_layers": -1, "main_gpu": 0}, STANDIN_REFUSES=name)
    assert len(encoder) > 3
    assert {operation for operation, _ in on_cpu(encoder)} == {name[:10]}  # as ggml prints them


def test_without_flash_attention_on_the_device_nothing_goes_to_the_cpu(library: Path) -> None:
    """CUDA's has no heads of 32 values. Other operations do it there."""
    settings = {"n_gpu_layers": -1, "main_gpu": 0}
    encoder, *others = graphs(library, settings, STANDIN_REFUSES="FLASH_ATTN_EXT")
    assert len(encoder) == 1, on_cpu(encoder)
    assert others
    for graph in others:
        assert on_cpu(graph) in ([], [["GET_ROWS", "text.token_embd"]])


@pytest.mark.parametrize("flash_attn", [True, False])
def test_metal_knows_all_operations(library: Path, flash_attn: bool) -> None:
    """By Metal's table as data, with types, shapes and strides of the demo's graphs in F16."""
    settings = {"n_gpu_layers": -1, "main_gpu": 0, "flash_attn": flash_attn}
    encoder, *others = graphs(library, settings, STANDIN_METAL="1")
    assert len(encoder) == 1, on_cpu(encoder)
    for graph in others:
        assert on_cpu(graph) in ([], [["GET_ROWS", "text.token_embd"]])


def test_metal_needs_no_keys_and_values_of_one_type(library: Path) -> None:
    """Its flash attention wants them."""
    settings = {"n_gpu_layers": -1, "main_gpu": 0, "type_k": "f16", "type_v": "f32"}
    _, *others = graphs(library, settings, STANDIN_METAL="1")
    for graph in others:
        assert on_cpu(graph) in ([], [["GET_ROWS", "text.token_embd"]])


def test_without_gpus_all_is_on_the_cpu(library: Path) -> None:
    for graph in graphs(library, {"n_gpu_layers": 0}):
        assert {device for device, _, _ in graph} == {"CPU"}
