"""How likely the model found the tokens of a reply: the logarithm of the softmax of its logits.

That is before temperature, penalties, bias, samplers and grammar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .vocab import Vocab

_LEAST = -9999.0  # in place of minus infinity, which JSON does not have; OpenAI's number


@dataclass(frozen=True)
class Alternative:
    """A token that could stand at a place of a reply.

    token:   its id
    data:    its bytes, which may be a part of a character
    logprob: natural logarithm of its probability
    """

    token: int
    data: bytes
    logprob: float

    def as_dict(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        text = self.data.decode("utf-8", "replace")
        return {"token": text, "logprob": self.logprob, "bytes": list(self.data)}


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A token of a reply.

    top: the likeliest tokens at its place, the likeliest first
    """

    top: tuple[Alternative, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {**super().as_dict(), "top_logprobs": [one.as_dict() for one in self.top]}


def token_logprob(vocab: Vocab, logits: npt.NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    """What is to be said of a token that was chosen.

    logits: float32 [vocab_size]
    n_top:  how many of the likeliest tokens are named
    """
    exact = logits.astype(np.float64)
    most = exact.max()
    logprobs = exact - (most + np.log(np.exp(exact - most).sum()))

    def about(one: int) -> tuple[int, bytes, float]:
        return one, vocab.piece(one, special=True), max(float(logprobs[one]), _LEAST)

    top: list[int] = []
    if n_top:
        some = np.argpartition(-logits, min(n_top, len(logits)) - 1)[:n_top]
        top = sorted((int(one) for one in some), key=lambda one: (-logits[one], one))
    return TokenLogprob(*about(token), tuple(Alternative(*about(one)) for one in top))
