"""Chat messages in the OpenAI shapes to one prompt text and its images."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import ContextFullError, ModelError, RequestError
from ..words import one_line
from .messages import Message, read_messages
from .special import END, SPLIT, Guard

if TYPE_CHECKING:
    from jinja2 import Template

logger = logging.getLogger(__name__)

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
# What stands before the tools in the first message of the user. The model was trained on these words, to the
# letter.
TOOLS_TEXT = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments "
    "that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
# Variables of templates that callers cannot set.
_OWN = frozenset(
    {
        *("messages", "tools", "custom_tools", "bos_token", "eos_token", "add_generation_prompt"),
        *("raise_exception", "strftime_now"),
    }
)


@dataclass(frozen=True)
class RenderedChat:
    """A prompt.

    pieces:  text whose special tokens count; to be tokenized one by one and joined
    images:  in the order of their tokens; what the messages held, not yet decoded
    details: of the images: "auto", "high", "low" or "original"
    """

    pieces: tuple[str, ...]
    images: tuple[Any, ...]
    details: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class ChatTemplate:
    """A Jinja chat template of a model. Safe from several threads."""

    def __init__(
        self, template: str | None, *, bos: str, eos: str, image: str, special: Iterable[str] = ()
    ) -> None:
        """template: Jinja source, None for Llama 3.2's; bos, eos, image: how these tokens are spelled;
        special: how all special tokens are, of which `<|...|>` need not be told.

        Raises RequestError for a template that is not Jinja.
        """
        source = template or LLAMA_3_2_TEMPLATE
        self._image = image
        self._guard = Guard(special)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._template = _compile(source)
        self._knows_tools = "tools" in source
        self._has_warned = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
    ) -> RenderedChat:
        """Messages to a prompt that ends where the assistant's reply begins.

        messages:  see `messages.read_messages`
        tools:     that the assistant may call, in OpenAI's shape, checked. If the template has no place for
                   them, they are put into the first message of the user, as Llama 3.2's template does
        variables: for the template. `date_string` is the date wherever a template writes one
        continue_final: whether the reply continues the last message, which must be the assistant's; None:
                   if it is

        Raises RequestError for messages of another shape or that are too long, and with the template's own
        words if it refuses them; ModelError for a template that works for ever or makes too much by itself.
        """
        plain = read_messages(messages)
        is_continued = _is_continued(plain, continue_final)
        prompt = _Prompt(
            plain, self._guard.value(list(tools), "tools"), self._variables(variables or {}), is_continued
        )
        text = self._text(prompt)
        if is_continued:
            text = text[: text.index(END)]
        images = [image for message in plain for image in message.images]
        return RenderedChat(
            tuple(piece for piece in text.split(SPLIT) if piece) or ("",),
            tuple(image.image for image in images),
            tuple(image.detail for image in images),
        )

    def _variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in _OWN:
                raise RequestError(f"chat_template_kwargs: {name} cannot be set here")
        variables = {
            name: self._guard.value(value, f"chat_template_kwargs: {name}") for name, value in given.items()
        }
        date = variables.get("date_string")
        return {**variables, "strftime_now": _now if date is None else lambda form: str(date)}

    def _text(self, prompt: _Prompt) -> str:
        """The rendered text, in the first way that the template takes."""
        problems: list[RequestError] = []
        for is_native, as_text in self._ways(prompt):
            messages = prompt.messages if is_native else list(_without_tools(prompt, self._guard))
            shown = [self._shown(message, as_text, prompt) for message in messages]
            if prompt.is_continued:
                _mark_end(shown[-1])
            try:
                text = self._render(shown, prompt, is_native)
                self._check(text, prompt)
            except _TooLong:
                raise  # no other way is shorter
            except RequestError as e:
                problems.append(e)
                continue
            if as_text and isinstance(problems[0], _Refusal):
                self._warn(problems[0])
            return text
        raise RequestError(str(problems[0])) from problems[0].__cause__

    def _ways(self, prompt: _Prompt) -> Iterator[tuple[bool, bool]]:
        """Whether the template itself writes tools, and whether all content is given as text."""
        has_parts = not all(message.is_string for message in prompt.messages)
        for is_native in (True, False) if self._knows_tools and prompt.has_tools else (not prompt.has_tools,):
            yield is_native, False
            if has_parts:
                yield is_native, True

    def _shown(self, message: Message, as_text: bool, prompt: _Prompt) -> dict[str, Any]:
        """As the template sees it: templates treat a plain string in another way than a list."""
        guard = self._guard.text
        parts = [guard(part) if isinstance(part, str) else part for part in message.parts]
        text = "".join(part if isinstance(part, str) else self._image for part in parts)
        content: Any = _Text(text)
        if not (message.is_string or as_text):
            content = _Parts(
                text,
                [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in parts
                ],
            )
        shown: dict[str, Any] = {"role": message.role, "content": content}
        if message.name:
            shown["name"] = guard(message.name)
        if message.call_id:
            shown["tool_call_id"] = guard(message.call_id)
        if message.calls:
            shown["tool_calls"] = [
                {
                    "id": guard(call.id),
                    "type": "function",
                    "function": {
                        "name": guard(call.name),
                        "arguments": self._guard.value(call.arguments, "arguments"),
                    },
                }
                for call in message.calls
            ]
        return shown

    def _render(self, messages: list[dict[str, Any]], prompt: _Prompt, is_native: bool) -> str:
        from .sandbox import TooMuch, limited

        tools = (prompt.tools or None) if is_native else None
        variables = {**prompt.variables, **self._given(messages, tools, not prompt.is_continued)}
        try:
            return limited(lambda: self._template.render(variables))
        except (TooMuch, MemoryError) as e:
            self._check_template()
            raise _TooLong(f"the conversation is too much for the chat template: {one_line(e)}") from e
        except Exception as e:  # the template's own raise_exception, or any error of the code in it
            raise _Refusal(f"the chat template refuses the messages: {one_line(e)}") from e

    def _given(self, messages: list[dict[str, Any]], tools: Any, is_new: bool) -> dict[str, Any]:
        """What every template knows. is_new: a new message of the assistant begins."""
        return {
            **self._tokens,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": is_new,
            "raise_exception": _raise,
        }

    def _check_template(self) -> None:
        """Raise ModelError if the template is too much with one short message too: then it is the template's
        fault, not the conversation's."""
        from .sandbox import TooMuch, limited

        message = {"role": "user", "content": _Text("x")}
        shortest = {"strftime_now": _now, **self._given([message], None, True)}
        try:
            limited(lambda: self._template.render(shortest))
        except (TooMuch, MemoryError) as e:
            raise ModelError(f"the chat template cannot be used: {one_line(e)}") from e
        except Exception:  # it refuses such a message, which says nothing
            return

    def _check(self, text: str, prompt: _Prompt) -> None:
        """Raise RequestError if the template left out what must be there."""
        if text.count(self._image) != sum(len(message.images) for message in prompt.messages):
            raise RequestError("the chat template of this model drops images; give another chat_template")
        if prompt.is_continued and text.count(END) != 1:
            raise RequestError(
                "the chat template of this model cannot continue a message; end with a message of the user"
            )
        plain = text.replace(SPLIT, "")
        for tool in prompt.tools:
            name = tool["function"]["name"].replace(SPLIT, "")
            if name not in plain and _to_json(name)[1:-1] not in plain:
                raise RequestError("the chat template of this model drops tools; give another chat_template")

    def _warn(self, refusal: RequestError) -> None:
        if not self._has_warned:
            logger.warning("%s. Their images are written into their texts instead", refusal)
        self._has_warned = True


@dataclass(frozen=True)
class _Prompt:
    """What is to be rendered, all of it guarded but the messages."""

    messages: list[Message]
    tools: list[Any]
    variables: dict[str, Any]
    is_continued: bool

    @property
    def has_tools(self) -> bool:
        return bool(self.tools) or any(one.calls or one.role == "tool" for one in self.messages)


class _Refusal(RequestError):
    """The template itself refuses the messages."""


class _TooLong(ContextFullError, RequestError):
    """The conversation, or what else the caller gave, is more than the template may work on."""


class _Text(str):
    """A text whose only part is itself: Meta's templates look for images in every character of a plain text,
    and would not come to an end with a long one."""

    def __iter__(self) -> Iterator[str]:
        yield str(self)


class _Parts(list[Any]):
    """Parts that are their text wherever a template takes them for one."""

    def __init__(self, text: str, parts: list[dict[str, str]]) -> None:
        super().__init__(parts)
        self.text = text

    def __str__(self) -> str:
        return self.text


def _is_continued(messages: Sequence[Message], wanted: bool | None) -> bool:
    last = messages[-1]
    can_be = last.role == "assistant" and not last.calls
    if wanted and not can_be:
        raise RequestError(
            "continue_final_message needs a last message of the role 'assistant', without tool_calls"
        )
    return can_be if wanted is None else wanted


def _mark_end(message: dict[str, Any]) -> None:
    """Mark where the text of a message ends."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = _Text(content + END)
    else:
        message["content"] = _Parts(f"{content}{END}", [*content, {"type": "text", "text": END}])


def _without_tools(prompt: _Prompt, guard: Guard) -> Iterator[Message]:
    """The messages with tools, calls and answers written as Llama 3.2's template writes them."""
    tools_text = ""
    if prompt.tools:
        listed = "".join(f"{_to_json(tool, indent=4)}\n\n" for tool in prompt.tools)
        tools_text = f"{TOOLS_TEXT}{listed}"
    for message in prompt.messages:
        if message.role == "user" and tools_text:
            first = message.parts[0] if message.parts else ""
            rest = message.parts[1:]
            parts = (
                (tools_text + first.lstrip(), *rest)
                if isinstance(first, str)
                else (tools_text, *message.parts)
            )
            message, tools_text = replace(message, parts=parts), ""
        elif message.calls:
            (call,) = message.calls
            arguments = guard.value(call.arguments, "arguments")
            text = _to_json({"name": call.name, "parameters": arguments})
            message = replace(message, parts=(text,), is_string=True, calls=())
        elif message.role == "tool":
            message = replace(message, role="ipython", parts=(_to_json(message.text),))
        yield message
    if tools_text:
        raise RequestError("tools need a message of the user")


def _compile(source: str) -> Template:
    """The template, in the dialect that `transformers` gives chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    from .sandbox import MAX_SOURCE, Sandbox, TooMuch, limited

    class Generation(Extension):
        """Marks what the assistant said, for training. Here it says nothing."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    if len(source) > MAX_SOURCE:
        raise ModelError(f"the chat template has {len(source)} characters; {MAX_SOURCE} are allowed")
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.add_filter("tojson", _to_json)
    try:
        return limited(lambda: environment.from_string(source))
    except (TooMuch, MemoryError) as e:
        raise ModelError(f"the chat template cannot be used: {one_line(e)}") from e
    except (TemplateError, RecursionError, SyntaxError, ValueError, OverflowError) as e:
        raise RequestError(f"the chat template is not valid: {one_line(e)}") from e


def _to_json(value: Any, **options: Any) -> str:
    """As Python writes it, not as Jinja does for web pages."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(words: object) -> None:
    raise ValueError(words)
