"""Jinja templates that somebody else wrote: they can neither reach out of their variables, nor run for
ever, nor fill the memory.

Jinja's sandbox does the first. The others are bounded here: the lines of Python that a rendering may run, and
the size of every text, list and number that it makes. Both are far above what a chat needs, and do not depend
on how fast the machine is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import FrameType
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

T = TypeVar("T")

MAX_LINES = 2_000_000  # of Python in one rendering; a second
MAX_SIZE = 32_000_000  # characters of a text, items of a list; a prompt has a few hundred thousand
MAX_ITEMS = 200_000  # texts and lists within each other
MAX_NUMBER = 100_000  # as an argument of a function or filter
MAX_BITS = 4096  # of whole numbers
MAX_SOURCE = 1_000_000  # characters of a template

_TOO_LARGE = "it makes a text, a list or a number that is too large"
_WIDE = re.compile(r"\d{6}|\*")  # in a format: a width
# What turns all of its value to text.
_WRITING = (
    "string join format replace indent center wordwrap pprint trim upper lower title capitalize tojson safe "
    "escape e forceescape urlencode striptags truncate xmlattr wordcount filesizeformat reverse batch slice "
    "sum round"
)
_GROWING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice"}
)


class TooMuch(SecurityError):
    """The template wants more than a chat needs."""


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for templates of others. Render them with `limited`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_small, **options)
        self.code_generator_class = _Generator
        for name in ("urlize", "random"):
            del self.filters[name]
        del self.globals["lipsum"]
        for name in _WRITING.split():
            self.add_filter(name, self.filters[name])

    def add_filter(self, name: str, filter: Callable[..., Any]) -> None:
        """A filter whose values and arguments are bounded."""

        @wraps(filter)  # Jinja's marks of what a filter wants to be given as well
        def bounded(*given: Any, **named: Any) -> Any:
            _check_call(name, [*given, *named.values()])
            return _small(filter(*given, **named))

        self.filters[name] = bounded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, bytes, list, tuple)) and isinstance(other, int):
                    _check(_size(one) * max(other, 0) <= MAX_SIZE)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * max(right, 0) <= MAX_BITS)
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(left, [right])
        return _small(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, (str, bytes)):
            _check_call(name, [owner, *args, *kwargs.values()])
        else:
            _check_numbers([*args, *kwargs.values()])
        return _small(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped: Callable[..., str] | None = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form, do = value.__self__, wrapped

        def bounded(*given: Any, **named: Any) -> str:
            _check_format(form, [*given, *named.values()])
            return do(*given, **named)

        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in ("translate", "maketrans") and super().is_safe_attribute(obj, attr, value)

    def concatenated(self, parts: Iterable[Any]) -> str:
        """The result of `~`."""
        texts = []
        size = 0
        for part in parts:
            texts.append(str(_small(part)))
            size += len(texts[-1])
            _check(size <= MAX_SIZE)
        return "".join(texts)


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def limited(render: Callable[[], T]) -> T:
    """What `render` returns. Raises TooMuch once it has run too many lines, and what it raises."""
    rest = MAX_LINES

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        nonlocal rest
        if frame.f_code.co_filename == __file__:  # bounded by itself
            return None
        rest -= 1
        if rest <= 0:
            raise TooMuch("it does not come to an end")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return render()
    finally:
        sys.settrace(before)


def _check(fits: bool) -> None:
    if not fits:
        raise TooMuch(_TOO_LARGE)


def _check_numbers(values: Iterable[Any]) -> None:
    _check(all(not isinstance(value, int) or abs(value) <= MAX_NUMBER for value in values))


def _check_format(form: str | bytes, values: Iterable[Any]) -> None:
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    _check(not _WIDE.search(text))
    _check(text.count("%") + text.count("{") < 1000)
    _check(sum(_size(value) for value in values) * max(1, text.count("%") + text.count("{")) <= MAX_SIZE)


def _check_call(name: str, values: list[Any]) -> None:
    """Check a call of a text's method, or of a filter: the first value is what it is applied to."""
    _check_numbers(values[1:])
    size = sum(_size(value) for value in values)
    _check(size <= MAX_SIZE)
    numbers = [value for value in values[1:] if isinstance(value, int)]
    if name in _GROWING and numbers:
        _check(_size(values[0]) * max(1, *numbers) <= MAX_SIZE)
    elif name == "tojson":
        _check(all(number <= 100 for number in numbers))
    elif name in ("format", "format_map"):
        _check_format(str(values[0]), values[1:])
    elif name == "replace":
        texts = [value for value in values if isinstance(value, (str, bytes))]
        if len(texts) >= 3:
            _check((str(texts[0]).count(str(texts[1])) + 1) * len(texts[2]) <= MAX_SIZE)
    elif name == "join":
        texts = [value for value in values if isinstance(value, (str, bytes))]
        others = [value for value in values if isinstance(value, (list, tuple, dict))]
        _check(sum(map(len, texts)) * (1 + sum(map(len, others))) <= MAX_SIZE)


def _small(value: Any) -> Any:
    """The value, if it is not too large."""
    _check(_size(value) <= MAX_SIZE)
    return value


def _size(value: Any) -> int:
    """Characters and items of a value as text; more than MAX_SIZE if they are too many to count."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        _check(value.bit_length() <= MAX_BITS)
        return 1
    if not isinstance(value, (list, tuple, Mapping)):
        return 1
    size, rest, steps = 0, [value], 0
    while rest:
        one = rest.pop()
        steps += 1
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif isinstance(one, (list, tuple)):
            size += len(one)
            rest.extend(one)
        elif isinstance(one, Mapping):
            size += 2 * len(one)
            rest.extend(one.keys())
            rest.extend(one.values())
        if size > MAX_SIZE or steps > MAX_ITEMS:
            return MAX_SIZE + 1
    return size
