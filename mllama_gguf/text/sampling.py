"""From logits to the next token, by llama.cpp's samplers."""

from __future__ import annotations

import ctypes
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checks import AnyWhole, Check, Number, Switch, Whole, checked
from ..errors import RequestError
from ..handles import OneProcess, finalize
from ..words import brief
from .constraint import CANDIDATE
from .grammar import Grammar
from .vocab import Vocab

REPEAT_WINDOW = 64  # tokens that repeat_penalty looks back on, as in llama.cpp
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20

# The samplers in the order in which they work, unless options say otherwise; and in Ollama's.
SAMPLERS = ("top_k", "top_p", "min_p", "temperature")
OLLAMA_SAMPLERS = ("top_k", "temperature", "top_p", "min_p")

_CHECKS: Mapping[str, Check] = {
    "temperature": Number(0, 100),
    "top_k": Whole(0),
    "top_p": Number(0, 1),
    "min_p": Number(0, 1),
    "repeat_penalty": Number(0.01, 100),
    "presence_penalty": Number(-2, 2),
    "frequency_penalty": Number(-2, 2),
    "logprobs": Switch(),
    "top_logprobs": Whole(0, MAX_TOP_LOGPROBS),
}
_BIAS = Number(-100, 100)


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. The names and their meaning are llama.cpp's, or OpenAI's.

    temperature:    0: always the likeliest token (greedy); then top_k, top_p and min_p have no effect
    top_k:          keep the k likeliest; 0: all
    top_p:          keep the likeliest that together have this probability; 1: all
    min_p:          keep those at least this share as likely as the likeliest; 0: all
    repeat_penalty: divides positive logits of the last 64 tokens, those of the prompt too; 1: off
    presence_penalty:  -2 to 2; taken off the logits of tokens that the reply has already
    frequency_penalty: -2 to 2; the same, once for each time that the reply has the token
    logit_bias:     added to logits: -100 to 100 by token id, which may be written as text
    seed:           of the random choice; None: a fresh one
    samplers:       `SAMPLERS` in the order in which they work; `OLLAMA_SAMPLERS` is Ollama's
    logprobs:       keep the probabilities of the reply's tokens
    top_logprobs:   and those of this many likeliest tokens at each place, 20 at most
    grammar:        what the reply must follow, or None

    logit_bias comes first, then the penalties, and then the samplers. Raises RequestError for values out of
    range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int | str, float] | Sequence[tuple[int, float]] = ()
    seed: int | None = None
    samplers: Sequence[str] = SAMPLERS
    logprobs: bool = False
    top_logprobs: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            name: checked(name, check, getattr(self, name)) for name, check in _CHECKS.items()
        }
        plain["logit_bias"] = _biases(self.logit_bias)
        plain["seed"] = checked("seed", AnyWhole(), self.seed, or_none=True)
        plain["samplers"] = _order(self.samplers)
        if plain["top_logprobs"] and not plain["logprobs"]:
            raise RequestError("top_logprobs needs logprobs=True")
        for name, value in plain.items():
            object.__setattr__(self, name, value)


def _order(samplers: Any) -> tuple[str, ...]:
    names = tuple(samplers) if isinstance(samplers, Iterable) and not isinstance(samplers, str) else ()
    if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(SAMPLERS):
        raise RequestError(
            f"samplers must be {', '.join(SAMPLERS)}, each once, in the order in which they work; "
            f"not {brief(samplers)}"
        )
    return names


def _biases(biases: Any) -> tuple[tuple[int, float], ...]:
    """By token id, in ascending order."""
    wrong = RequestError(
        f"logit_bias must be a dict of token ids and numbers from -100 to 100, not {brief(biases)}"
    )
    if biases is None:
        return ()
    if not isinstance(biases, (Mapping, tuple)):
        raise wrong
    plain: dict[int, float] = {}
    try:
        for token, bias in biases.items() if isinstance(biases, Mapping) else biases:
            number = int(token) if isinstance(token, str) and len(token) < 12 else AnyWhole().read(token)
            plain[number] = _BIAS.read(bias)
    except (TypeError, ValueError):
        raise wrong from None
    if len(plain) > MAX_BIASES:
        raise RequestError(f"logit_bias names {len(plain)} tokens; {MAX_BIASES} are allowed")
    return tuple(sorted(plain.items()))


class Sampler(OneProcess):
    """Chooses the tokens of one reply. Not thread-safe."""

    def __init__(
        self, vocab: Vocab, vocab_size: int, options: SamplingOptions, prompt: Sequence[int]
    ) -> None:
        """vocab_size: logits a token; prompt: token ids, which repeat_penalty counts as said already.

        Raises RequestError for a grammar that cannot be used, or a token of logit_bias that the model does
        not have.
        """
        from llama_cpp import llama_cpp as llama

        self._llama = llama
        self._options = options
        self._candidates = np.zeros(vocab_size, CANDIDATE)
        self._ids = np.arange(vocab_size, dtype=np.int32)
        self._array = llama.llama_token_data_array()
        self._matcher = None if options.grammar is None else vocab.constraints.begin(vocab, options.grammar)
        self._said: Counter[int] = Counter()  # tokens of the reply
        biases: dict[int, float] = dict(_biases(options.logit_bias))
        for token in biases:
            if not 0 <= token < vocab_size:
                words = f"the model has {vocab_size} tokens, and none is {brief(token)}"
                raise RequestError(f"logit_bias: {words}")
        self._biased = np.fromiter(biases.keys(), np.intp, len(biases))
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))

        self._is_greedy = options.temperature == 0 and math.isclose(options.repeat_penalty, 1.0)
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        freed = finalize(self, llama.llama_sampler_free, self._chain)
        freed.atexit = False  # a daemon thread may be in there
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
        for name in o.samplers:
            if name == "temperature":
                parts.append(llama.llama_sampler_init_temp(o.temperature))
            elif name == "top_k" and o.top_k:
                parts.append(llama.llama_sampler_init_top_k(o.top_k))
            elif name == "top_p" and o.top_p < 1:
                parts.append(llama.llama_sampler_init_top_p(o.top_p, 1))
            elif name == "min_p" and o.min_p:
                parts.append(llama.llama_sampler_init_min_p(o.min_p, 1))
        seed = o.seed if o.seed is not None else int.from_bytes(os.urandom(4), "little")
        # 2^32 - 1 means "random" to llama.cpp
        return [*parts, llama.llama_sampler_init_dist(seed % 0xFFFFFFFF)]

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose the token that follows.

        logits: float32 [vocab_size]

        Raises RequestError if the grammar leaves no token.
        """
        wanted = self._changed(logits)
        if self._matcher is None and self._is_greedy:
            token = int(wanted.argmax())  # as llama.cpp's greedy sampler: the first of equal ones
        elif self._matcher is None:
            self._candidates["id"] = self._ids
            self._candidates["logit"] = wanted
            token = self._choose(len(wanted))
        else:
            mask = self._matcher.mask()
            if self._is_greedy:
                token = mask.likeliest(wanted)
            else:
                token = self._choose(mask.candidates(wanted, self._candidates))
            self._matcher.accept(token)
        self._llama.llama_sampler_accept(self._chain, token)
        self._said[token] += 1
        return token

    @property
    def finished(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._matcher is not None and self._matcher.finished

    def _changed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits with bias, presence and frequency penalty."""
        o = self._options
        is_penalized = bool(self._said and (o.presence_penalty or o.frequency_penalty))
        if not len(self._biased) and not is_penalized:
            return logits
        changed = logits.copy()
        changed[self._biased] += self._biases
        if is_penalized:
            said = np.fromiter(self._said.keys(), np.intp, len(self._said))
            times = np.fromiter(self._said.values(), np.float32, len(self._said))
            changed[said] -= np.float32(o.presence_penalty) + np.float32(o.frequency_penalty) * times
        return changed

    def _choose(self, n: int) -> int:
        """By llama.cpp's samplers, of the first n candidates."""
        array = self._fill(self._candidates[:n])
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
