"""Whether layers compute the same wherever they run: what every n_gpu_layers gives, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .process import PointFailed, run_point

N_VISION = 10
N_TOP = 5
# Rounding of another kernel is less; a seed of a wrong caption is more.
TOLERANCE = 1e-4
COMPUTE = "mllama_gguf.tune.compare:compute"


@dataclass
class Answer:
    """What one n_gpu_layers gives; error: why it gives nothing.

    vision:  the first values of cross_attention_states
    top:     the likeliest next tokens: [text, logit], the likeliest first
    """

    n_gpu_layers: int
    vision: list[float] = field(default_factory=list)
    top: list[tuple[str, float]] = field(default_factory=list)
    caption: str = ""
    error: str = ""

    def differences(self, other: Answer) -> set[str]:
        """What differs from another: "vision 0", "top 3", "caption". Nothing, where one of them failed."""
        if self.error or other.error:
            return set()
        found = {"caption"} if self.caption != other.caption else set()
        for i, (a, b) in enumerate(zip(self.vision, other.vision, strict=True)):
            if abs(a - b) > TOLERANCE * max(1.0, abs(b)):
                found.add(f"vision {i}")
        for i, ((text, a), (text_b, b)) in enumerate(zip(self.top, other.top, strict=True)):
            if text != text_b or abs(a - b) > TOLERANCE * max(1.0, abs(b)):
                found.add(f"top {i}")
        return found


def compute(
    model: str, mmproj: str | None, image: str, prompt: str, max_tokens: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of an `Answer`. For a process of its own."""
    import numpy as np

    from ..model import Mllama

    with Mllama(model, mmproj, image_cache=False, **settings) as opened:  # every row computes for itself
        states = opened.encode_image(image).states
        caption = opened.caption(image, prompt, max_tokens=max_tokens)
        tokens = opened.tokenize("<|image|>" + prompt)
        logits = opened.logits(tokens, [image])[-1]
        best = np.argsort(-logits, kind="stable")[:N_TOP]
        return {
            "vision": [float(value) for value in states.reshape(-1)[:N_VISION]],
            "top": [(opened.detokenize([int(i)], special=True), float(logits[i])) for i in best],
            "caption": caption,
        }


def compare(
    layer_counts: Sequence[int], request: Mapping[str, Any], timeout: float = 1800.0, function: str = COMPUTE
) -> list[Answer]:
    """The answer of each n_gpu_layers, from a process of its own. request: the arguments of `compute`."""
    answers = []
    for n in layer_counts:
        settings = {**request["settings"], "n_gpu_layers": n}
        try:
            fields = run_point(function, {**request, "settings": settings}, timeout)
            answers.append(Answer(n, **fields))
        except PointFailed as e:
            answers.append(Answer(n, error=str(e)))
    return answers
