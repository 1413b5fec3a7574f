"""The runtime against numbers that the oracle computed (scripts/make_golden.py): exactness without torch.

Pixels, prompts and weights are made anew from the name of an architecture, converted with our own converter
and run with F32 weights and caches, on every tile grid and prompt of golden_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from golden_cases import (
    F16_CACHE_TOLERANCE,
    GOLDEN_DIR,
    HALF_CASES,
    HALF_IMAGE,
    HALF_TOLERANCES,
    N_GREEDY,
    PROMPTS,
    STATES_TOLERANCE,
    Case,
    GoldenImage,
    case,
    condense,
    grid_images,
    position_errors,
    relative_error,
    tiled,
    tolerances,
)

from mllama_gguf import ImageEmbedding, Mllama, TiledImage
from mllama_gguf.convert.huggingface import convert

Open = Callable[..., Mllama]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.make_checkpoint(arch, folder / name) for name, arch in tiny.ARCHS.items()}


@pytest.fixture(scope="module")
def open_model(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Mllama]]:
    """Convert an architecture and open it, once for every combination of options."""
    folder = tmp_path_factory.mktemp("models")
    models: dict[tuple[Any, ...], Mllama] = {}

    def opened(name: str, type: Any = "f32", **options: Any) -> Mllama:
        key = (name, type, *sorted(options.items()))
        if key not in models:
            text, vision = folder / f"{name}.{type}.gguf", folder / f"{name}.{type}.mmproj.gguf"
            if not text.exists():
                convert(checkpoints[name], text, mmproj=vision, type=type)
            exact = {"type_k": "f32", "type_v": "f32", "n_ctx": 512, "n_threads": 1}
            models[key] = Mllama(text, vision, **{**exact, **options})
        return models[key]

    yield opened
    for model in models.values():
        model.close()


@pytest.fixture(scope="module", params=tiny.ARCHS)
def arch(request: pytest.FixtureRequest) -> tiny.Arch:
    return tiny.ARCHS[request.param]


@pytest.fixture(scope="module")
def golden(arch: tiny.Arch) -> Iterator[Any]:
    with np.load(GOLDEN_DIR / f"model_{arch.name}.npz") as numbers:
        yield numbers


def logits(
    model: Mllama, arch: tiny.Arch, prompt: Case, extra: list[int] | None = None
) -> npt.NDArray[np.float32]:
    images = [tiled(arch, image) for image in prompt.images]
    return model.logits([*prompt.tokens, *(extra or [])], images)


def test_states(open_model: Open, arch: tiny.Arch, golden: Any) -> None:
    for image in grid_images(arch):
        embedding = open_model(arch.name).encode_image(tiled(arch, image))
        expected = golden[f"states_{image.aspect_ratio_id}"]
        assert embedding.states.shape == expected.shape
        assert embedding.states.dtype == np.float32
        assert relative_error(embedding.states, expected) <= STATES_TOLERANCE, image


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(open_model: Open, arch: tiny.Arch, golden: Any, name: str) -> None:
    prompt = case(arch, name)
    actual = logits(open_model(arch.name), arch, prompt)
    assert actual.shape == (len(prompt.tokens), arch.vocab_size)
    errors = position_errors(condense(actual), golden[f"logits_{name}"])
    assert (errors <= tolerances(len(errors))).all(), f"largest {errors.max():.1e} at {errors.argmax()}"


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy(open_model: Open, arch: tiny.Arch, golden: Any, name: str) -> None:
    """Each of the 32 tokens is the most likely after those before it: computed at once, that is the same."""
    prompt = case(arch, name)
    expected = golden[f"greedy_{name}"].tolist()
    actual = logits(open_model(arch.name), arch, prompt, expected[:-1])
    assert actual[len(prompt.tokens) - 1 :].argmax(axis=1).tolist() == expected
    assert len(expected) == N_GREEDY


@pytest.mark.parametrize("n_batch", [1, 7, 64])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_batches_and_kinds_of_attention(
    open_model: Open, arch: tiny.Arch, golden: Any, n_batch: int, flash_attn: bool
) -> None:
    """A prompt in pieces of any size, with flash attention and without: always the same numbers."""
    model = open_model(arch.name, n_batch=n_batch, flash_attn=flash_attn)
    for name in ("three_images", "adjacent_then_one", "several_turns"):
        errors = position_errors(condense(logits(model, arch, case(arch, name))), golden[f"logits_{name}"])
        assert (errors <= tolerances(len(errors))).all(), f"{name}: {errors.max():.1e} at {errors.argmax()}"


def test_embeddings_stand_for_images(open_model: Open, arch: tiny.Arch, golden: Any) -> None:
    model, prompt = open_model(arch.name), case(arch, "adjacent_then_one")
    tiles = [tiled(arch, p) for p in prompt.images]
    embeddings = [model.encode_image(p) for p in tiles]
    copies = [ImageEmbedding(e.states.copy(), e.aspect_ratio_id) for e in embeddings]
    mixed: list[TiledImage | ImageEmbedding] = [tiles[0], *embeddings[1:]]
    for images in (embeddings, copies, mixed):
        errors = position_errors(
            condense(model.logits(prompt.tokens, images)), golden[f"logits_{prompt.name}"]
        )
        assert (errors <= tolerances(len(errors))).all()


@pytest.mark.parametrize("flash_attn", [True, False])
def test_f16_caches(open_model: Open, arch: tiny.Arch, golden: Any, flash_attn: bool) -> None:
    model = open_model(arch.name, type_k="f16", type_v="f16", flash_attn=flash_attn)
    for name in PROMPTS:
        actual = condense(logits(model, arch, case(arch, name)))
        assert position_errors(actual, golden[f"logits_{name}"]).max() <= F16_CACHE_TOLERANCE, name


@pytest.mark.parametrize("type", HALF_TOLERANCES)
def test_half_weights(open_model: Open, arch: tiny.Arch, golden: Any, type: Any) -> None:
    """Against the oracle with equally rounded weights; golden_cases.py says where the bounds come from."""
    model = open_model(arch.name, type)
    states_tolerance, logits_tolerance = HALF_TOLERANCES[type]
    states = model.encode_image(tiled(arch, GoldenImage(HALF_IMAGE))).states
    assert relative_error(states, golden[f"states_{type}"]) <= states_tolerance
    for name in HALF_CASES:
        errors = position_errors(
            condense(logits(model, arch, case(arch, name))), golden[f"logits_{type}_{name}"]
        )
        assert errors.max() <= logits_tolerance, name


def test_one_file_gives_the_same_as_two(
    open_model: Open, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    arch = tiny.ARCHS["gqa"]
    convert(checkpoints["gqa"], tmp_path / "one.gguf", single_file=True, type="f32")
    prompt = case(arch, "two_images")
    two = logits(open_model("gqa"), arch, prompt)
    with Mllama(tmp_path / "one.gguf", type_k="f32", type_v="f32", n_ctx=512, n_threads=1) as model:
        np.testing.assert_array_equal(logits(model, arch, prompt), two)
