"""A GPU against the numbers of the oracle and against the CPU: every number of layers, the encoder on either
side, the plan, taps, abort, the image cache, a child process, two devices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from golden_cases import (
    GOLDEN_DIR,
    HALF_CASES,
    HALF_IMAGE,
    PROMPTS,
    case,
    condense,
    grid_images,
    position_errors,
    relative_error,
    tiled,
)
from helpers import TinyFiles, noisy_image

from mllama_gguf import Aborted, Mllama
from mllama_gguf.backend.plan import make_plan
from mllama_gguf.backend.types import Device
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.inspect.graphs import watched_graphs
from mllama_gguf.store.resolve import BUNDLED

DEMO = BUNDLED["demo"]
IMAGE = Path(__file__).parents[2] / "examples" / "apple.png"
Files = Callable[[str], TinyFiles]

# Largest relative error with F32 weights and caches: states, logits. Products round their factors (Vulkan to
# F16, CUDA to TF32), unless the precision is "exact". A process has one, so all tests run once for each.
PRECISION: Any = os.environ.get("MLLAMA_GPU_PRECISION", "fast")
STATES_TOLERANCE, LOGITS_TOLERANCE = (2e-5, 5e-5) if PRECISION == "exact" else (2e-3, 6e-3)
# With weights in 16 bits, or quantized, against the CPU with the same weights.
TYPE_TOLERANCES = {"f16": 1e-2, "bf16": 3e-2, "q4_k_m": 6e-2}
# How much better than the next the CPU's token must be for the GPU to find it too.
MARGIN = 0.02

# Written to a file where MLLAMA_GPU_FIGURES names one: (arch, what) -> largest error
figures: dict[str, float] = {}


def note(what: str, value: float) -> None:
    figures[what] = max(value, figures.get(what, 0.0))


@pytest.fixture(scope="module", autouse=True)
def write_figures() -> Iterator[None]:
    yield
    if figures and (path := os.environ.get("MLLAMA_GPU_FIGURES")):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")


@pytest.fixture(params=tiny.ARCHS)
def arch(request: pytest.FixtureRequest) -> tiny.Arch:
    return tiny.ARCHS[request.param]


def opened(path: Path, n_gpu_layers: int = -1, **settings: Any) -> Mllama:
    exact: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "n_ctx": 512, "n_threads": 1}
    exact["precision"] = PRECISION
    return Mllama(path, n_gpu_layers=n_gpu_layers, **{**exact, **settings})


def logits(model: Mllama, arch: tiny.Arch, name: str, extra: list[int] | None = None) -> Any:
    prompt = case(arch, name)
    model.reset()
    return model.logits([*prompt.tokens, *(extra or [])], [tiled(arch, p) for p in prompt.images])


def assert_greedy(found: Any, expected: list[int], first: int) -> None:
    """Each expected token is the best one, or as good as the best."""
    for row, token in zip(found[first:], expected, strict=True):
        assert row.max() - row[token] <= MARGIN * np.abs(row).max(), (row.argmax(), token)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_golden(gpu: str, tiny_files: Files, arch: tiny.Arch, flash_attn: bool) -> None:
    with (
        np.load(GOLDEN_DIR / f"model_{arch.name}.npz") as golden,
        opened(tiny_files(arch.name).one, flash_attn=flash_attn, main_gpu=0) as model,
    ):
        matrices = [t for t in model._backend.model.tensors() if t.is_vision and not t.name.endswith("gate")]
        assert matrices and all(t.device == gpu for t in matrices)  # gates are numbers of operations
        for one in grid_images(arch):
            states = model.encode_image(tiled(arch, one)).states
            error = relative_error(states, golden[f"states_{one.aspect_ratio_id}"])
            note("states", error)
            assert error <= STATES_TOLERANCE, one
        for name in PROMPTS:
            expected = golden[f"greedy_{name}"].tolist()
            found = logits(model, arch, name, expected[:-1])
            n = len(case(arch, name).tokens)
            errors = position_errors(condense(found[:n]), golden[f"logits_{name}"])
            note("logits", float(errors.max()))
            assert errors.max() <= LOGITS_TOLERANCE, f"{name}: {errors.max():.1e} at {errors.argmax()}"
            assert_greedy(found, expected, n - 1)


@pytest.mark.parametrize("vision_device", ["auto", "cpu"])
def test_every_number_of_layers(gpu: str, tiny_files: Files, arch: tiny.Arch, vision_device: str) -> None:
    path = tiny_files(arch.name).one
    with opened(path, 0) as model:
        expected = logits(model, arch, "adjacent_then_one")
    for n in range(1, arch.layers + 2):
        with opened(path, n, vision_device=vision_device) as model:
            errors = position_errors(logits(model, arch, "adjacent_then_one"), expected)
        note("every n_gpu_layers", float(errors.max()))
        assert errors.max() <= LOGITS_TOLERANCE, (n, errors.max())


def test_the_demo_s_caption_at_every_count(gpu: str) -> None:
    captions = set()
    for n in range(make_plan(DEMO).n_layer + 2):
        with Mllama(DEMO, n_gpu_layers=n) as model:
            captions.add(model.caption(IMAGE))
    assert captions == {"a red apple"}


@pytest.mark.parametrize("type", TYPE_TOLERANCES)
def test_types(gpu: str, tmp_path: Path, type: Any) -> None:
    arch = tiny.ARCHS["gqa"]
    checkpoint = tiny.make_checkpoint(arch, tmp_path / "hf")
    text, vision = tmp_path / "text.gguf", tmp_path / "vision.gguf"
    convert(checkpoint, text, mmproj=vision, type=type)
    found = []
    for n in (0, -1):
        with Mllama(text, vision, n_gpu_layers=n, n_ctx=512, n_threads=1) as model:
            states = model.encode_image(tiled(arch, grid_images(arch)[HALF_IMAGE - 1])).states
            found.append([states, *(logits(model, arch, name) for name in HALF_CASES)])
    for cpu, there in zip(*found, strict=True):
        error = relative_error(there, cpu)
        note(f"{type} against the CPU", error)
        assert error <= TYPE_TOLERANCES[type]


@pytest.mark.parametrize("settings", [{}, {"flash_attn": False}, {"vision_device": "cpu"}], ids=str)
@pytest.mark.parametrize("n", [1, 3, -1])
def test_the_plan_is_what_is_allocated(gpu: str, n: int, settings: dict[str, Any]) -> None:
    settings = {"n_gpu_layers": n, "n_batch": 128, "n_threads": 1, **settings}
    (setting,) = make_plan(DEMO, n_ctx=1024, **settings).settings
    with Mllama(DEMO, n_ctx=1024, **settings) as model:
        h = model.hparams
        image = model.encode_image(noisy_image(1, 100, 100 * h.max_tiles))
        tokens = [h.image_token_id, *[1] * 1023]
        model._conversation.session.feed(tokens, [model._conversation.encode(image)])
        real = model.memory().devices
    assert [d.device for d in real] == [d.device for d in setting.devices] and len(real) > 1
    for planned, found in zip(setting.devices, real, strict=True):
        assert (found.mapped, found.weights, found.self_kv) == (
            planned.mapped,
            planned.weights,
            planned.self_kv,
        )
        assert found.compute == pytest.approx(planned.compute, rel=0.03, abs=64 * 1024)
        assert found.vision == pytest.approx(planned.vision, rel=0.03, abs=64 * 1024)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_no_operation_is_left_to_the_cpu(gpu: str, flash_attn: bool) -> None:
    settings: dict[str, Any] = {"n_gpu_layers": -1, "main_gpu": 0, "flash_attn": flash_attn}
    with watched_graphs() as graphs, Mllama(DEMO, image_cache=False, **settings) as model:
        assert model.caption(IMAGE) == "a red apple"
    assert len(graphs) > 3 and len(graphs[0].splits) == 1, [str(graph) for graph in graphs]
    for graph in graphs:
        assert graph.operations_on("CPU") in ([], [("GET_ROWS", "text.token_embd")]), str(graph)
        assert len(graph.splits) <= 2, str(graph)


def test_taps(gpu: str, tiny_files: Files) -> None:
    arch, seen = tiny.ARCHS["gqa"], {}

    def tap(name: str, values: Any) -> bool:
        if values is not None:
            seen.setdefault(name, values.copy())
        return name.endswith("layer_out") or name == "v.features"

    found = []
    for n in (0, -1):
        seen.clear()
        with opened(tiny_files("gqa").one, n) as model, model.tap(tap):
            logits(model, arch, "text_before_image")
        found.append(dict(seen))
    assert found[0].keys() == found[1].keys() and len(found[0]) > arch.layers
    for name, values in found[0].items():
        assert relative_error(found[1][name], values) <= LOGITS_TOLERANCE, name


def test_abort(gpu: str) -> None:
    stop = False
    with Mllama(DEMO, n_gpu_layers=-1, image_cache=False, abort=lambda: stop) as model:
        expected = model.caption(IMAGE)
        stop = True
        with pytest.raises(Aborted):
            for _ in range(1000):
                model.caption(IMAGE)
        stop = False
        assert model.caption(IMAGE) == expected


def test_the_image_cache(gpu: str, folder: Path) -> None:
    captions = []
    for _ in range(2):
        encoded: list[str] = []
        with Mllama(DEMO, n_gpu_layers=-1, progress=lambda phase, *_, e=encoded: e.append(phase)) as model:
            captions.append((model.caption(IMAGE), "encode" in encoded))
    assert captions == [("a red apple", True), ("a red apple", False)]


def test_a_child_process(gpu: str) -> None:
    with Mllama(DEMO, n_gpu_layers=-1, isolate=True) as model:
        assert model.caption(IMAGE) == "a red apple"


def test_by_default_all_layers_are_there(gpu: str) -> None:
    with Mllama(DEMO) as model:
        assert model.n_gpu_layers == model.hparams.n_layer + 1 or model.n_gpu_layers == -1
        assert model.caption(IMAGE) == "a red apple"


def test_two_devices(gpus: list[Device], tiny_files: Files, arch: tiny.Arch) -> None:
    """Where there are two: half of the layers on each, the encoder on the second."""
    split = (1, 1) if len(gpus) > 1 else (1,)
    path = tiny_files(arch.name).one
    with opened(path, 0) as model:
        expected = logits(model, arch, "three_images")
    with opened(path, -1, tensor_split=split, vision_device=gpus[-1].name) as model:
        used = {t.device for t in model._backend.model.tensors()}
        assert {d.name for d in gpus[:2]} <= used
        errors = position_errors(logits(model, arch, "three_images"), expected)
    assert errors.max() <= LOGITS_TOLERANCE
