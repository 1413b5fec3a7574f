"""How a prompt and a reply to it are written: the options of `reply`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..checks import Switch, Whole, checked
from ..errors import RequestError
from ..text.grammar import grammar_of
from ..text.sampling import SamplingOptions
from ..text.stream import stop_list
from ..text.tools import Tools, read_tools
from ..vision.embedding import ImageInput, LimitedImage
from ..words import brief

_SAMPLING = {one.name: one.default for one in fields(SamplingOptions) if one.name != "grammar"}
# What callers may name, and its default.
DEFAULTS: Mapping[str, Any] = {
    "max_tokens": None,
    **_SAMPLING,
    "stop": None,
    "response_format": None,
    "grammar": None,
    "tools": None,
    "tool_choice": None,
    "parallel_tool_calls": None,
    "continue_final_message": None,
    "chat_template_kwargs": None,
    "max_tiles": None,
}


@dataclass(frozen=True)
class PromptOptions:
    """tools:          that the assistant may call
    continue_final: whether the reply continues the last message; None: if that is the assistant's
    variables:      for the chat template
    max_tiles:      most tiles of an image; None: as the model's setting says"""

    tools: Tools = field(default_factory=Tools)
    continue_final: bool | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    max_tiles: int | None = None

    def limited(self, image: Any, detail: str) -> ImageInput:
        """An image of a message with its limit, if it has one. detail: "low": one tile"""
        most = 1 if detail == "low" else self.max_tiles
        return image if most is None else LimitedImage(image, most)


@dataclass(frozen=True)
class ReplyOptions:
    """max_tokens: most tokens of the reply; None: until n_ctx is full
    sampling:   how the next token is chosen
    stops:      strings that end the reply and are not shown
    prompt:     how the prompt is written"""

    max_tokens: int | None
    sampling: SamplingOptions
    stops: tuple[str, ...]
    prompt: PromptOptions = field(default_factory=PromptOptions)

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
        tools = read_tools(given["tools"], given["tool_choice"], given["parallel_tool_calls"])
        grammar = grammar_of(given["response_format"], given["grammar"])
        if tools.required and grammar is not None:
            raise RequestError("tool_choice excludes response_format and grammar, if a tool must be called")
        sampling = SamplingOptions(
            **{name: given[name] for name in _SAMPLING}, grammar=tools.grammar() or grammar
        )
        prompt = PromptOptions(
            tools,
            checked("continue_final_message", Switch(), given["continue_final_message"], or_none=True),
            _variables(given["chat_template_kwargs"]),
            checked("max_tiles", Whole(1), given["max_tiles"], or_none=True),
        )
        return cls(max_tokens, sampling, stop_list(given["stop"]), prompt)

    def choice(self, index: int) -> ReplyOptions:
        """The options of the reply of that index, of several to one prompt: each has a seed of its own."""
        if index == 0 or self.sampling.seed is None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=self.sampling.seed + index))


def _variables(given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RequestError(f"chat_template_kwargs must be a dict of names and values, not {brief(given)}")
    return dict(given)
