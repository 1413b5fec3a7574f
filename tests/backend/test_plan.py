"""What is planned is what is then allocated; "auto" steps down. Devices other than the CPU: tests/rpc."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import BackendError, Conversation, LoadedModel, Mllama, OutOfMemoryError, RequestError
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.library import load
from mllama_gguf.backend.local import open_model
from mllama_gguf.backend.measure import measure
from mllama_gguf.backend.opening import step_down
from mllama_gguf.backend.plan import (
    MARGIN_BYTES,
    device_limits,
    largest_fitting,
    make_plan,
    offload_devices,
)
from mllama_gguf.backend.repack import usable_layouts
from mllama_gguf.backend.types import Device, DeviceMemory, Memory
from mllama_gguf.cli.main import run
from mllama_gguf.convert.quantize import quantize
from mllama_gguf.cpus import default_threads
from mllama_gguf.store.resolve import BUNDLED

Captured = pytest.CaptureFixture[str]
Files = Callable[[str], TinyFiles]
DEMO = BUNDLED["demo"]


def test_the_plan_is_what_is_allocated(tiny_files: Files) -> None:
    for path, settings in (
        (DEMO, {"n_ctx": 2048}),
        (DEMO, {"n_ctx": 700, "n_batch": 64, "type_k": "q8_0", "type_v": "q8_0"}),
        (DEMO, {"n_ctx": 1024, "n_batch": 32, "flash_attn": False, "use_mmap": False}),
        (tiny_files("gqa").one, {"n_ctx": 300, "n_batch": 7}),
        (tiny_files("threetiles").one, {"n_ctx": 512, "type_k": "f32", "type_v": "f32"}),
    ):
        (setting,) = make_plan(path, n_threads=1, **settings).settings
        (planned,) = setting.devices
        with Mllama(path, n_threads=1, **settings) as model:
            # A prompt that fills the context and an image of all tiles
            h = model.hparams
            image = model.encode_image(noisy_image(1, 100, 100 * h.max_tiles))
            assert image.n_tiles > 1
            tokens = [h.image_token_id, *[1] * (model.n_ctx - 1)]
            model._conversation.session.feed(tokens, [model._conversation.encode(image)])
            (real,) = model.memory().devices
        assert (real.mapped, real.weights, real.self_kv) == (planned.mapped, planned.weights, planned.self_kv)
        assert real.staging == planned.staging
        assert (planned.mapped > 0) == settings.get("use_mmap", True)
        assert (planned.weights > 0) != settings.get("use_mmap", True)
        assert real.cross_kv == pytest.approx(planned.cross_kv * image.n_tiles / h.max_tiles, rel=0.03)
        assert real.compute == pytest.approx(planned.compute, rel=0.03)
        assert real.vision == pytest.approx(planned.vision, rel=0.03)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "q8_0"])
def test_repacked_weights(
    kind: str, tiny_files: Files, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """They leave the mapping for memory, as planned, and give the same logits but for rounding."""
    path = tmp_path / "text.gguf"
    quantize(tiny_files("quant").one, path, kind)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    logits = {}
    for repack in (False, True):
        (setting,) = make_plan(path, n_ctx=64, repack=repack).settings
        (planned,) = setting.devices
        with Mllama(path, n_ctx=64, n_threads=2, repack=repack) as model:
            (real,) = model.memory().devices
            assert (real.mapped, real.weights, real.staging) == (
                planned.mapped, planned.weights, planned.staging,
            )  # fmt: skip
            layouts = Counter(t.layout for t in model._backend.model.tensors() if t.layout)
            record_property("layouts", f"{kind}, repack={repack}: {dict(layouts) or 'none'}")
            assert set(layouts) <= (set(usable_layouts()) if repack else set())
            logits[repack] = model.logits(tokens), real
            assert np.array_equal(model.logits(tokens), logits[repack][0])
    (plain, mapped), (repacked, copied) = logits[False], logits[True]
    assert np.linalg.norm(repacked - plain) <= 0.05 * np.linalg.norm(plain)
    # Which types have such a layout depends on the processor. AMX has sums beside the blocks.
    assert copied.mapped <= mapped.mapped
    before, after = mapped.mapped + mapped.weights, copied.mapped + copied.weights
    assert before - 4096 <= after <= (1.125 * before if "AMX" in layouts else before) + 4096
    if platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text() and kind != "q8_0":
        assert copied.mapped < 0.9 * mapped.mapped


def test_reserving_allocates_what_measuring_says(tiny_files: Files) -> None:
    callbacks = Callbacks(load())
    path = tiny_files("gqa").one
    planned, h = measure(path, None, callbacks=callbacks, n_ctx=512, n_tiles=[2, 1])
    model = open_model(path, None, callbacks=callbacks)
    context = model.open_context(callbacks, n_ctx=512, n_threads=default_threads(model.size))
    context.reserve([2, 1])
    (real,), (said,) = context.memory().devices, planned.devices
    assert (real.compute, real.vision, real.cross_kv) == (said.compute, said.vision, 0)
    context.image_fill([np.zeros((n, h.n_positions, h.n_embd), np.float32) for n in (2, 1)])
    assert context.memory().cross_kv == planned.cross_kv
    for wrong in ([0], [h.max_tiles + 1], [1] * 5000):
        with pytest.raises(RequestError):
            context.reserve(wrong)
    context.close()
    model.close()


def test_a_model_without_memory_computes_nothing(tiny_files: Files) -> None:
    callbacks = Callbacks(load())
    model = open_model(tiny_files("gqa").one, None, callbacks=callbacks, no_alloc=True)
    context = model.open_context(callbacks, n_ctx=256)
    h = model.hparams
    for use in (
        lambda: context.decode([1], -1, 0),
        lambda: context.encode(np.zeros((1, 3, h.image_size, h.image_size), np.float32), 1),
        lambda: context.image_fill([np.zeros((1, h.n_positions, h.n_embd), np.float32)]),
    ):
        with pytest.raises(RequestError, match="measuring only"):
            use()
    context.reserve([])
    text_only = context.memory()
    context.reserve([1])
    assert context.memory().cross_kv > text_only.cross_kv == 0
    context.reserve([])
    assert context.memory() == text_only
    context.close()
    model.close()


def test_a_text_model_alone(tiny_files: Files) -> None:
    plan = make_plan(tiny_files("gqa").text, n_ctx=256)
    assert plan.n_tiles == ()
    (memory,) = plan.settings[0].devices
    assert (memory.cross_kv, memory.vision) == (0, 0)
    assert plan.best == 0


# ---- what fits ---------------------------------------------------------------------------------------------


def gpu(name: str, free: int) -> Device:
    return Device(name, "a GPU", "gpu", free, free)


CPU = Device("CPU", "a CPU", "cpu", 2**40, 2**40)
GIB = 2**30


def test_limits() -> None:
    devices = [CPU, gpu("A", 100 * GIB), gpu("RPC0", GIB), gpu("silent", 0)]
    limits = device_limits(devices, {})
    assert limits == {"A": 95 * GIB, "RPC0": GIB - MARGIN_BYTES}
    assert [d.name for d in offload_devices(devices, {})] == ["RPC0", "A", "silent"]
    assert [d.name for d in offload_devices(devices, {"main_gpu": 1})] == ["A"]
    assert [d.name for d in offload_devices(devices, {"devices": ["silent", "a"]})] == ["silent", "A"]
    assert device_limits(devices, {}, "1GiB,2GiB")["A"] == 2 * GIB
    assert device_limits(devices, {}, ["cpu=3G", 5]) == {"A": 95 * GIB, "RPC0": 5, "CPU": 3 * GIB}
    with pytest.raises(RequestError, match=r"more amounts than devices to offload to \(RPC0, A"):
        device_limits(devices, {}, "1,1,1,1")
    with pytest.raises(RequestError, match="no device 'B'; there are: CPU, A"):
        device_limits(devices, {}, "B=1")


def test_the_largest_that_fits_is_found_in_few_steps(tiny_files: Files) -> None:
    _, h = measure(tiny_files("gqa").one, None, callbacks=Callbacks(load()), n_ctx=256)
    asked = []
    for most in range(h.n_layer + 2):

        def measured(n: int) -> tuple[Memory, Any]:
            asked.append(n)
            n = h.n_layer + 1 if n == -1 else n
            return Memory((DeviceMemory("A", 0, n * 100, 1, 1, 1, 1, 0),)), h

        assert largest_fitting(measured, {"A": most * 100 + 99}) == most
        assert largest_fitting(measured, {}) == h.n_layer + 1
    assert largest_fitting(measured, {"A": 3}) == 0
    assert len(asked) < 8 * (h.n_layer + 2)


# ---- auto --------------------------------------------------------------------------------------------------


def test_auto_steps_down_when_a_device_refuses() -> None:
    tried = []

    def open_with(layers: int) -> str:
        tried.append(layers)
        if layers > 4:
            raise OutOfMemoryError("no room")
        return "opened"

    assert step_down(open_with, 12) == "opened"
    assert tried == [12, 11, 9, 5, 0]
    tried.clear()
    assert step_down(open_with, 5) == "opened"
    assert tried == [5, 4]


def test_auto_gives_up_at_no_layers_and_at_other_errors() -> None:
    tried = []

    def open_with(layers: int) -> None:
        tried.append(layers)
        raise OutOfMemoryError("no room") if layers != 3 else BackendError("on fire")

    with pytest.raises(OutOfMemoryError):
        step_down(open_with, 2)
    assert tried == [2, 1, 0]
    with pytest.raises(BackendError, match="on fire"):
        step_down(open_with, 4)


def test_auto_without_a_device(tiny_files: Files) -> None:
    path = tiny_files("gqa").one
    with Mllama(path, n_ctx=256) as model, Mllama(path, n_ctx=256, n_gpu_layers="auto") as auto:
        assert auto.caption(noisy_image(1), max_tokens=5) == model.caption(noisy_image(1), max_tokens=5)
        assert [d.device for d in auto.memory().devices] == ["CPU"]
    with pytest.raises(RequestError, match="n_gpu_layers"):
        Mllama(path, n_gpu_layers="all")  # type: ignore[arg-type]


# ---- the command -------------------------------------------------------------------------------------------


def test_plan_command(tiny_files: Files, capsys: Captured) -> None:
    files = tiny_files("gqa")
    assert run(["plan", str(files.text), "--mmproj", str(files.mmproj), "-c", "512", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["n_ctx"], plan["n_tiles"], plan["best"]) == (512, [files.arch.max_tiles], 0)
    (cpu,) = plan["settings"][0]["devices"]
    assert cpu["device"] == "CPU" and cpu["self_kv"] > 0
    assert cpu["cross_kv_by_tiles"][-1] == cpu["cross_kv"]
    assert cpu["peak"] == cpu["self_kv"] + cpu["cross_kv"] + cpu["compute"] + cpu["vision"]
    assert run(["plan", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "one image of 4 tiles" in shown and "no device to offload to" in shown
    assert run(["plan", "demo", "--budget", "CPU=1MiB"]) == 0
    assert "Nothing fits" in capsys.readouterr().out
    assert run(["plan", "demo", "--budget", "8GiB"]) == 1
    assert "more amounts than devices to offload to (there are none)" in capsys.readouterr().err
    for budget in ("x", "CPU=x", "8GiB,x", "NaN"):
        assert run(["plan", "demo", "--budget", budget]) == 1
        assert capsys.readouterr().err.startswith("Error: --budget: ")
    assert run(["plan", "nowhere.gguf"]) == 1
    assert run(["caption", "x.png", "-ngl", "some"]) == 2


@pytest.mark.parametrize(
    ("name", "n", "settings"),
    [
        ("demo", 4, {"n_ctx": 700, "n_batch": 128}),
        ("demo", 2, {"n_ctx": 512, "n_batch": 32, "flash_attn": False}),
        ("gqa", 9, {"n_ctx": 300, "n_batch": 40, "type_k": "f32", "type_v": "f32"}),
    ],
)
def test_the_plan_of_conversations_that_compute_together(
    tiny_files: Files, name: str, n: int, settings: dict[str, Any]
) -> None:
    """A sequence costs its cells, and an image its slot; else only the results of a step grow."""
    path = DEMO if name == "demo" else tiny_files(name).one
    (planned,) = make_plan(path, n_threads=1, parallel=n, **settings).settings[0].devices
    (less,) = make_plan(path, n_threads=1, parallel=n - 1, **settings).settings[0].devices
    (alone,) = make_plan(path, n_threads=1, **settings).settings[0].devices
    with LoadedModel(path, n_threads=1, image_cache=False, **settings) as model:
        h, scheduler = model.hparams, model.scheduler()
        talks = [model.conversation(scheduler=scheduler) for _ in range(n)]

        def fill(i: int) -> None:
            image = talks[i].encode_image(noisy_image(i, 100, 100 * h.max_tiles))
            tokens = [h.image_token_id, *[1] * (talks[i].n_ctx - 9)]
            talks[i].session.feed(tokens, [talks[i].encode(image)])
            for _ in range(8):
                talks[i].session.step(1)

        with ThreadPoolExecutor(n) as pool:
            list(pool.map(fill, range(n)))
        (real,) = talks[0].memory().devices
        one = cells(talks[0], talks[0].n_ctx)
        assert real.self_kv == planned.self_kv
        assert (real.mapped, real.weights) == (planned.mapped, planned.weights)
        n_tiles = talks[0].encode_image(noisy_image(0, 100, 100 * h.max_tiles)).n_tiles
        assert real.cross_kv == pytest.approx(planned.cross_kv * n_tiles / h.max_tiles, rel=0.03)
        assert planned.cross_kv == n * alone.cross_kv
        assert real.vision == pytest.approx(planned.vision, rel=0.03)
        assert 0.8 * planned.compute <= real.compute <= 1.03 * planned.compute + 64 * 1024
        if n > 2:
            assert planned.self_kv - less.self_kv == one
        for talk in talks[1:]:
            talk.close()
        assert talks[0].memory().devices[0].self_kv == planned.self_kv - (n - 1) * one


def cells(talk: Conversation, n_tokens: int) -> int:
    """Bytes of the cells for so many tokens."""
    return talk.context.prefix_kv_size(-(-n_tokens // 256) * 256)


@pytest.mark.parametrize("n", [0, -1, 256, 1.5, True, "2"])
def test_a_wrong_number_of_conversations(n: Any) -> None:
    with pytest.raises(RequestError, match="parallel"):
        make_plan(DEMO, parallel=n)
    with pytest.raises(RequestError, match="parallel"):
        make_plan(DEMO, parallel=17, n_batch=16)
