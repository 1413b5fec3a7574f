"""What a model brings along for its replies: used where the caller says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..words import brief


@dataclass(frozen=True)
class Defaults:
    """What an Ollama model's manifest says about replies. Of other models nothing.

    options:  by the names of `Mllama.create_chat_completion`: temperature, top_k, top_p, min_p, seed, stop,
              max_tokens. An option of a call goes before one of these
    system:   the system message of conversations that begin with none; "": none
    messages: the beginning of every conversation, in the shape that `create_chat_completion` takes
    llama_template: the model is prompted as Llama 3.2 was trained, whatever chat template its file has
    notes:    what of the model has no effect, a line each
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    llama_template: bool = False
    notes: tuple[str, ...] = ()

    def in_words(self) -> str:
        """What there is, in one line; "" if there is nothing."""
        words = [f"{name} {brief(value)}" for name, value in self.options.items()]
        words += ["a system message"] if self.system else []
        words += [f"{len(self.messages)} first messages"] if self.messages else []
        return ", ".join(words)

    def precede(self, messages: Any) -> Any:
        """A caller's messages with what goes before them: the system message, then the model's own messages.

        The caller's own system message at the beginning replaces the model's. An empty one stands for no
        system message.
        """
        if not (self.system or self.messages) or not _is_conversation(messages):
            return messages
        first, rest = list(messages[:1]), list(messages[1:])
        if str(first[0].get("role", "")).lower() not in ("system", "developer"):
            rest, first = [*first, *rest], []
            if self.system:
                first = [{"role": "system", "content": self.system}]
        elif self.system and first[0].get("content") == "":
            first = []
        return [*first, *self.messages, *rest]


def _is_conversation(messages: Any) -> bool:
    """Whether this may be a list of messages. If not, the chat template refuses it with its own words."""
    return (
        isinstance(messages, Sequence)
        and not isinstance(messages, (str, bytes))
        and len(messages) > 0
        and isinstance(messages[0], Mapping)
    )
