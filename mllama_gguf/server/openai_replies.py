"""Answers of OpenAI's API for chats and completions. Plain functions: no server, no model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ..decode.completions import timings, usage
from ..decode.writer import Stats
from ..text.logprobs import TokenLogprob
from .catalog import Card
from .jobs import Done, Ended, Event, Piece
from .problems import Refused
from .replies import openai_error, to_bytes

PING = b": keep-alive\n\n"
END = b"data: [DONE]\n\n"


def sse(value: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + to_bytes(value) + b"\n\n"


class CompletionWriter:
    """Writes replies of /v1/chat/completions or /v1/completions."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, model: str, kind: Literal["chat", "text"], *, usage: bool) -> None:
        """usage: a stream ends with a chunk that tells it."""
        self._kind = kind
        self._usage = usage
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
            return (*self._begin(event.choice), self._chunk(event.choice, event.text, event.logprobs))
        if isinstance(event, Ended):
            self._stats.append(event.stats)
            return (*self._begin(event.choice), self._last(event))
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

    def _chunk(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        inside = {"content": text} if self._kind == "chat" else text
        return self._line(self._choice(choice, inside, logprobs), None)

    def _last(self, event: Ended) -> bytes:
        inside: Any = {} if self._kind == "chat" else ""
        return self._line(self._choice(event.choice, inside, (), event.stats.finish_reason), None)

    def _told(self) -> Iterable[bytes]:
        if not self._usage:
            return ()
        return (self._line(None, together(self._stats)),)

    def _choice(
        self, choice: int, inside: Any, logprobs: Sequence[TokenLogprob] = (), finish: str | None = None
    ) -> dict[str, Any]:
        key = "delta" if self._kind == "chat" else "text"
        return {"index": choice, key: inside, "logprobs": shown(logprobs), "finish_reason": finish}

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
                text = "".join(texts)
                inside: dict[str, Any] = {"text": text}
                if self._kind == "chat":
                    inside = {"message": {"role": "assistant", "content": text, "refusal": None}}
                end = {"logprobs": shown(logprobs), "finish_reason": event.stats.finish_reason}
                choices.append({"index": event.choice, **inside, **end})
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


def shown(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """In OpenAI's shape."""
    return {"content": [one.as_dict() for one in logprobs], "refusal": None} if logprobs else None


def together(stats: Sequence[Stats]) -> Stats:
    """What several replies to one prompt took; the prompt counts once."""
    first = stats[0]
    return Stats(
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens,
        completion_tokens=sum(one.completion_tokens for one in stats),
        seconds={name: sum(one.seconds[name] for one in stats) for name in first.seconds},
    )


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
