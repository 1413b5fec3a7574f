"""Layers of an Ollama model that say how it is used, as values: parameters, messages, template.

Everything in a layer is checked. A value of a wrong type is a ModelError that names it, as Ollama refuses it.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ModelError
from ..words import brief, show_name
from .manifest import read_json

MOST_MESSAGES = 1000
_MOST = (1 << 31) - 1  # what C's int32_t holds
ROLES = ("system", "user", "assistant", "tool")

# Options for sampling that Ollama took and did not obey with this model, and the value that says nothing.
_IDLE: Mapping[str, float] = {
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "tfs_z": 1.0,
    "typical_p": 1.0,
    "penalize_newline": 1,
}
# Settings of the machine rather than of the model; whoever runs it decides them.
_MACHINE = frozenset(
    (
        "num_keep", "num_batch", "num_gpu", "num_thread", "num_gqa", "main_gpu", "low_vram", "f16_kv",
        "logits_all", "vocab_only", "use_mmap", "use_mlock", "numa", "embedding_only",
    )
)  # fmt: skip

# What a request may name and the server does not obey.
WITHOUT_EFFECT = frozenset(_IDLE) | _MACHINE

# Llama 3.2 Vision's template in Ollama's library, and the older form that many Modelfiles have. Both say what
# LLAMA_3_2_TEMPLATE says. Blanks beside the braces are left out, see `_squeezed`.
_TEMPLATES = (
    "{{- range $index, $_ := .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}"
    "{{- if gt (len (slice $.Messages $index)) 1 }}<|eot_id|>"
    '{{- else if ne .Role "assistant" }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{{ end }}'
    "{{- end }}",
    "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
    "{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}<|eot_id|>",
    "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
    "{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}",
)


def is_llama_template(template: str) -> bool:
    """Whether a Go template prompts as Llama 3.2 was trained."""
    return _squeezed(template) in {_squeezed(known) for known in _TEMPLATES}


def _squeezed(template: str) -> str:
    """A Go template without the blanks that its actions remove or that mean nothing."""
    # Blanks before a brace are matched from their first one alone: tried from each they take hours.
    template = re.sub(r"(?:(?<!\s)\s+)?\{\{-\s*", "{{", template.strip())
    template = re.sub(r"(?:(?<!\s)\s+)?-\}\}\s*", "}}", template)
    template = re.sub(r"\{\{\s*|(?:(?<!\s)\s+)?\}\}", lambda found: found.group().strip(), template)
    return re.sub(r"\{\{[^{}]*\}\}", lambda found: " ".join(found.group().split()), template)


def read_params(data: bytes, origin: object) -> dict[str, Any]:
    """The parameters in a layer, in their plain form; null ones are left out. Raises ModelError."""
    values = read_json(data, origin, "its params layer")
    if not isinstance(values, dict):
        raise ModelError(f"{origin}: its params layer is {type(values).__name__}, not an object")
    return {name: _checked(name, value, origin) for name, value in values.items() if value is not None}


def _checked(name: str, value: Any, origin: object) -> Any:
    kind, read = _KINDS.get(name, ("", None))
    try:
        return value if read is None else read(value)
    except (TypeError, ValueError, OverflowError):
        raise ModelError(
            f"{origin}: its parameter {show_name(name, 60)} = {brief(value)} is not {kind}"
        ) from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError
    if abs(value) >= 1 << 63:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _stops(value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError
    return [word for word in dict.fromkeys(words) if word]


_KINDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), ("a number", _number)),
    **dict.fromkeys(("top_k", "seed", "num_predict", "num_ctx"), ("a whole number", _whole)),
    "stop": ("a list of strings", _stops),
}


def options_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """What parameters mean for replies, by the names of `create_chat_completion`. A value out of range is
    moved to the nearest end, as Ollama does."""
    options: dict[str, Any] = {}
    if "temperature" in params:
        options["temperature"] = min(max(params["temperature"], 0.0), 100.0)
    if "top_k" in params:
        options["top_k"] = min(max(params["top_k"], 0), _MOST)
    for name in ("top_p", "min_p"):
        if name in params:
            options[name] = min(max(params[name], 0.0), 1.0)
    if params.get("seed", -1) >= 0:
        options["seed"] = params["seed"]
    if params.get("stop"):
        options["stop"] = tuple(params["stop"])
    if "num_predict" in params:
        options["max_tokens"] = params["num_predict"] if params["num_predict"] > 0 else None
    return options


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """What parameters mean for opening the model, by the names of `Mllama`'s arguments."""
    return {"n_ctx": min(params["num_ctx"], _MOST)} if params.get("num_ctx", 0) > 0 else {}


def idle_parameters(params: Mapping[str, Any]) -> list[str]:
    """Names of parameters that say something about the model and have no effect: those that Ollama did not
    obey either, and unknown ones."""
    return [
        show_name(name, 60)
        for name, value in params.items()
        if name not in _KINDS and name not in _MACHINE and not (name in _IDLE and value == _IDLE[name])
    ]


def read_messages(data: bytes, origin: object) -> tuple[Mapping[str, Any], ...]:
    """The messages in a layer, in the shape that `create_chat_completion` takes; images are bytes. Raises
    ModelError."""
    words = read_json(data, origin, "its messages layer")
    if not isinstance(words, list) or len(words) > MOST_MESSAGES:
        raise ModelError(f"{origin}: its messages layer is not a list of at most {MOST_MESSAGES} messages")
    return tuple(_message(index, message, origin) for index, message in enumerate(words))


def _message(index: int, message: Any, origin: object) -> Mapping[str, Any]:
    where = f"{origin}: message {index} of its messages layer"
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ModelError(f"{where}: its role is {brief(role)}, none of {', '.join(ROLES)}")
    content, images = message.get("content", ""), message.get("images") or []
    if not isinstance(content, str) or not isinstance(images, list):
        raise ModelError(f"{where}: is not text with images")
    if not images:
        return {"role": role.lower(), "content": content}
    parts: list[dict[str, Any]] = [{"type": "image", "image": _image(image, where)} for image in images]
    return {"role": role.lower(), "content": [*parts, {"type": "text", "text": content}]}


def _image(words: Any, where: str) -> bytes:
    try:
        return base64.b64decode(words, validate=True)
    except (TypeError, ValueError, binascii.Error) as e:
        raise ModelError(f"{where}: an image is not base64") from e


def read_text_layer(data: bytes, origin: object, kind: str) -> str:
    """The text of a layer. Raises ModelError if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ModelError(f"{origin}: its {kind} layer is not UTF-8") from e
