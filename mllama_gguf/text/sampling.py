"""From logits to the next token, by llama.cpp's samplers."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from ..handles import OneProcess, finalize
from .grammar import Grammar
from .vocab import Vocab

REPEAT_WINDOW = 64  # tokens that repeat_penalty looks back on, as in llama.cpp

# llama_token_data
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. The names and their meaning are llama.cpp's.

    temperature:    0: always the likeliest token (greedy); then only grammar and repeat_penalty count
    top_k:          keep the k likeliest; 0: all
    top_p:          keep the likeliest that together have this probability; 1: all
    min_p:          keep those at least this share as likely as the likeliest; 0: all
    repeat_penalty: divides positive logits of the last 64 tokens; 1: off
    seed:           of the random choice; None: a fresh one
    grammar:        what the reply must follow, or None

    Raises RequestError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repeat_penalty", 0.01, 100.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise RequestError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise RequestError(f"seed must be a whole number or None, not {self.seed!r}")


class Sampler(OneProcess):
    """Chooses the tokens of one reply. Not thread-safe."""

    def __init__(
        self, vocab: Vocab, vocab_size: int, options: SamplingOptions, prompt: Sequence[int]
    ) -> None:
        """vocab_size: logits a token; prompt: token ids, which repeat_penalty counts as said already.

        Raises RequestError for a grammar that cannot be used.
        """
        from llama_cpp import llama_cpp as llama

        self._llama = llama
        self._options = options
        self._candidates = np.zeros(vocab_size, _CANDIDATE)
        self._ids = np.arange(vocab_size, dtype=np.int32)
        self._array = llama.llama_token_data_array()
        self._matcher = None if options.grammar is None else vocab.constraints.begin(vocab, options.grammar)

        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        finalize(self, llama.llama_sampler_free, self._chain)
        for part in self._parts(vocab_size):
            llama.llama_sampler_chain_add(self._chain, part)
        for token in prompt[-REPEAT_WINDOW:]:
            if token < vocab_size:  # the image token has no logit
                llama.llama_sampler_accept(self._chain, token)

    def _parts(self, vocab_size: int) -> list[Any]:
        o, llama = self._options, self._llama
        parts = []
        if not math.isclose(o.repeat_penalty, 1.0):
            parts.append(
                llama.llama_sampler_init_penalties(vocab_size, REPEAT_WINDOW, o.repeat_penalty, 0.0, 0.0)
            )
        if o.temperature == 0:
            return [*parts, llama.llama_sampler_init_greedy()]
        seed = o.seed if o.seed is not None else int.from_bytes(os.urandom(4), "little")
        parts += [llama.llama_sampler_init_top_k(o.top_k)] if o.top_k else []
        parts += [llama.llama_sampler_init_top_p(o.top_p, 1)] if o.top_p < 1 else []
        parts += [llama.llama_sampler_init_min_p(o.min_p, 1)] if o.min_p else []
        return [
            *parts,
            llama.llama_sampler_init_temp(o.temperature),
            # 2^32 - 1 means "random" to llama.cpp
            llama.llama_sampler_init_dist(seed % 0xFFFFFFFF),
        ]

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose the token that follows.

        logits: float32 [vocab_size]

        Raises RequestError if the grammar leaves no token.
        """
        if self._matcher is None:
            token = self._choose(self._ids, logits)
        else:
            ids = self._matcher.allowed()
            ids = ids[: np.searchsorted(ids, len(logits))]  # the image token has no logit
            token = self._choose(ids, logits[ids])
            self._matcher.accept(token)
        self._llama.llama_sampler_accept(self._chain, token)
        return token

    @property
    def finished(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._matcher is not None and self._matcher.finished

    def _choose(self, ids: npt.NDArray[Any], logits: npt.NDArray[np.float32]) -> int:
        candidates = self._candidates[: len(ids)]
        candidates["id"] = ids
        candidates["logit"] = logits
        array = self._fill(candidates)
        self._llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        # The samplers may have put the candidates elsewhere.
        return int(array.data[array.selected].id)

    def _fill(self, candidates: npt.NDArray[Any]) -> Any:
        array: Any = self._array
        array.data = ctypes.cast(candidates.ctypes.data, self._llama.llama_token_data_p)
        array.size = len(candidates)
        array.selected = -1
        array.sorted = False
        return array
