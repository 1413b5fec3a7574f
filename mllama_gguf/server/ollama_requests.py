"""Requests of Ollama's API, turned into questions to a model. Plain functions: no server, no model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..store.parameters import ROLES, WITHOUT_EFFECT
from ..text.sampling import MAX_TOP_LOGPROBS, OLLAMA_SAMPLERS
from ..words import show_name
from . import fields
from .asking import Ask
from .images import ImageLimits, from_base64
from .problems import Refused
from .times import parse_duration

logger = logging.getLogger(__name__)

# What Ollama 0.24 took where neither the request nor the model said anything.
DEFAULTS: Mapping[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "samplers": OLLAMA_SAMPLERS,
}
MAX_SEED = (1 << 63) - 1
_MARK = re.compile(r"\[img(?:-(\d{1,4}))?\]")


@dataclass(frozen=True)
class Wish:
    """A request of /api/chat or /api/generate.

    model:  as it is spelled; an answer spells it the same
    ask:    None: only load the model, or unload it
    """

    model: str
    ask: Ask | None
    stream: bool
    keep_alive: float | None


def chat(body: Mapping[str, Any], limits: ImageLimits) -> Wish:
    """A request of /api/chat. Raises Refused."""
    model, stream, keep_alive = _head(body)
    if fields.items(body, "tools"):
        raise Refused(400, f"{_full(model)} does not support tools", None, "tools")
    given = fields.items(body, "messages")
    if not given:
        return Wish(model, None, stream, keep_alive)
    counted = [0]
    messages = _joined([_message(i, one, limits, counted) for i, one in enumerate(given)])
    ask = Ask(messages=messages, truncate=fields.flag(body, "truncate", True), **_common(body, limits))
    return Wish(model, ask, stream, keep_alive)


def generate(body: Mapping[str, Any], limits: ImageLimits) -> Wish:
    """A request of /api/generate. Raises Refused."""
    model, stream, keep_alive = _head(body)
    if fields.text(body, "suffix"):
        raise Refused(400, f"{_full(model)} does not support insert", None, "suffix")
    prompt, system = fields.text(body, "prompt"), fields.text(body, "system")
    template, raw = fields.text(body, "template"), fields.flag(body, "raw")
    context = tuple(fields.items(body, "context"))
    if raw and (template or system or context):
        raise Refused(400, "raw mode does not support template, system, or context")
    if template:
        raise Refused(400, "template is not taken from requests; the model's own is used", None, "template")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 32 for n in context):
        raise fields.wrong("context", "a list of whole numbers", "something else")
    images = [_image(image, f"images[{i}]", limits) for i, image in enumerate(fields.items(body, "images"))]
    _check_number(len(images), limits)
    if not prompt and (not images or keep_alive == 0):
        return Wish(model, None, stream, keep_alive)
    common = _common(body, limits)
    if raw:
        ask = Ask(raw=_raw(prompt, len(images)), images=tuple(images), **common)
        return Wish(model, ask, stream, keep_alive)
    messages: list[dict[str, Any]] = [{"role": "system", "content": [_text(system)]}] if system else []
    messages.append({"role": "user", "content": _parts(prompt, images)})
    ask = Ask(messages=messages, context=context, gives_context=True, truncate=not context, **common)
    return Wish(model, ask, stream, keep_alive)


def model_of(body: Mapping[str, Any]) -> str:
    """The model that a request names, under the new name of the field or the old one. Raises Refused."""
    model = fields.text(body, "model") or fields.text(body, "name")
    if not model.strip():
        raise Refused(400, "model is required", None, "model")
    return model


def keep_alive_of(body: Mapping[str, Any]) -> float | None:
    """Seconds that the model is to stay; None: as the server says. Raises Refused."""
    value = body.get("keep_alive")
    if value is None or value == "":
        return None
    try:
        return parse_duration(value)
    except ValueError as e:
        raise Refused(400, f"keep_alive: {e}", None, "keep_alive") from None


def _head(body: Mapping[str, Any]) -> tuple[str, bool, float | None]:
    model = model_of(body)
    think = body.get("think")
    if think not in (None, False, ""):
        raise Refused(400, f'"{model}" does not support thinking', None, "think")
    return model, fields.flag(body, "stream", True), keep_alive_of(body)


def _full(model: str) -> str:
    """A name as Ollama shows it in these errors."""
    tagged = model if ":" in model.rpartition("/")[2] else f"{model}:latest"
    return tagged if "/" in tagged else f"registry.ollama.ai/library/{tagged}"


def _common(body: Mapping[str, Any], limits: ImageLimits) -> dict[str, Any]:
    options, n_ctx = _options(fields.get(body, "options", dict, {}))
    options |= _logprobs(body)
    response_format = format_of(body.get("format"))
    if response_format is not None:
        options["response_format"] = response_format
    return {
        "options": options,
        "fallback": DEFAULTS,
        "n_ctx": n_ctx,
        "limits": limits,
    }


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = fields.flag(body, "logprobs")
    top = body.get("top_logprobs")
    if top is not None and not (type(top) in (int, float) and 0 <= top <= MAX_TOP_LOGPROBS):
        raise Refused(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}", None, "top_logprobs")
    return {"logprobs": wanted, "top_logprobs": int(top or 0)} if wanted else {}


def format_of(value: Any) -> dict[str, Any] | None:
    """The response_format of Ollama's `format`: "json" or a schema. Raises Refused."""
    if value is None or value == "":
        return None
    if value == "json":
        return {"type": "json_object"}
    if isinstance(value, dict):
        return {"type": "json_schema", "json_schema": {"schema": value}}
    raise Refused(
        400, f'invalid format: {show_name(str(value), 60)!r}; expected "json" or a valid JSON Schema object'
    )


def _options(given: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Options of Ollama as those of `ReplyOptions`; and num_ctx."""
    where = "options."
    found: dict[str, Any] = {}
    if (temperature := fields.number(given, "temperature", where=where)) is not None:
        found["temperature"] = min(max(temperature, 0.0), 100.0)
    if (top_k := fields.whole(given, "top_k", where=where)) is not None:
        found["top_k"] = max(top_k, 0)
    for name in ("top_p", "min_p"):
        if (share := fields.number(given, name, where=where)) is not None:
            found[name] = min(max(share, 0.0), 1.0)
    seed = fields.whole(given, "seed", -MAX_SEED, MAX_SEED, where)
    if seed is not None:
        found["seed"] = seed if seed >= 0 else None  # a fresh one, whatever the model's own is
    if (n_predict := fields.whole(given, "num_predict", where=where)) is not None:
        found["max_tokens"] = n_predict if n_predict > 0 else None
    if given.get("stop") is not None:
        found["stop"] = fields.stops(given["stop"], "options.stop") or None
    n_ctx = fields.whole(given, "num_ctx", where=where)
    known = {"temperature", "top_k", "top_p", "min_p", "seed", "num_predict", "stop", "num_ctx"}
    for name in given:
        if name not in known and name not in WITHOUT_EFFECT:
            logger.info("option %s is not known and has no effect", show_name(name, 60))
    return found, n_ctx if n_ctx and n_ctx > 0 else None


def _message(index: int, message: Any, limits: ImageLimits, counted: list[int]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise fields.wrong(where, "an object", message)
    role = message.get("role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Refused(400, f"{where}.role must be one of {', '.join(ROLES)}", None, f"{where}.role")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise fields.wrong(f"{where}.content", "a string", content)
    given = message.get("images")
    if given is not None and not isinstance(given, list):
        raise fields.wrong(f"{where}.images", "a list", given)
    counted[0] += len(given or [])
    _check_number(counted[0], limits)
    images = [_image(image, f"{where}.images[{i}]", limits) for i, image in enumerate(given or [])]
    told = {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}
    return {**told, "role": role.lower(), "content": _parts(content or "", images)}


def _check_number(n_images: int, limits: ImageLimits) -> None:
    if n_images > limits.most:
        raise Refused(400, f"{n_images} images in one request; at most {limits.most} are taken")


def _image(image: Any, where: str, limits: ImageLimits) -> bytes:
    if not isinstance(image, (str, memoryview)):
        raise fields.wrong(where, "base64 of an image", image)
    return from_base64(image, where, limits)


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def _parts(words: str, images: list[bytes]) -> list[dict[str, Any]]:
    """Text with its images: where it has [img] or [img-N], the others before it."""
    marks = list(_MARK.finditer(words)) if images else []
    places: dict[int, re.Match[str]] = {}
    for mark in marks:
        number = int(mark[1]) if mark[1] else next((i for i in range(len(images)) if i not in places), -1)
        if 0 <= number < len(images) and number not in places:
            places[number] = mark
    parts = [_image_part(image) for i, image in enumerate(images) if i not in places]
    start = 0
    for number, mark in sorted(places.items(), key=lambda item: item[1].start()):
        if mark.start() > start:
            parts.append(_text(words[start : mark.start()]))
        parts.append(_image_part(images[number]))
        start = mark.end()
    if start < len(words) or not parts:
        parts.append(_text(words[start:]))
    return parts


def _image_part(image: bytes) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _raw(prompt: str, n_images: int) -> str:
    """A raw prompt with an image token for each image: where it has one or [img], else at its start."""
    used = 0

    def place(_: re.Match[str]) -> str:
        nonlocal used
        used += 1
        return "<|image|>" if used <= n_images else ""

    if n_images:
        prompt = _MARK.sub(place, prompt)
    missing = n_images - prompt.count("<|image|>")
    return "<|image|>" * max(0, missing) + prompt


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of one role that follow each other are one, with an empty line between them."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"] != "tool" and "tool_calls" not in found[-1]:
            found[-1]["content"] += [_text("\n\n"), *message["content"]]  # in its place: there may be many
            found[-1] |= {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
        else:
            found.append(message)
    return found
