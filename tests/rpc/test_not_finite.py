"""Results of workers that are not finite: found as those of this machine are, and the model stays usable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from damage import INF, NAN, damaged
from golden_cases import case, tiled
from helpers import TinyFiles

from mllama_gguf import Mllama, ModelError

Files = Callable[[str], TinyFiles]
ARCH = tiny.ARCHS["gqa"]
PROMPT = case(ARCH, "text_before_image")


def complete(model: Mllama, tokens: tuple[int, ...] = PROMPT.tokens) -> object:
    """The logits of a prompt with an image."""
    images = [model._conversation.encode(tiled(ARCH, image)) for image in PROMPT.images]
    return model._conversation.session.feed(tokens, images)[0]


@pytest.mark.parametrize("n_gpu_layers", [3, -1])
@pytest.mark.parametrize(
    ("tensor", "value", "row", "phase"),
    [
        ("v.blk.2.attn_q.weight", NAN, 0, "encoding the image"),
        ("blk.3.cross_attn_k_norm.weight", NAN, 0, "filling the cross-attention cache"),
        ("blk.3.cross_attn_v_proj.weight", 1e38, 3, "filling the cross-attention cache"),
        ("blk.4.attn_norm.weight", NAN, 0, "the prompt"),
        ("output.weight", INF, 5, "the prompt"),
    ],
)
def test_one_error(
    tiny_files: Files,
    workers: tuple[str, str],
    tmp_path: Path,
    tensor: str,
    value: float,
    row: int,
    phase: str,
    n_gpu_layers: int,
) -> None:
    path = damaged(tiny_files("gqa").one, tmp_path / "broken.gguf", tensor, value, row=row)
    with Mllama(path, rpc_servers=workers[:1], n_gpu_layers=n_gpu_layers, n_ctx=256) as model:
        for _ in range(2):
            with pytest.raises(ModelError, match=f"the results of {phase} are not finite"):
                complete(model)
        if phase != "the prompt":
            assert len(model._conversation.session.feed([1, 2, 3])[0]) == 1


def test_the_workers_caches_are_cleared(tiny_files: Files, workers: tuple[str, str], tmp_path: Path) -> None:
    """What a failure leaves in the caches of several devices does not reach the next prompt."""
    bad = next(token for token in range(300) if token not in PROMPT.tokens)
    path = damaged(tiny_files("gqa").one, tmp_path / "token.gguf", "token_embd.weight", NAN, row=bad)
    with Mllama(path, rpc_servers=workers, n_gpu_layers=4, n_ctx=256) as model:
        expected = complete(model)
        model.reset()
        with pytest.raises(ModelError, match="the prompt"):
            complete(model, (PROMPT.tokens[0], bad, *PROMPT.tokens[2:]))
        assert np.array_equal(complete(model), expected)
