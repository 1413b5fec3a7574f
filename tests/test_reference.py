"""The converter's files, read by the numpy model, give the golden numbers: so files and numbers are right,
both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from golden_cases import (
    GOLDEN_DIR,
    LONG,
    PROMPTS,
    Case,
    case,
    condense,
    grid_images,
    position_errors,
    relative_error,
)
from reference import Reference

from mllama_gguf.convert.huggingface import convert

# Half the cases: the numpy model is slow, and prompts differ little for it. test_golden.py has the runtime do
# all.
NAMES = ("text_only", "text_before_image", "adjacent_then_one", "over_400_tokens")


@pytest.fixture(scope="module", params=tiny.ARCHS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[tiny.Arch, Reference, Any]]:
    arch = tiny.ARCHS[request.param]
    folder = tmp_path_factory.mktemp(arch.name)
    tiny.make_checkpoint(arch, folder / "hf")
    files = convert(folder / "hf", folder / "text.gguf", type="f32")
    with np.load(GOLDEN_DIR / f"model_{arch.name}.npz") as golden:
        yield arch, Reference(*files), golden


def test_states(model: tuple[tiny.Arch, Reference, Any]) -> None:
    arch, reference, golden = model
    for image in grid_images(arch):
        i = image.aspect_ratio_id
        states = reference.states(image.pixels(arch), i, image.n_tiles(arch))
        assert relative_error(states, golden[f"states_{i}"]) < 2e-6


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(model: tuple[tiny.Arch, Reference, Any], name: str) -> None:
    arch, reference, golden = model
    prompt: Case = case(arch, name)
    images = [reference.states(p.pixels(arch), p.aspect_ratio_id, p.n_tiles(arch)) for p in prompt.images]
    logits = reference.logits(prompt.tokens, images)
    errors = position_errors(condense(logits.astype(np.float32)), golden[f"logits_{name}"])
    assert errors[:LONG].max() < 1e-5
    assert errors.max() < 3e-5
    assert int(logits[-1].argmax()) == golden[f"greedy_{name}"][0]


def test_weights_are_those_of_the_goldens() -> None:
    """A changed generator of weights would make every comparison fail for no visible reason."""
    for name, arch in tiny.ARCHS.items():
        digest = hashlib.sha256()
        for key, values in tiny.make_weights(arch).items():
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(values, dtype="<f4").data)
        with np.load(GOLDEN_DIR / f"model_{name}.npz") as golden:
            assert json.loads(str(golden["about"]))["weights_sha256"] == digest.hexdigest()


def test_goldens_are_small() -> None:
    files: list[Path] = list(GOLDEN_DIR.glob("model_*.npz"))
    assert {f.stem.removeprefix("model_") for f in files} == set(tiny.ARCHS)
    assert sum(f.stat().st_size for f in files) < 4e6
