"""Conversations that compute together on workers: each as alone, and each with an end of its own."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from golden_cases import cases, position_errors
from helpers import TinyFiles, noisy_image
from together import TOLERANCE, Runner, run_together

from mllama_gguf import BackendError, LoadedModel
from mllama_gguf.backend.plan import make_plan
from mllama_gguf.store.resolve import BUNDLED

Files = Callable[[str], TinyFiles]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gqa", {"n_gpu_layers": 3, "tensor_split": [3, 1]}),
        ("wide", {"n_gpu_layers": -1, "tensor_split": [1, 2]}),
        ("threetiles", {"n_gpu_layers": 2, "offload_kqv": False}),
        ("gqa", {"n_gpu_layers": -1, "flash_attn": False}),
    ],
    ids=str,
)
def test_every_mix_computes_what_each_computes_alone(
    workers: tuple[str, str], tiny_files: Files, name: str, settings: dict[str, Any]
) -> None:
    runner = Runner(tiny_files(name), rpc_servers=workers, n_threads=1, **settings)
    choice = random.Random(name)
    prompts = [choice.choice(cases(runner.arch)) for _ in range(6)]
    for one in run_together(runner, prompts, 1, 3):
        expected, greedy = runner.alone(one.case, 3)
        errors = position_errors(np.concatenate(one.rows), expected)
        assert errors.max() <= TOLERANCE, f"{one.case.name}: {errors.max():.1e}"
        assert one.greedy == greedy
    runner.close()


def test_the_plan_of_several_conversations(workers: tuple[str, str]) -> None:
    settings: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_threads": 1, "n_gpu_layers": 3}
    path = BUNDLED["demo"]
    (setting,) = make_plan(path, parallel=3, rpc_servers=workers, **settings).settings
    with LoadedModel(path, rpc_servers=workers, image_cache=False, **settings) as model:
        h, scheduler = model.hparams, model.scheduler()
        talks = [model.conversation(scheduler=scheduler) for _ in range(3)]
        for i, talk in enumerate(talks):
            image = talk.encode_image(noisy_image(i, 100, 100 * h.max_tiles))
            talk.session.feed([h.image_token_id, *[1] * 511], [talk.encode(image)])
        real = scheduler.memory().devices
    assert [one.device for one in real] == [one.device for one in setting.devices]
    for planned, found in zip(setting.devices, real, strict=True):
        assert (found.self_kv, found.weights) == (planned.self_kv, planned.weights)
        assert found.cross_kv == pytest.approx(planned.cross_kv * image.n_tiles / h.max_tiles, rel=0.03)


def test_a_killed_worker_ends_all_replies_and_a_new_one_serves_them(make_worker: Callable[..., Any]) -> None:
    worker = make_worker()
    images = [noisy_image(i, 40, 40) for i in range(3)]
    with LoadedModel.from_pretrained(
        "demo", image_cache=False, n_threads=1, n_gpu_layers=-1, rpc_servers=worker.name
    ) as model:
        scheduler = model.scheduler()
        talks = [model.conversation(scheduler=scheduler) for _ in images]
        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda one, image: one.caption(image), talks, images))
            replies = [one.reply(image=image) for one, image in zip(talks, images, strict=True)]
            for reply in replies:
                next(reply)
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait()

            def read(reply: Any) -> type[BaseException]:
                with pytest.raises(BackendError) as found:
                    reply.read()
                return found.type

            assert list(pool.map(read, replies)) == [BackendError] * 3
            worker.start()
            assert list(pool.map(lambda one, image: one.caption(image), talks, images)) == texts
