"""Checks of single values: what a caller or the command line may give, and its plain form.

NumPy's numbers are numbers. True and False are not.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from .errors import RequestError
from .words import brief

if TYPE_CHECKING:
    from pathlib import Path

MAX_WORKERS = 16
_LARGEST_WHOLE = 2**31 - 1  # what C's int32_t holds


class Check(Protocol):
    """What the values of a setting are."""

    @property
    def words(self) -> str:
        """What a value must be, as in "must be ..."."""

    def read(self, value: Any) -> Any:
        """The value in its plain form. Raises ValueError, with words of its own or with none."""

    def parse(self, words: str) -> Any:
        """The value that words on the command line stand for, not yet checked. Raises ValueError."""

    def show(self, value: Any) -> str:
        """A value as words on the command line."""


class Whole:
    """Whole numbers, those of NumPy too. word: a word that may stand in place of a number."""

    def __init__(self, least: int, most: int = _LARGEST_WHOLE, word: str = "") -> None:
        self.least, self.most, self.word = least, most, word

    @property
    def words(self) -> str:
        word = f", or {self.word!r}" if self.word else ""
        if self.most < _LARGEST_WHOLE:
            return f"a whole number from {self.least} to {self.most}{word}"
        return f"a whole number of at least {self.least}{word}"

    def read(self, value: Any) -> int | str:
        if self.word and isinstance(value, str) and value.lower() == self.word:
            return self.word
        number = _whole(value)
        if not self.least <= number <= self.most:
            raise ValueError
        return number

    def parse(self, words: str) -> int | str:
        return words if self.word and words.lower() == self.word else int(words)

    def show(self, value: Any) -> str:
        return str(value)


class AnyWhole:
    """Whole numbers of any size, those of NumPy too."""

    words = "a whole number"

    def read(self, value: Any) -> int:
        return _whole(value)

    def parse(self, words: str) -> int:
        return int(words)

    def show(self, value: Any) -> str:
        return str(value)


class Number:
    """Numbers between two bounds, which are numbers that it takes too."""

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    @property
    def words(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"

    def read(self, value: Any) -> float:
        number = _number(value)
        if not self.least <= number <= self.most:
            raise ValueError
        return number

    def parse(self, words: str) -> float:
        return float(words)

    def show(self, value: Any) -> str:
        return f"{value:g}"


class Seconds:
    """Finite seconds above 0."""

    words = "seconds above 0"

    def read(self, value: Any) -> float:
        seconds = _number(value)
        if seconds <= 0:
            raise ValueError
        return seconds

    def parse(self, words: str) -> float:
        return float(words)

    def show(self, value: Any) -> str:
        return f"{value:g}"


class Switch:
    """True or False."""

    words = "True or False"

    def read(self, value: Any) -> bool:
        if not _is_bool(value):
            raise ValueError
        return bool(value)

    def parse(self, words: str) -> bool:
        if words.lower() not in ("on", "off"):
            raise ValueError
        return words.lower() == "on"

    def show(self, value: Any) -> str:
        return "on" if value else "off"


class Choice:
    """One of a few words."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError
        return str(value)

    def parse(self, words: str) -> str:
        return words.lower()

    def show(self, value: Any) -> str:
        return str(value)


class Text:
    """Words that are not empty. words: what they are."""

    def __init__(self, words: str) -> None:
        self.words = words

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError
        return str(value)

    def parse(self, words: str) -> str:
        return words

    def show(self, value: Any) -> str:
        return str(value)


class Names:
    """A list of names."""

    words = "a list of names, as in ['CUDA0', 'CUDA1']"

    def read(self, value: Any) -> tuple[str, ...]:
        names = _items(value)
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError
        return tuple(str(name).strip() for name in names)

    def parse(self, words: str) -> list[str]:
        return [word for word in words.split(",") if word.strip()]

    def show(self, value: Any) -> str:
        return ",".join(value)


class Shares:
    """A list of numbers of at least 0."""

    words = "a list of numbers of at least 0, as in (3, 1)"

    def read(self, value: Any) -> tuple[float, ...]:
        shares = tuple(_number(share) for share in _items(value))
        if any(share < 0 for share in shares):
            raise ValueError
        return shares

    def parse(self, words: str) -> list[float]:
        return [float(word) for word in re.split(r"[,/]", words)]

    def show(self, value: Any) -> str:
        return ",".join(f"{share:g}" for share in value)


class Workers:
    """Addresses of workers: a list, or words with commas in between."""

    words = 'a list of "host:port"'

    def read(self, value: Any) -> tuple[str, ...]:
        listed = self.parse(value) if isinstance(value, str) else _items(value)
        if not all(isinstance(worker, str) for worker in listed):
            raise ValueError
        workers = tuple(str(worker).strip() for worker in listed)
        for worker in workers:
            match = re.fullmatch(r"[^\s:]+:(\d{1,5})", worker, re.ASCII)
            if not match or not 1 <= int(match[1]) <= 65535:
                raise ValueError(f"{brief(worker)} is not host:port, as in 127.0.0.1:50052")
        if len(set(workers)) < len(workers):
            raise ValueError("a worker is named twice")
        if len(workers) > MAX_WORKERS:
            raise ValueError(f"{len(workers)} workers; at most {MAX_WORKERS} are possible")
        return workers

    def parse(self, words: str) -> list[str]:
        return words.split(",") if words.strip() else []

    def show(self, value: Any) -> str:
        return ",".join(value)


class File:
    """The path of a file."""

    words = "the path of a file"

    def read(self, value: Any) -> str:
        path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
        if not isinstance(path, str) or not path or "\0" in path:
            raise ValueError
        return path

    def parse(self, words: str) -> str:
        return words

    def show(self, value: Any) -> str:
        return str(value)


class Folder:
    """True, False, or the path of a folder."""

    words = "True, False or a folder"

    def read(self, value: Any) -> bool | Path:
        if _is_bool(value):
            return bool(value)
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError
        from pathlib import Path

        return Path(os.fsdecode(value))

    def parse(self, words: str) -> str:
        return words

    def show(self, value: Any) -> str:
        return str(value)


def check_function(name: str, function: object) -> None:
    """Raise RequestError for what is neither a function nor None."""
    if function is not None and not callable(function):
        raise RequestError(f"{name} must be a function or None, not {brief(function)}")


def whole_numbers(name: str, values: Any) -> list[int]:
    """Some whole numbers, those of NumPy too. Raises RequestError that names them."""
    try:
        return [_whole(value) for value in _items(values)]
    except ValueError:
        raise RequestError(f"{name} must be a list of whole numbers, not {brief(values)}") from None


def is_zero(value: object) -> bool:
    """Whether this is the whole number 0."""
    try:
        return _whole(value) == 0
    except ValueError:
        return False


def _is_bool(value: object) -> bool:
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def _whole(value: Any) -> int:
    if _is_bool(value):
        raise ValueError
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError from None


def _number(value: Any) -> float:
    from numbers import Real

    if _is_bool(value) or not isinstance(value, Real):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _items(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError
    try:
        return list(value)
    except TypeError:  # an array without dimensions
        raise ValueError from None


def checked(name: str, check: Check, value: Any, *, or_none: bool = False) -> Any:
    """A value in its plain form. or_none: None is one too, and stays. Raises RequestError that names it."""
    if or_none and value is None:
        return None
    try:
        return check.read(value)
    except ValueError as e:
        words = str(e) or f"must be {check.words}{', or None' if or_none else ''}, not {brief(value, 300)}"
        raise RequestError(f"{name}{':' if str(e) else ''} {words}") from None
