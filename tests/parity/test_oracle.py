"""The oracle itself: its visibility rule, its correction, its rounding, and the golden numbers made with
it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from golden_cases import (
    GOLDEN_DIR,
    HALF_IMAGE,
    HALF_TOLERANCES,
    GoldenImage,
    case,
    condense,
    grid_images,
    position_errors,
    relative_error,
)
from oracle import Oracle, visible_images
from reference import Reference
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from mllama_gguf.convert.checkpoint import Checkpoint
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.convert.shape import read_shape, rope_factors
from mllama_gguf.convert.tensors import FloatType

IMAGE = 9


def test_visibility_is_that_of_transformers_processor() -> None:
    """transformers' processor has Meta's rule as spans of tokens, one span for every image."""
    rng = random.Random(0)
    prompts = [[rng.choice([1, 1, IMAGE]) for _ in range(rng.randrange(1, 12))] for _ in range(500)]
    for tokens in prompts:
        seen: list[list[int]] = [[] for _ in tokens]
        for image, (start, end) in enumerate(get_cross_attention_token_mask(tokens, IMAGE)):
            for i in range(start, len(tokens) if end == -1 else end):
                seen[i].append(image)
        assert visible_images(tokens, IMAGE) == seen, tokens


@pytest.fixture(scope="module", params=tiny.ARCHS)
def arch(request: pytest.FixtureRequest) -> tiny.Arch:
    return tiny.ARCHS[request.param]


@pytest.fixture(scope="module")
def checkpoint(arch: tiny.Arch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(arch, tmp_path_factory.mktemp(arch.name) / "hf")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


def test_text_before_the_image_is_as_without_image(arch: tiny.Arch, oracle: Oracle) -> None:
    """What the correction is for: there the cross-attention layers are the identity."""
    prompt = case(arch, "text_before_image")
    n = prompt.tokens.index(arch.image_token)
    images = [oracle.states(p.pixels(arch), p.aspect_ratio_id) for p in prompt.images]
    with_image = oracle.logits(prompt.tokens, images)
    np.testing.assert_allclose(with_image[:n], oracle.logits(prompt.tokens[:n]), rtol=0, atol=2e-5)


def test_goldens_are_what_the_oracle_says(arch: tiny.Arch, oracle: Oracle) -> None:
    with np.load(GOLDEN_DIR / f"model_{arch.name}.npz") as golden:
        for image in grid_images(arch):
            states = oracle.states(image.pixels(arch), image.aspect_ratio_id)
            assert relative_error(states, golden[f"states_{image.aspect_ratio_id}"]) < 2e-6
        prompt = case(arch, "several_turns")
        images = [oracle.states(p.pixels(arch), p.aspect_ratio_id) for p in prompt.images]
        errors = position_errors(
            condense(oracle.logits(prompt.tokens, images)), golden["logits_several_turns"]
        )
        assert errors.max() < 1e-5


@pytest.mark.parametrize("type", HALF_TOLERANCES)
def test_rounded_weights_are_those_of_the_file(
    arch: tiny.Arch, checkpoint: Path, tmp_path: Path, type: FloatType
) -> None:
    """The numpy model on a converted file of the type, all in double precision, agrees with the rounded
    oracle."""
    rounded, prompt = Oracle(checkpoint, type), case(arch, "text_before_image")
    convert(checkpoint, tmp_path / "m.gguf", single_file=True, type=type)
    reference, image = Reference(tmp_path / "m.gguf"), GoldenImage(HALF_IMAGE)
    states = rounded.states(image.pixels(arch), image.aspect_ratio_id)
    same = reference.states(image.pixels(arch), image.aspect_ratio_id, image.n_tiles(arch))
    assert relative_error(same, states) < 2e-6
    images: list[Any] = [rounded.states(p.pixels(arch), p.aspect_ratio_id) for p in prompt.images]
    errors = position_errors(
        reference.logits(prompt.tokens, images).astype(np.float32), rounded.logits(prompt.tokens, images)
    )
    assert errors.max() < 1e-5


def test_rope_factors_are_those_of_transformers(oracle: Oracle, checkpoint: Path) -> None:
    factors = rope_factors(read_shape(Checkpoint(checkpoint)), checkpoint)
    config = oracle.text
    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](config, torch.device("cpu"))
    plain, _ = ROPE_INIT_FUNCTIONS["default"](config, torch.device("cpu"))
    expected = (plain.double() / scaled.double()).numpy()
    np.testing.assert_allclose(np.ones_like(expected) if factors is None else factors, expected, rtol=5e-7)
