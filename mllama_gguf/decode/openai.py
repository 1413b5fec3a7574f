"""Requests for chat completions as OpenAI's clients write them, checked.

What clients send as a matter of course is taken: values that change nothing are ignored, and a parameter
that is None counts as not given, unless None is a value of it. What cannot be obeyed is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..checks import Switch, Whole, checked
from ..errors import RequestError
from ..words import brief
from .options import DEFAULTS, ReplyOptions

Messages: TypeAlias = Sequence[Mapping[str, Any]]

MAX_REPLIES = 8

# Whatever their values are, they change no reply here. mirostat_tau and mirostat_eta say how mirostat works,
# which is refused.
_IGNORED = frozenset(
    {
        "metadata",
        "mirostat_eta",
        "mirostat_tau",
        "model",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Values with which a parameter changes nothing, and what to do instead of other values.
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "replies are text"),
    "best_of": ((1,), "use n"),
    "echo": ((False,), "put the text before the reply yourself"),
    "function_call": (("none",), "use tool_choice"),
    "functions": (((), []), "use tools"),
    "logits_processor": ((), "use logit_bias or a grammar"),
    "mirostat": ((0,), "use top_p or min_p"),
    "mirostat_mode": ((0,), "use top_p or min_p"),
    "modalities": ((["text"], ("text",)), "replies are text"),
    "prediction": ((), "leave it out"),
    "reasoning_effort": (("none",), "the model does not reason before it replies"),
    "suffix": (("",), "leave it out"),
    "tfs_z": ((1,), "use top_p or min_p"),
    "typical_p": ((1,), "use top_p or min_p"),
    "verbosity": (("medium",), "say it in a message"),
    "web_search_options": ((), "the model reads only the messages"),
}


def plain_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `ReplyOptions`: without the parameters that change nothing. Raises RequestError for a
    parameter of OpenAI's or llama.cpp's that cannot be obeyed."""
    options = {}
    for name, value in parameters.items():
        if name in _IGNORED or (value is None and DEFAULTS.get(name, "") is not None):
            continue
        if name in _NEUTRAL:
            neutral, instead = _NEUTRAL[name]
            if not any(_is_same(value, one) for one in neutral):
                raise RequestError(f"{name}={brief(value)} cannot be obeyed; {instead}")
            continue
        options[name] = value
    if "max_completion_tokens" in options:
        options["max_tokens"] = options.pop("max_completion_tokens")
    return options


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    try:
        return bool(value == other)
    except Exception:  # an array, say
        return False


@dataclass(frozen=True)
class ChatRequest:
    """A request for a chat completion.

    n:             how many replies
    stream:        whether they come as chunks
    include_usage: whether a chunk of its own tells the usage, as OpenAI's clients ask for; None: they did
                   not say
    """

    messages: Messages
    options: ReplyOptions
    n: int = 1
    stream: bool = False
    include_usage: bool | None = None

    @classmethod
    def checked(cls, body: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> ChatRequest:
        """A request.

        body:     "messages", and the parameters that `Mllama.create_chat_completion` lists
        defaults: options by the same names, for those that it does not give

        Raises RequestError. The messages' own shape is checked when the reply begins.
        """
        if not isinstance(body, Mapping) or not all(isinstance(name, str) for name in body):
            raise RequestError(f"a request must be a dict of parameters, not {brief(body)}")
        options = plain_options(body)
        messages = options.pop("messages", None)
        if messages is None:
            raise RequestError("messages is missing")
        n = checked("n", Whole(1, MAX_REPLIES), options.pop("n", 1))
        stream = checked("stream", Switch(), options.pop("stream", False))
        include_usage = _include_usage(options.pop("stream_options", None))
        checked_options = ReplyOptions.checked({**(defaults or {}), **options})
        return cls(messages, checked_options, n, stream, include_usage)


def _include_usage(stream_options: Any) -> bool | None:
    if stream_options is None:
        return None
    if not isinstance(stream_options, Mapping):
        raise RequestError(f"stream_options must be a dict, not {brief(stream_options)}")
    value = stream_options.get("include_usage")
    return bool(checked("stream_options.include_usage", Switch(), False if value is None else value))


def is_known(name: str) -> bool:
    """Whether a parameter of a request means something here: it is obeyed, changes nothing, or is refused by
    name."""
    return name in DEFAULTS or name in _IGNORED or name in _NEUTRAL or name == "max_completion_tokens"
