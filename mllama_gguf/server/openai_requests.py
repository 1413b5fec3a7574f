"""Requests of OpenAI's API, turned into questions to a model. Plain functions: no server, no model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..decode.openai import MAX_REPLIES, is_known, plain_options
from ..text.messages import ROLES
from ..text.tools import Tools, read_tools
from ..words import brief, show_name
from . import fields
from .asking import Ask
from .fetching import fetch
from .images import ImageLimits, checked_kind, from_base64, is_data_uri
from .problems import Refused

logger = logging.getLogger(__name__)

DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# As in Ollama's layer for this API, and as OpenAI has them, whatever the model's own are.
_NOT_OWN = frozenset(("temperature", "top_p"))
# Wishes that the model has no means for. Only known values are taken, so that a typing error is not a wish.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_WISHES: Mapping[str, tuple[str, ...]] = {
    "reasoning_effort": _EFFORTS,
    "verbosity": ("low", "medium", "high"),
}
# Fields that are read here and are not options.
_OWN = frozenset(("messages", "n", "stream", "stream_options"))
_GRAMMARS = ("gbnf", "lark")
_OF_MESSAGES = ("name", "tool_calls", "tool_call_id", "function_call", "audio")


@dataclass(frozen=True)
class Wish:
    """A request. usage: whether a stream ends with a chunk that tells it; tools: that may be called."""

    model: str
    ask: Ask
    stream: bool
    usage: bool
    tools: Tools = field(default_factory=Tools)


def chat(body: Mapping[str, Any], limits: ImageLimits, *, allow_gbnf: bool) -> Wish:
    """A request of /v1/chat/completions. Raises Refused, RequestError."""
    model = model_of(body)
    refuse_images(body, "images")
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages must be a list with at least one message", "invalid_value", "messages")
    counted = [0]
    messages = [_message(i, message, limits, counted) for i, message in enumerate(given)]
    n = fields.whole(body, "n", 1, MAX_REPLIES)
    stream = fields.flag(body, "stream")
    options = _options(body, allow_gbnf)
    tools = read_tools(*(options.get(name) for name in ("tools", "tool_choice", "parallel_tool_calls")))
    ask = Ask(
        messages=messages,
        options=options,
        fallback=DEFAULTS,
        not_own=_NOT_OWN,
        n=1 if n is None else n,
        limits=limits,
    )
    return Wish(model, ask, stream, stream and wants_usage(body), tools)


def completion(body: Mapping[str, Any], limits: ImageLimits, *, allow_gbnf: bool) -> Wish:
    """A request of /v1/completions: the prompt goes to the model as it is. Raises Refused, RequestError."""
    model = model_of(body)
    refuse_images(body, "images")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise fields.wrong("prompt", "a string", prompt)
    others = {name: value for name, value in body.items() if name not in ("prompt", "logprobs")}
    if body.get("logprobs") not in (None, False, 0):
        raise Refused(400, "logprobs is not served here; use /v1/chat/completions", None, "logprobs")
    options = _options(others, allow_gbnf)
    n = fields.whole(body, "n", 1, MAX_REPLIES)
    stream = fields.flag(body, "stream")
    ask = Ask(
        raw=prompt,
        options=options,
        fallback={**DEFAULTS, "max_tokens": 16},
        not_own=_NOT_OWN,
        n=1 if n is None else n,
        limits=limits,
    )
    return Wish(model, ask, stream, stream and wants_usage(body))


def model_of(body: Mapping[str, Any]) -> str:
    """The model that a request names. Raises Refused."""
    model = fields.text(body, "model")
    if not model.strip():
        raise Refused(400, "model is required", "missing_required_parameter", "model")
    return model


def refuse_images(value: Mapping[str, Any], where: str) -> None:
    """Fields that are not known have no effect, but an image must not be lost. Raises Refused."""
    if value.get("images"):
        raise Refused(
            400,
            f"{where} is a field of Ollama's API and is not read here; images are parts of messages: "
            '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}',
            "invalid_value",
            where,
        )


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with its usage."""
    options: Mapping[str, Any] = fields.get(body, "stream_options", dict, {})
    return fields.flag(options, "include_usage")


def _options(body: Mapping[str, Any], allow_gbnf: bool) -> dict[str, Any]:
    """Options for `ReplyOptions`. What is unknown has no effect, as other servers have it."""
    known = {}
    for name, value in body.items():
        if name in _OWN or value is None:
            continue
        if value in _WISHES.get(name, ()):
            logger.info("parameter %s=%s has no effect", name, value)
        elif is_known(name):
            known[name] = value
        else:
            logger.info("parameter %s is not known and has no effect", show_name(name, 60))
    form = known.get("response_format")
    kind = form.get("type") if isinstance(form, Mapping) else None
    if not allow_gbnf and ("grammar" in known or kind in _GRAMMARS):
        raise Refused(
            400,
            "grammars are not taken from requests (mllama serve --allow-gbnf); use a JSON schema or a regex",
        )
    if "stop" in known:
        known["stop"] = fields.stops(known["stop"], "stop") or None
    for name in ("max_tokens", "max_completion_tokens", "top_k", "seed", "top_logprobs"):
        if name in known:
            known[name] = fields.whole(known, name, -(1 << 63), 1 << 63)
    if known.get("top_k") == -1:  # other servers' word for all
        known["top_k"] = 0
    if known.get("max_tokens") == 0 or known.get("max_completion_tokens") == 0:
        raise Refused(400, "max_tokens must be at least 1", "invalid_value", "max_tokens")
    return plain_options(known)


def _message(index: int, message: Any, limits: ImageLimits, counted: list[int]) -> dict[str, Any]:
    """A message as the package takes it. Its own fields are checked there."""
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise fields.wrong(where, "an object", message)
    role = message.get("role")
    if not isinstance(role, str):
        raise fields.wrong(f"{where}.role", "a string", role)
    if role not in ROLES:
        raise Refused(400, f"{where}.role {brief(role)} is not known", "invalid_value", f"{where}.role")
    refuse_images(message, f"{where}.images")
    given = {name: message[name] for name in _OF_MESSAGES if message.get(name) is not None}
    content = message.get("content")
    if content is None:
        content = fields.text(message, "refusal")  # an assistant's, in place of its words
    if isinstance(content, str):
        return {**given, "role": role, "content": content}
    if not isinstance(content, list):
        raise fields.wrong(f"{where}.content", "a string or a list of parts", content)
    parts = [
        part
        for i, one in enumerate(content)
        for part in content_part(one, f"{where}.content[{i}]", limits, counted)
    ]
    return {**given, "role": role, "content": parts}


def content_part(part: Any, where: str, limits: ImageLimits, counted: list[int]) -> list[dict[str, Any]]:
    """A part of a message as the package takes it. counted: images so far. Raises Refused."""
    if not isinstance(part, dict):
        raise fields.wrong(where, "an object", part)
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise fields.wrong(f"{where}.text", "a string", text)
        return [{"type": "text", "text": text}]
    if kind in ("image_url", "input_image"):
        given = part.get("image_url")
        inside = given if isinstance(given, dict) else {"url": given}
        url, detail = inside.get("url"), inside.get("detail", part.get("detail"))
        if not isinstance(url, (str, memoryview)):
            raise fields.wrong(f"{where}.image_url", "a data URI", url)
        if detail not in (None, "auto", "low", "high", "original"):
            raise fields.wrong(f"{where}.detail", "auto, low or high", detail)
        counted[0] += 1
        if counted[0] > limits.most:
            raise Refused(400, f"more than {limits.most} images in one request")
        return [{"type": "image", "image": _image(url, where, limits), "detail": detail or "auto"}]
    raise Refused(
        400,
        f'{where}: expected a part of type "text" or "image_url", got {brief(kind)}',
        "invalid_value",
        where,
    )


def _image(url: str | memoryview, where: str, limits: ImageLimits) -> bytes:
    if not is_data_uri(url):
        if limits.hosts and isinstance(url, str) and url[:4].lower() == "http":
            return checked_kind(fetch(url, where, limits.hosts), where, limits)
        raise Refused(
            400,
            f"{where}: image URLs are not currently supported, please use base64 encoded data instead",
            "invalid_image_url",
            where,
        )
    return from_base64(url, where, limits)
