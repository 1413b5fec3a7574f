"""How a reply is written: the options of `reply`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..checks import Whole, checked
from ..errors import RequestError
from ..text.grammar import grammar_of
from ..text.sampling import SamplingOptions
from ..text.stream import stop_list

_SAMPLING = {field.name: field.default for field in fields(SamplingOptions) if field.name != "grammar"}
# What callers may name, and its default.
DEFAULTS: Mapping[str, Any] = {
    "max_tokens": None,
    **_SAMPLING,
    "stop": None,
    "response_format": None,
    "grammar": None,
}


@dataclass(frozen=True)
class ReplyOptions:
    """max_tokens: most tokens of the reply; None: until n_ctx is full
    sampling:   how the next token is chosen
    stops:      strings that end the reply and are not shown"""

    max_tokens: int | None
    sampling: SamplingOptions
    stops: tuple[str, ...]

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> ReplyOptions:
        """Options by the names that `Mllama.create_chat_completion` lists; those that are not named, or None,
        have their defaults. Raises RequestError."""
        for name in options:
            if name not in DEFAULTS:
                raise RequestError(f"there is no option {name!r}; there are: {', '.join(DEFAULTS)}")
        given = {**DEFAULTS, **{name: value for name, value in options.items() if value is not None}}
        max_tokens = given["max_tokens"]
        if isinstance(max_tokens, int) and max_tokens == -1:  # llama_cpp's way to say None
            max_tokens = None
        max_tokens = checked("max_tokens", Whole(1), max_tokens, or_none=True)
        grammar = grammar_of(given["response_format"], given["grammar"])
        sampling = SamplingOptions(**{name: given[name] for name in _SAMPLING}, grammar=grammar)
        return cls(max_tokens, sampling, stop_list(given["stop"]))

    def choice(self, index: int) -> ReplyOptions:
        """The options of the reply of that index, of several to one prompt: each has a seed of its own."""
        if index == 0 or self.sampling.seed is None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=self.sampling.seed + index))
