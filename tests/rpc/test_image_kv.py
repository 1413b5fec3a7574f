"""Images copied from disk into caches on workers: the same answers to the bit, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from golden_cases import case, tiled
from helpers import TinyFiles, noisy_image

from mllama_gguf import BackendError, Mllama
from mllama_gguf.backend.types import Floats

Files = Callable[[str], TinyFiles]


@pytest.fixture(autouse=True)
def folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the cache, for ggml's operations: workers know no others."""
    monkeypatch.setenv("MLLAMA_CPU_KERNEL", "off")
    return folder


def logits(prompt: Any, arch: tiny.Arch, *paths: Path, **settings: Any) -> tuple[Floats, int, list[Any]]:
    """The logits, how many images were encoded, and what slots were filled from, of a new process."""
    encoded, filled = 0, []

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal encoded
        encoded += phase == "encode" and done == total

    with Mllama(*paths, n_ctx=512, n_threads=1, progress=progress, **settings) as model:
        fill = model._conversation.context.image_fill

        def image_fill(states: Any) -> int:
            filled.extend(states)
            return fill(states)

        model._conversation.context.image_fill = image_fill  # type: ignore[method-assign]
        images = [tiled(arch, p) for p in prompt.images]
        return model.logits(prompt.tokens, images), encoded, filled


@pytest.mark.parametrize("offload_kqv", [True, False])
@pytest.mark.parametrize("arch", ["gqa", "square", "wide"])
def test_two_workers(workers: tuple[str, str], tiny_files: Files, arch: str, offload_kqv: bool) -> None:
    shape = tiny.ARCHS[arch]
    prompt = case(shape, "adjacent_then_one")
    one = tiny_files(arch).one
    expected, _, _ = logits(prompt, shape, one, image_cache=False)
    for n_gpu_layers in (-1, shape.layers - 1):
        settings: dict[str, Any] = {"offload_kqv": offload_kqv, "n_gpu_layers": n_gpu_layers}
        settings |= {"rpc_servers": workers, "tensor_split": (1, 1), "vision_device": "cpu"}
        answer, _, filled = logits(prompt, shape, one, **settings)
        assert np.array_equal(answer, expected)
        assert not any(isinstance(states, int) for states in filled)
        answer, encoded, filled = logits(prompt, shape, one, **settings)
        assert np.array_equal(answer, expected)
        assert encoded == 0
        # In memory, an image alone stays in its file.
        copied = prompt.images if offload_kqv else prompt.images[:-1]
        assert filled == [p.n_tiles(shape) for p in copied]


def test_another_worker_is_another_key(workers: tuple[str, str], tiny_files: Files, folder: Path) -> None:
    for n, worker in enumerate((*workers, workers[0]), 1):
        with Mllama(tiny_files("gqa").one, rpc_servers=[worker], n_gpu_layers=-1, n_threads=1) as model:
            model.caption(noisy_image(1), max_tokens=2)
        for kind in ("states", "image_kv"):
            assert len(list(folder.glob(f"*.{kind}"))) == min(n, 2)


@pytest.mark.parametrize("call", ["image_set", "image_get"])
def test_a_worker_dies_while_an_image_is_copied(
    call: str, make_worker: Callable[..., Any], tiny_files: Files, folder: Path
) -> None:
    worker = make_worker()
    settings: dict[str, Any] = {"rpc_servers": [worker.name], "n_gpu_layers": -1, "n_threads": 1}
    with Mllama(tiny_files("gqa").one, **settings) as model:
        expected = model.caption(noisy_image(1), max_tokens=9)
    if call == "image_get":
        (path,) = folder.glob("*.image_kv")
        path.unlink()
    with Mllama(tiny_files("gqa").one, **settings) as model:
        original = getattr(model._conversation.context, call)

        def strike(*args: Any) -> Any:
            worker.kill()
            return original(*args)

        setattr(model._conversation.context, call, strike)
        with pytest.raises(BackendError, match=worker.name):
            model.caption(noisy_image(1), max_tokens=9)
        delattr(model._conversation.context, call)
        worker.start()
        assert model.caption(noisy_image(1), max_tokens=9) == expected
    assert len(list(folder.glob("*.image_kv"))) == 1
    assert not list(folder.glob(".*"))


def test_a_prefix_on_workers(workers: tuple[str, str], tiny_files: Files, folder: Path) -> None:
    settings: dict[str, Any] = {
        "rpc_servers": workers,
        "tensor_split": (1, 1),
        "n_gpu_layers": -1,
        "n_threads": 1,
    }
    found = []
    for settings["image_cache"] in (False, True, True):
        with Mllama(tiny_files("gqa").one, **settings) as model:
            content = [{"type": "image", "image": noisy_image(1)}, {"type": "text", "text": "the"}]
            reply = model.create_chat_completion([{"role": "user", "content": content}], max_tokens=9)
            cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            found.append((cached > 0, reply["choices"][0]["message"]["content"]))
    assert found == [(n == 2, found[0][1]) for n in range(3)]
    assert len(list(folder.glob("*.prefix_kv"))) == 1
