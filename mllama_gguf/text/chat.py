"""Chat messages in the OpenAI shapes to one prompt text and its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..errors import RequestError
from ..words import one_line

# What Llama 3.2 Vision was trained on, without the date that the published template adds to the system
# message.
LLAMA_3_2_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content %}
            {{- '<|image|>' if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Splits what looks like a special token in a message's own text, so that `<|image|>` or `<|eot_id|>` written
# by a user stays text. A noncharacter of Unicode, meant for such internal use.
_SPLIT = "\ufdd0"
_SPECIAL = re.compile(r"<(?=\|[^|>\s]{1,64}\|>)")


@dataclass(frozen=True)
class RenderedChat:
    """A prompt.

    pieces: text whose special tokens count; to be tokenized one by one and joined
    images: the pictures, in the order of their tokens; what the messages held, not yet decoded
    """

    pieces: tuple[str, ...]
    images: tuple[Any, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class ChatTemplate:
    """A Jinja chat template of a model."""

    def __init__(self, template: str | None, *, bos: str, eos: str, image: str) -> None:
        """template: Jinja source, None for Llama 3.2's; bos, eos, image: how these tokens are spelled.

        Raises RequestError for a template that is not Jinja.
        """
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._image = image
        try:
            self._formatter = Jinja2ChatFormatter(
                template or LLAMA_3_2_TEMPLATE, eos_token=eos, bos_token=bos
            )
        except TemplateError as e:
            raise RequestError(f"the chat template is not valid: {one_line(e)}") from e

    def render(self, messages: Sequence[Mapping[str, Any]]) -> RenderedChat:
        """Messages to a prompt that ends where the assistant's reply begins.

        A message is {"role": str, "content": str | list of parts}; a part is {"type": "text", "text": str},
        {"type": "image_url", "image_url": {"url": X} or X}, or {"type": "image", "image": X}, where X is a
        data URI, a path, a PIL image, an array, or whatever else stands for a picture.

        Raises RequestError for messages of another shape, and with the template's own words if it refuses
        them.
        """
        plain = [_message(index, message) for index, message in enumerate(_sequence(messages))]
        if not plain:
            raise RequestError("messages is empty")
        images = [
            part["image"] for message in plain for part in message["content"] if part["type"] == "image"
        ]
        text = self._render([_as_parts(message) for message in plain])
        if images and text.count(self._image) != len(images):
            # A template for text only: put the image tokens into the text.
            text = self._render([self._as_text(message) for message in plain])
            if text.count(self._image) != len(images):
                raise RequestError(
                    "the chat template of this model drops pictures; give another chat_template"
                )
        return RenderedChat(tuple(text.split(_SPLIT)), tuple(images))

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self._formatter(messages=cast(Any, messages)).prompt)
        except Exception as e:  # the template's own raise_exception, or any error of the code in it
            raise RequestError(f"the chat template refuses the messages: {one_line(e)}") from e

    def _as_text(self, message: dict[str, Any]) -> dict[str, Any]:
        parts = message["content"]
        text = "".join(self._image if part["type"] == "image" else part["text"] for part in parts)
        return {"role": message["role"], "content": text}


def _message(index: int, message: Any) -> dict[str, Any]:
    """The message with its content as a list of text and image parts."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f'{where}: expected {{"role": ..., "content": ...}}, got {_short(message)}')
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": [_text(content)], "is_string": True}
    if content is None or not isinstance(content, Iterable):
        raise RequestError(
            f"{where}: content must be a string or a list of parts, not {type(content).__name__}"
        )
    parts = [_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)]
    return {"role": message["role"], "content": parts, "is_string": False}


def _part(where: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return _text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _text(part["text"])
    if kind == "image_url":
        url = part.get("image_url")
        image = url.get("url") if isinstance(url, Mapping) else url
        if image is not None:
            return {"type": "image", "image": image}
    if kind == "image" and part.get("image") is not None:
        return {"type": "image", "image": part["image"]}
    raise RequestError(
        f'{where}: expected a part of type "text", "image_url" or "image" with its value, got {_short(part)}'
    )


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": _SPECIAL.sub(f"<{_SPLIT}", text.replace(_SPLIT, ""))}


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """As the caller gave it: templates treat a plain string otherwise than a list."""
    parts = message["content"]
    if message["is_string"]:
        return {"role": message["role"], "content": parts[0]["text"]}
    shown = [{"type": "image"} if part["type"] == "image" else part for part in parts]
    return {"role": message["role"], "content": shown}


def _sequence(messages: Any) -> Sequence[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise RequestError(f"messages must be a list of messages, not {type(messages).__name__}")
    return list(messages)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
