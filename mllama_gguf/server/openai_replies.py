"""Answers of OpenAI's API for chats and completions. Plain functions: no server, no model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ..decode.completions import shown_calls, shown_logprobs, timings, together, usage
from ..decode.writer import Stats
from ..text.logprobs import TokenLogprob
from ..text.tools import Tools, may_be_call
from .catalog import Card
from .jobs import Done, Ended, Event, Piece
from .problems import Refused
from .replies import openai_error, to_bytes

PING = b": keep-alive\n\n"
END = b"data: [DONE]\n\n"
_NO_TOOLS = Tools()


def sse(value: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + to_bytes(value) + b"\n\n"


class CompletionWriter:
    """Writes replies of /v1/chat/completions or /v1/completions."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(
        self, model: str, kind: Literal["chat", "text"], *, usage: bool, tools: Tools = _NO_TOOLS
    ) -> None:
        """usage: a stream ends with a chunk that tells it; tools: that the reply may call."""
        self._kind = kind
        self._usage = usage
        self._held = Held(tools)
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": "mllama_gguf",
        }
        self._begun: set[int] = set()
        self._stats: list[Stats] = []

    # ---- streams -------------------------------------------------------------------------------------------

    def frames(self, event: Event) -> Iterable[bytes]:
        if isinstance(event, Piece):
            shown = self._held.add(event)
            return (*self._begin(event.choice), *([self._chunk(shown)] if shown else ()))
        if isinstance(event, Ended):
            self._stats.append(event.stats)
            return (*self._begin(event.choice), *self._last(event))
        if isinstance(event, Done):
            return (*self._told(), END)
        return ()

    def ping(self) -> bytes:
        return PING

    def failure(self, problem: Refused) -> bytes:
        return sse(openai_error(problem))

    def _begin(self, choice: int) -> Iterable[bytes]:
        if choice in self._begun or self._kind == "text":
            return ()
        self._begun.add(choice)
        return (self._line(self._choice(choice, {"role": "assistant", "content": ""}), None),)

    def _chunk(self, piece: Piece) -> bytes:
        inside = {"content": piece.text} if self._kind == "chat" else piece.text
        return self._line(self._choice(piece.choice, inside, piece.logprobs), None)

    def _last(self, event: Ended) -> Iterable[bytes]:
        rest, calls = self._held.end(event)
        finish: str | None = event.stats.finish_reason
        if calls:
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            told = self._choice(event.choice, {"tool_calls": numbered}, rest.logprobs if rest else ())
            yield self._line(told, None)
            finish = "tool_calls"
        elif rest:
            yield self._chunk(rest)
        inside: Any = {} if self._kind == "chat" else ""
        yield self._line(self._choice(event.choice, inside, (), finish), None)

    def _told(self) -> Iterable[bytes]:
        if not self._usage:
            return ()
        return (self._line(None, together(self._stats)),)

    def _choice(
        self, choice: int, inside: Any, logprobs: Sequence[TokenLogprob] = (), finish: str | None = None
    ) -> dict[str, Any]:
        key = "delta" if self._kind == "chat" else "text"
        return {"index": choice, key: inside, "logprobs": shown_logprobs(logprobs), "finish_reason": finish}

    def _line(self, choice: dict[str, Any] | None, stats: Stats | None) -> bytes:
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        value: dict[str, Any] = {**self._head, "object": kind, "choices": [] if choice is None else [choice]}
        if self._usage:
            value["usage"] = None if stats is None else usage(stats)
            value |= {} if stats is None else {"timings": timings(stats)}
        return sse(value)

    # ---- whole ---------------------------------------------------------------------------------------------

    def whole(self, events: Iterable[Event]) -> Any:
        choices: list[dict[str, Any]] = []
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        for event in events:
            if isinstance(event, Piece):
                texts.append(event.text)
                logprobs += event.logprobs
            elif isinstance(event, Ended):
                self._stats.append(event.stats)
                choices.append(self._whole_choice("".join(texts), logprobs, event))
                texts, logprobs = [], []
        stats = together(self._stats)
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": choices,
            "usage": usage(stats),
            "timings": timings(stats),
        }

    def _whole_choice(self, text: str, logprobs: Sequence[TokenLogprob], event: Ended) -> dict[str, Any]:
        calls = self._held.calls(text, event)
        end = {
            "logprobs": shown_logprobs(logprobs),
            "finish_reason": "tool_calls" if calls else event.stats.finish_reason,
        }
        if self._kind == "text":
            return {"index": event.choice, "text": text, **end}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": None, "tool_calls": calls}
        return {"index": event.choice, "message": message, **end}


class Held:
    """What of a reply is not shown yet, because it may become a call of a tool."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._pieces: list[Piece] | None = [] if tools.names else None  # None: nothing is held back

    def add(self, piece: Piece) -> Piece | None:
        """What can be shown now."""
        if self._pieces is None:
            return piece
        self._pieces.append(piece)
        whole = _joined(self._pieces)
        if may_be_call(whole.text):
            return None
        self._pieces = None
        return whole

    def end(self, event: Ended) -> tuple[Piece | None, list[dict[str, Any]]]:
        """What was held back, and the calls that it is. The next reply begins."""
        rest = _joined(self._pieces) if self._pieces else None
        self._pieces = [] if self._tools.names else None
        return rest, [] if rest is None else self.calls(rest.text, event)

    def calls(self, text: str, event: Ended) -> list[dict[str, Any]]:
        """The calls that a whole reply consists of, in OpenAI's shape."""
        if not self._tools.names or event.stats.finish_reason != "stop":
            return []
        return shown_calls(text, self._tools)


def _joined(pieces: Sequence[Piece]) -> Piece:
    logprobs = tuple(one for piece in pieces for one in piece.logprobs)
    return Piece("".join(piece.text for piece in pieces), pieces[-1].choice, logprobs)


def model_object(card: Card) -> dict[str, Any]:
    """A line of /v1/models."""
    modalities = ["text", "image"] if card.has_vision else ["text"]
    return {
        "id": card.name,
        "object": "model",
        "created": int(card.modified),
        "owned_by": "library",
        "architecture": {"input_modalities": modalities, "output_modalities": ["text"]},
        "meta": {
            "n_ctx_train": card.context_length,
            "n_embd": card.embedding_length,
            "n_params": card.n_parameters,
            "size": card.size,
        },
    }
