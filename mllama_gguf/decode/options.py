"""How a reply is written: the options of `reply`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

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
        """Options by the names that `Mllama.create_chat_completion` lists; those that are not named have
        their defaults. Raises RequestError."""
        for name in options:
            if name not in DEFAULTS:
                raise RequestError(f"there is no option {name!r}; there are: {', '.join(DEFAULTS)}")
        given = {**DEFAULTS, **options}
        max_tokens = given["max_tokens"]
        if max_tokens == -1:  # llama_cpp's way to say None
            max_tokens = None
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
        ):
            raise RequestError(
                f"max_tokens must be a whole number of at least 1, or None, not {max_tokens!r}"
            )
        grammar = grammar_of(given["response_format"], given["grammar"])
        sampling = SamplingOptions(**{name: given[name] for name in _SAMPLING}, grammar=grammar)
        return cls(max_tokens, sampling, stop_list(given["stop"]))
