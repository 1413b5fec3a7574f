"""From logits to the next token, by llama.cpp's samplers."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from ..handles import OneProcess, finalize
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
    grammar:        GBNF, or None

    Raises RequestError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    grammar: str | None = None

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


def grammar_of(response_format: Mapping[str, Any] | None, grammar: str | None) -> str | None:
    """The GBNF grammar that a reply must follow, or None.

    response_format: None, {"type": "text"}, {"type": "json_object"}, {"type": "json_object", "schema": {...}}
                     or {"type": "json_schema", "json_schema": {"schema": {...}}}
    grammar:         GBNF text

    Raises RequestError for another format, an unusable schema, or both at once.
    """
    if grammar is not None and not (isinstance(grammar, str) and grammar.strip()):
        raise RequestError("grammar must be GBNF text")
    if response_format is None:
        return grammar
    if not isinstance(response_format, Mapping):
        raise RequestError(f"response_format must be a dict, not {type(response_format).__name__}")
    kind = response_format.get("type")
    if kind == "text":
        return grammar
    if grammar is not None:
        raise RequestError("response_format and grammar exclude each other")
    if kind == "json_object":
        schema = response_format.get("schema")
    elif kind == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema")
        if schema is None:
            raise RequestError('response_format "json_schema" needs json_schema.schema')
    else:
        raise RequestError(f'response_format type {kind!r}: expected "text", "json_object" or "json_schema"')

    from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

    if schema is None:
        return str(JSON_GBNF)
    try:
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except Exception as e:  # the converter raises whatever a broken schema leads to
        raise RequestError(
            f"JSON schema cannot be used: {type(e).__name__}: {' '.join(str(e).split())}"
        ) from e


class Sampler(OneProcess):
    """Chooses the tokens of one reply. Not thread-safe."""

    def __init__(
        self, vocab: Vocab, vocab_size: int, options: SamplingOptions, prompt: Sequence[int]
    ) -> None:
        """vocab_size: logits a token; prompt: token ids, which repeat_penalty counts as said already.

        Raises RequestError for a grammar that llama.cpp does not accept; it prints the reason on stderr.
        """
        from llama_cpp import llama_cpp as llama

        self._llama = llama
        self._options = options
        self._candidates = np.zeros(vocab_size, _CANDIDATE)
        self._ids = np.arange(vocab_size, dtype=np.int32)
        self._array = llama.llama_token_data_array()

        self._grammar = None
        if options.grammar is not None:
            with vocab.handle as pointer:
                self._grammar = llama.llama_sampler_init_grammar(
                    pointer, options.grammar.encode("utf-8"), b"root"
                )
            if not self._grammar:
                raise RequestError("the grammar is not valid GBNF")
            finalize(self, llama.llama_sampler_free, self._grammar)
            self._vocab = vocab  # the grammar holds a pointer to it

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
        token = self._choose(logits)
        if self._grammar is not None:
            # Testing one token is cheap, testing all of a large vocabulary is not: do that only if the first
            # choice does not fit.
            if not self._fits(token):
                token = self._choose(logits, grammar_first=True)
            self._llama.llama_sampler_accept(self._grammar, token)
        self._llama.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, logits: npt.NDArray[np.float32], grammar_first: bool = False) -> int:
        candidates = self._candidates
        candidates["id"] = self._ids
        candidates["logit"] = logits
        array = self._fill(candidates)
        if grammar_first:
            self._llama.llama_sampler_apply(self._grammar, ctypes.byref(array))
            if not np.isfinite(candidates["logit"]).any():
                raise RequestError("the grammar allows no token of this vocabulary here")
        self._llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        # The samplers may have put the candidates elsewhere.
        return int(array.data[array.selected].id)

    def _fits(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        array = self._fill(one)
        self._llama.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(one["logit"][0]))

    def _fill(self, candidates: npt.NDArray[Any]) -> Any:
        array: Any = self._array
        array.data = ctypes.cast(candidates.ctypes.data, self._llama.llama_token_data_p)
        array.size = len(candidates)
        array.selected = -1
        array.sorted = False
        return array
