"""The runtime against the oracle, on other weights, images and prompts than the golden numbers.

The golden numbers (tests/test_golden.py) hold the same comparison for fixed inputs and some columns of the
logits; here all columns count, and the seed is another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from golden_cases import (
    F16_CACHE_TOLERANCE,
    HALF_TOLERANCES,
    N_GREEDY,
    PROMPTS,
    STATES_TOLERANCE,
    Case,
    GoldenImage,
    case,
    position_errors,
    relative_error,
    tiled,
    tolerances,
)
from oracle import Oracle

from mllama_gguf import Mllama
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.convert.tensors import FloatType

SEED = 1
EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "n_ctx": 512, "n_threads": 1}


@dataclass
class Pair:
    """One architecture, both ways."""

    arch: tiny.Arch
    checkpoint: Path
    oracle: Oracle
    text: Path
    vision: Path
    model: Mllama
    known: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def expected(self, name: str) -> npt.NDArray[np.float32]:
        """The oracle's logits of a prompt, computed once."""
        if name not in self.known:
            self.known[name] = oracle_logits(self.oracle, self.arch, case(self.arch, name))
        return self.known[name]


@pytest.fixture(scope="module", params=tiny.ARCHS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    arch = tiny.ARCHS[request.param]
    folder = tmp_path_factory.mktemp(arch.name)
    checkpoint = tiny.make_checkpoint(arch, folder / "hf", seed=SEED)
    text, vision = convert(checkpoint, folder / "text.gguf", type="f32")
    with Mllama(text, vision, **EXACT) as model:
        yield Pair(arch, checkpoint, Oracle(checkpoint), text, vision, model)


def oracle_logits(oracle: Oracle, arch: tiny.Arch, prompt: Case) -> npt.NDArray[np.float32]:
    images = [oracle.states(p.pixels(arch), p.aspect_ratio_id) for p in prompt.images]
    return oracle.logits(prompt.tokens, images)


def model_logits(model: Mllama, arch: tiny.Arch, prompt: Case) -> npt.NDArray[np.float32]:
    return model.logits(prompt.tokens, [tiled(arch, p) for p in prompt.images])


def test_states_of_every_grid(pair: Pair) -> None:
    for i in range(1, len(pair.arch.grids) + 1):
        image = GoldenImage(i, key=1000 + i)
        states = pair.model.encode_image(tiled(pair.arch, image)).states
        expected = pair.oracle.states(image.pixels(pair.arch), i)
        assert relative_error(states, expected) <= STATES_TOLERANCE, pair.arch.grids[i - 1]


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(pair: Pair, name: str) -> None:
    prompt = case(pair.arch, name)
    errors = position_errors(model_logits(pair.model, pair.arch, prompt), pair.expected(name))
    assert (errors <= tolerances(len(errors))).all(), f"largest {errors.max():.1e} at {errors.argmax()}"


@pytest.mark.parametrize("name", ["text_only", "text_before_image", "adjacent_then_one", "several_turns"])
def test_greedy(pair: Pair, name: str) -> None:
    """32 tokens, each chosen by the runtime itself from its own before."""
    prompt = case(pair.arch, name)
    images = [tiled(pair.arch, p) for p in prompt.images]
    encoded = [pair.model.encode_image(p) for p in images]
    tokens = list(prompt.tokens)
    for _ in range(N_GREEDY):
        tokens.append(int(pair.model.logits(tokens, encoded)[-1].argmax()))
    states = [pair.oracle.states(p.pixels(pair.arch), p.aspect_ratio_id) for p in prompt.images]
    expected, _ = pair.oracle.greedy(prompt.tokens, N_GREEDY, states)
    assert tokens[len(prompt.tokens) :] == expected


@pytest.mark.parametrize("flash_attn", [True, False])
def test_f16_caches(pair: Pair, flash_attn: bool) -> None:
    options: dict[str, Any] = {**EXACT, "type_k": "f16", "type_v": "f16", "flash_attn": flash_attn}
    with Mllama(pair.text, pair.vision, **options) as model:
        for name in PROMPTS:
            prompt = case(pair.arch, name)
            actual, expected = model_logits(model, pair.arch, prompt), pair.expected(name)
            assert position_errors(actual, expected).max() <= F16_CACHE_TOLERANCE, name


@pytest.mark.parametrize("type", HALF_TOLERANCES)
def test_half_weights(pair: Pair, tmp_path: Path, type: FloatType) -> None:
    """Weights rounded to half precision, on both sides alike; golden_cases.py says where the bounds come
    from."""
    states_tolerance, logits_tolerance = HALF_TOLERANCES[type]
    files = convert(pair.checkpoint, tmp_path / "m.gguf", type=type)
    rounded = Oracle(pair.checkpoint, type)
    with Mllama(*files, **EXACT) as model:
        for i in range(1, len(pair.arch.grids) + 1):
            image = GoldenImage(i, key=2000 + i)
            states = model.encode_image(tiled(pair.arch, image)).states
            assert relative_error(states, rounded.states(image.pixels(pair.arch), i)) <= states_tolerance
        for name in PROMPTS:
            prompt = case(pair.arch, name)
            errors = position_errors(
                model_logits(model, pair.arch, prompt), oracle_logits(rounded, pair.arch, prompt)
            )
            assert errors.max() <= logits_tolerance, name
