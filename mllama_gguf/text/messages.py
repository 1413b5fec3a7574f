"""Messages as callers give them, checked, in one plain form."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

from ..errors import RequestError
from ..reading import parse_json
from ..words import brief, one_line

Role = Literal["system", "user", "assistant", "tool", "ipython"]
# The names that callers may use. Llama calls the role of a tool "ipython", OpenAI now calls "system" so.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "ipython": "tool",
}
DETAILS = ("auto", "high", "low", "original")


@dataclass(frozen=True)
class Image:
    """An image of a message. image: what the caller gave, not yet decoded; detail: as OpenAI names it"""

    image: Any
    detail: str = "auto"


@dataclass(frozen=True)
class Call:
    """A call of a tool, as the assistant wrote it."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One message.

    parts:     texts and images, no text beside another
    is_string: the content was given as one text, or is as good as that
    calls:     of an assistant's message
    call_id:   of a tool's message: the call that it answers, ""
    name:      whose message it is, ""
    """

    role: Role
    parts: tuple[str | Image, ...]
    is_string: bool
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    name: str = ""
    images: tuple[Image, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(part for part in self.parts if isinstance(part, Image)))

    @property
    def text(self) -> str:
        """All text."""
        return "".join(part for part in self.parts if isinstance(part, str))


def read_messages(messages: Any) -> list[Message]:
    """Messages in OpenAI's shapes.

    A message is {"role": ..., "content": a text or a list of parts}. A part is {"type": "text", "text": ...},
    {"type": "image_url", "image_url": {"url": X, "detail": "low"} or X} or {"type": "image", "image": X},
    where X stands for an image. Ollama's "images": [X, ...] beside the content come before it. An
    assistant's message may have "tool_calls", and then no content; a tool's has a "tool_call_id".

    An assistant's message with several calls becomes several, each with the tool's answer after it, because
    the model knows one call at a time.

    Raises RequestError for other shapes, and for roles that are not known.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise RequestError(f"messages must be a list of messages, not {type(messages).__name__}")
    plain = [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    if not plain:
        raise RequestError("messages is empty")
    return _one_call_each(plain)


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f'{where}: expected {{"role": ..., "content": ...}}, got {_short(message)}')
    role = ROLES.get(message["role"])
    if role is None:
        raise RequestError(
            f"{where}: there is no role {brief(message['role'])}; there are {', '.join(map(repr, ROLES))}"
        )
    if message.get("function_call") is not None:
        raise RequestError(f"{where}: function_call cannot be obeyed; use tool_calls")
    if message.get("audio") is not None:
        raise RequestError(f"{where}: audio cannot be obeyed; messages are text and images")
    calls = _calls(f"{where}.tool_calls", message.get("tool_calls"))
    if calls and role != "assistant":
        raise RequestError(f"{where}: tool_calls belong to the role 'assistant'")
    content = message.get("content")
    if content is None and (calls or isinstance(message.get("refusal"), str)):
        content = message.get("refusal") or ""
    parts = (*_ollama_images(where, message.get("images")), *_parts(where, content))
    has_images = any(isinstance(part, Image) for part in parts)
    if has_images and role == "tool":
        raise RequestError(f"{where}: what a tool says is text; put images into a message of the user")
    return Message(
        role,
        parts,
        is_string=not has_images and (isinstance(content, str) or role in ("system", "tool")),
        calls=calls,
        call_id=_name(f"{where}.tool_call_id", message.get("tool_call_id")),
        name=_name(f"{where}.name", message.get("name")),
    )


def _ollama_images(where: str, images: Any) -> tuple[Image, ...]:
    """The images of a message in Ollama's shape, where they are beside the content; they come before it."""
    if images is None:
        return ()
    if not isinstance(images, (list, tuple)) or any(image is None for image in images):
        raise RequestError(f"{where}: images must be a list of images, not {brief(images)}")
    return tuple(map(Image, images))


def _parts(where: str, content: Any) -> tuple[str | Image, ...]:
    if isinstance(content, str):
        return (content,)
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Iterable):
        raise RequestError(
            f"{where}: content must be a string or a list of parts, not {type(content).__name__}"
        )
    read = [_part(f"{where}.content[{index}]", given) for index, given in enumerate(content)]
    parts: list[str | Image] = []
    for _, run in groupby(read, lambda part: isinstance(part, str)):
        same = list(run)
        texts = [part for part in same if isinstance(part, str)]
        parts += ["".join(texts)] if texts else same
    return tuple(parts)


def _part(where: str, part: Any) -> str | Image:
    if isinstance(part, str):
        return part
    fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind in ("text", "refusal") and isinstance(fields.get(str(kind)), str):
        return str(fields[kind])
    if kind in ("image_url", "image"):
        image, detail = fields.get(kind), fields.get("detail")
        inner: Any = image if kind == "image_url" and isinstance(image, Mapping) else None
        if inner is not None:
            image, detail = inner.get("url"), inner.get("detail")
        if image is not None:
            return Image(image, _detail(where, detail))
    raise RequestError(
        f'{where}: expected a part of type "text", "image_url" or "image" with its value, got {_short(part)}'
    )


def _detail(where: str, detail: Any) -> str:
    if detail is None:
        return "auto"
    if not isinstance(detail, str) or detail not in DETAILS:
        raise RequestError(f"{where}: detail must be one of {', '.join(DETAILS)}, not {brief(detail)}")
    return detail


def _calls(where: str, calls: Any) -> tuple[Call, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, (list, tuple)):
        raise RequestError(f"{where} must be a list, not {brief(calls)}")
    return tuple(_call(f"{where}[{index}]", call) for index, call in enumerate(calls))


def _call(where: str, call: Any) -> Call:
    fields: Mapping[str, Any] = call if isinstance(call, Mapping) else {}
    function = fields.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(
            f'{where}: expected {{"id": ..., "type": "function", "function": {{"name": ..., '
            f'"arguments": ...}}}}, got {_short(call)}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError as e:
            raise RequestError(f"{where}: its arguments are not JSON: {one_line(e)}") from e
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where}: arguments must be a JSON object, as a text; not {brief(arguments)}")
    return Call(_name(f"{where}.id", fields.get("id")), function["name"], arguments)


def _name(where: str, name: Any) -> str:
    if name is None:
        return ""
    if not isinstance(name, str):
        raise RequestError(f"{where} must be a text, not {brief(name)}")
    return name


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Messages in which nobody calls two tools in one message."""
    result: list[Message] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        if len(message.calls) < 2:
            result.append(message)
            continue
        end = index
        while end < len(messages) and messages[end].role == "tool":
            end += 1
        result += _with_answers(message, messages[index:end])
        index = end
    return result


def _with_answers(message: Message, answers: Sequence[Message]) -> Iterator[Message]:
    """A message of several calls as one for each, with the answers to it behind it. An answer that names none
    of them is that of the first call without one; those that are left over come last."""
    ids = {call.id for call in message.calls}
    named: dict[str, list[Message]] = {}
    others: deque[Message] = deque()
    for answer in answers:
        if answer.call_id and answer.call_id in ids:
            named.setdefault(answer.call_id, []).append(answer)
        else:
            others.append(answer)
    for call in message.calls:
        yield replace(message, calls=(call,))
        mine = named.pop(call.id, [])
        if not mine and others:
            mine = [others.popleft()]
        yield from mine
    yield from others


def _short(value: object) -> str:
    return brief(value, 80)
