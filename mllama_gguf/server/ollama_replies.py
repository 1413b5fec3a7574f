"""Answers of Ollama's API. Plain functions: no server, no model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .catalog import Card, plain_keys
from .jobs import Done, Ended, Event, Piece
from .models import Shown
from .problems import Refused
from .replies import to_bytes
from .times import expiry, nanoseconds, rfc3339


class OllamaWriter:
    """Writes a reply of /api/chat or /api/generate."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, kind: Literal["chat", "generate"]) -> None:
        """model: as the request spells it."""
        self._model = model
        self._kind = kind
        self._ended: Ended | None = None

    def frames(self, event: Event) -> Iterable[bytes]:
        if isinstance(event, Piece):
            more = {"logprobs": [one.as_dict() for one in event.logprobs]} if event.logprobs else {}
            return (self._line(self._object(event.text, done=False) | more),)
        if isinstance(event, Ended):
            self._ended = event
        elif isinstance(event, Done):
            return (self._line(self._last("", event)),)
        return ()

    def ping(self) -> bytes:
        """A chunk without text: an empty line would end some clients."""
        return self._line(self._object("", done=False))

    def failure(self, problem: Refused) -> bytes:
        return self._line({"error": problem.words})

    def whole(self, events: Iterable[Event]) -> Any:
        pieces = []
        logprobs: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, Piece):
                pieces.append(event.text)
                logprobs += [one.as_dict() for one in event.logprobs]
            elif isinstance(event, Ended):
                self._ended = event
            elif isinstance(event, Done):
                found = self._last("".join(pieces), event)
                return {**found, "logprobs": logprobs} if logprobs else found
        raise AssertionError("a reply without an end")

    def _line(self, value: Mapping[str, Any]) -> bytes:
        return to_bytes(value) + b"\n"

    def _object(self, text: str, *, done: bool) -> dict[str, Any]:
        head = {"model": self._model, "created_at": rfc3339(time.time())}
        if self._kind == "generate":
            return {**head, "response": text, "done": done}
        return {**head, "message": {"role": "assistant", "content": text}, "done": done}

    def _last(self, text: str, done: Done) -> dict[str, Any]:
        ended = self._ended
        if ended is None:
            return {**self._object(text, done=True), "done_reason": "load"}
        stats = ended.stats
        found = {
            **self._object(text, done=True),
            "done_reason": stats.finish_reason or "stop",
            "total_duration": nanoseconds(done.total_seconds),
            "load_duration": nanoseconds(done.load_seconds),
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": nanoseconds(stats.seconds["encode"] + stats.seconds["prompt"]),
            "eval_count": stats.completion_tokens,
            "eval_duration": nanoseconds(stats.seconds["decode"]),
        }
        return {**found, "context": list(ended.context)} if ended.context else found


def loaded(
    model: str, kind: Literal["chat", "generate"], reason: Literal["load", "unload"]
) -> dict[str, Any]:
    """The answer to a request without a prompt."""
    head = {"model": model, "created_at": rfc3339(time.time())}
    inside = {"response": ""} if kind == "generate" else {"message": {"role": "assistant", "content": ""}}
    return {**head, **inside, "done": True, "done_reason": reason}


def running(shown: Shown) -> dict[str, Any]:
    """A line of /api/ps."""
    line = {key: value for key, value in shown.card.tag.items() if key not in ("modified_at", "capabilities")}
    return {
        **line,
        "size": shown.n_bytes,
        "expires_at": expiry(time.time(), shown.seconds_left),
        "size_vram": shown.n_bytes_vram,
        "context_length": shown.context_length,
    }


def description(card: Card, *, verbose: bool) -> dict[str, Any]:
    """The answer of /api/show."""
    model = card.files.ollama
    template = model.template if model is not None else str(card.keys.get("tokenizer.chat_template") or "")
    parameters = _parameters(model.params if model is not None else {})
    system = model.system if model is not None else ""
    licenses = "\n".join(model.licenses) if model is not None else str(card.keys.get("general.license") or "")
    info = {
        **plain_keys(card.keys, whole=verbose),
        "general.architecture": "mllama",
        "general.basename": card.keys.get("general.basename") or card.name.partition(":")[0],
        "general.parameter_count": card.n_parameters,
    }
    if card.has_vision:
        info.setdefault("mllama.vision.block_count", _vision_blocks(card))
    return {
        "license": licenses,
        "modelfile": _modelfile(card.name, template, system, parameters),
        "parameters": parameters,
        "template": template,
        "system": system,
        "details": card.details,
        "messages": [],
        "model_info": info,
        "projector_info": plain_keys(card.projector_keys, whole=verbose),
        "tensors": [
            {"name": tensor.name, "type": tensor.type_name, "shape": list(tensor.ne)}
            for head in card.heads
            for tensor in head.tensors
        ],
        "capabilities": card.capabilities,
        "modified_at": rfc3339(card.modified),
    }


def _vision_blocks(card: Card) -> int:
    value = card.projector_keys.get("mllama.vision.block_count")
    return value if isinstance(value, int) else 0


def _parameters(params: Mapping[str, Any]) -> str:
    """As Ollama shows them, a line each."""
    lines = []
    for name, value in sorted(params.items()):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            shown = f'"{one}"' if isinstance(one, str) else f"{one:g}" if isinstance(one, float) else str(one)
            lines.append(f"{name:<30} {shown}")
    return "\n".join(lines)


def _modelfile(name: str, template: str, system: str, parameters: str) -> str:
    lines = ["# Modelfile of a model that mllama serves", f"FROM {name}"]
    lines += [f'TEMPLATE """{template}"""'] if template else []
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f"PARAMETER {' '.join(line.split(None, 1))}" for line in parameters.splitlines()]
    return "\n".join(lines) + "\n"
