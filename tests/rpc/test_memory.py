"""What is planned is what workers then hold, and "auto" fits what a worker has."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import Mllama
from mllama_gguf.backend.plan import device_limits, make_plan
from mllama_gguf.cli.main import run
from mllama_gguf.store.resolve import BUNDLED

Files = Callable[[str], TinyFiles]
DEMO = BUNDLED["demo"]
PARTS = ("mapped", "weights", "self_kv", "staging")


@pytest.mark.parametrize(
    "settings",
    [
        {"n_gpu_layers": 1},
        {"n_gpu_layers": 3, "tensor_split": [3, 1]},
        {"n_gpu_layers": -1},
        {"n_gpu_layers": -1, "tensor_split": [1, 2], "flash_attn": False},
        {"n_gpu_layers": -1, "vision_device": "cpu", "n_batch": 32},
        {"n_gpu_layers": 4, "offload_kqv": False},
        {"n_gpu_layers": 2, "main_gpu": 1, "vision_device": "RPC0"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "n_ctx"), [("demo", 4096), ("demo", 512), ("gqa", 512)])
def test_the_plan_is_what_is_allocated(
    workers: tuple[str, str], tiny_files: Files, name: str, n_ctx: int, settings: dict[str, Any]
) -> None:
    path = DEMO if name == "demo" else tiny_files(name).one
    settings = {"n_batch": 128, "n_threads": 1, **settings}
    (setting,) = make_plan(path, rpc_servers=workers, n_ctx=n_ctx, **settings).settings
    with Mllama(path, rpc_servers=workers, n_ctx=n_ctx, **settings) as model:
        h = model.hparams
        image = model.encode_image(noisy_image(1, 100, 100 * h.max_tiles))
        model._conversation.session.feed(
            [h.image_token_id, *[1] * (n_ctx - 1)], [model._conversation.encode(image)]
        )
        real = model.memory().devices
    assert [d.device for d in real] == [d.device for d in setting.devices]
    assert len(real) > 1
    for planned, found in zip(setting.devices, real, strict=True):
        assert [getattr(found, part) for part in PARTS] == [getattr(planned, part) for part in PARTS]
        assert found.cross_kv == pytest.approx(planned.cross_kv * image.n_tiles / h.max_tiles, rel=0.03)
        # Of a small model these are small: within 3 % and 64 KiB, not MiB.
        assert found.compute == pytest.approx(planned.compute, rel=0.03, abs=64 * 1024)
        assert found.vision == pytest.approx(planned.vision, rel=0.03, abs=64 * 1024)


def test_auto_is_the_plan_s_best(workers: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_plan(DEMO, rpc_servers=workers, n_ctx=2048)
    assert [s.n_gpu_layers for s in whole.settings] == list(range(whole.n_layer + 2))
    assert whole.best == whole.n_layer + 1
    peaks = [max(d.peak for d in s.devices if d.device != "CPU") for s in whole.settings[1:]]
    budget = peaks[2]
    plan = make_plan(DEMO, rpc_servers=workers, n_ctx=2048, budget=[budget, budget])
    assert plan.best is not None and 3 <= plan.best < plan.n_layer + 1
    monkeypatch.setattr(
        "mllama_gguf.backend.opening.device_limits",
        lambda devices, settings: device_limits(devices, settings, [budget, budget]),
    )
    with Mllama(DEMO, rpc_servers=workers, n_ctx=2048, n_gpu_layers="auto") as model:
        assert model.n_gpu_layers == plan.best
        for device in model.memory().devices[1:]:
            assert 0 < device.peak <= budget


# A worker that may take 64 MiB more than it has when it begins.
LITTLE = """
import resource, sys
from mllama_gguf.backend.local import devices
from mllama_gguf.backend.rpc import serve
devices()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), -1))
serve("127.0.0.1", int(sys.argv[1]))
"""


def test_auto_steps_down_on_a_worker_with_little_memory(
    make_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLLAMA_CPU_KERNEL", "off")  # as the worker encodes
    # It says that it has all of the machine's memory, but is refused more than this.
    worker = make_worker("-c", LITTLE)
    with (
        Mllama(DEMO, n_ctx=65536, n_batch=64, n_threads=1) as here,
        Mllama(
            DEMO, n_ctx=65536, n_batch=64, n_threads=1, n_gpu_layers="auto", rpc_servers=worker.name
        ) as auto,
    ):
        assert 0 < auto.n_gpu_layers < auto.hparams.n_layer + 1
        assert auto.memory().devices[1].self_kv > 0
        assert auto.caption(noisy_image(1), max_tokens=8) == here.caption(noisy_image(1), max_tokens=8)


def test_commands(workers: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    rpc = ["--rpc", ",".join(workers)]
    assert run(["plan", "demo", *rpc, "--json", "-c", "512"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["best"] == len(plan["settings"]) - 1 > 1
    assert run(["plan", "demo", *rpc, "-ngl", "2", "-c", "512"]) == 0
    assert "The largest that fits: -ngl 2" in capsys.readouterr().out
