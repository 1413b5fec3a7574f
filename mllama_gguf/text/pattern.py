"""Regular expressions: from Python's notation to one that llguidance reads the same way.

JSON schemas use JavaScript's expressions, jsonschema checks them with Python's `re`, and llguidance has a
third dialect. They differ in what `\\d`, `\\s`, `.` and `$` match. The expressions made here name every
character, so that no dialect is left, and match only text that both JavaScript and Python match.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, Literal

from ..errors import RequestError
from ..words import brief, one_line

# Python's own parser of expressions. It has no public name, and has been the same for 20 years.
sre_parse: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_LENGTH = 8192  # characters of an expression
MAX_PARTS = 4096
MAX_NESTING = 64
MAX_REPEAT = 1_000_000  # the numbers of {m,n}
MAX_SHORTEST = 10_000  # characters of the shortest text that fits: llguidance is slow with long fixed text

Ranges = list[tuple[int, int]]  # of code points, both ends included
Side = Literal["search", "edge", "inside"]  # any text may stand here; the text ends here; neither

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_IDEOGRAPHS = 0x20000  # from here on there are only letters, or nothing yet
_ANY_TEXT = "(?s:.*)"
_LAST_LINE_END = "(?:\\x{A})?"  # before which Python's $ matches too
# JavaScript's `.` matches none of these, Python's the second. (Neither does JavaScript's match U+2028 and
# U+2029, but llguidance is 50 times as fast if they need not be left out.)
_LINE_ENDS = [(0x0A, 0x0A), (0x0D, 0x0D)]
_NARROW = {  # what a class matches in both dialects
    "DIGIT": [(0x30, 0x39)],
    "WORD": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "SPACE": [(0x09, 0x0D), (0x20, 0x20)],
}
_REFUSED = {
    "ASSERT": "look-ahead and look-behind",
    "ASSERT_NOT": "look-ahead and look-behind",
    "GROUPREF": "a reference to a group",
    "GROUPREF_EXISTS": "a reference to a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repetition",
}

# Control characters for which JSON has no escape of one letter.
_UNWRITTEN = [(0x00, 0x07), (0x0B, 0x0B), (0x0E, 0x1F), (0x7F, 0x7F)]


def whole(expression: str) -> str:
    """The expression of those texts that `re.fullmatch` matches from the first to the last character.

    Raises RequestError for an expression that is not valid, too large, or cannot be obeyed.
    """
    return _Translator(expression).translate("edge")


def searched(expression: str) -> str:
    """The expression of those whole texts in which `re.search` finds a match, as JSON schemas mean `pattern`.

    Raises RequestError for an expression that is not valid, too large, or cannot be obeyed.
    """
    return _Translator(expression, json=True).translate("search")


def named(expression: str) -> str:
    """As `searched`, but exactly what Python matches, for names of properties: of a name that does not match
    other things are asked."""
    return _Translator(expression, exact=True, json=True).translate("search")


class _Translator:
    def __init__(self, expression: str, exact: bool = False, json: bool = False) -> None:
        self._name = brief(expression)
        self._exact = exact
        self._json = json
        if len(expression) > MAX_LENGTH:
            raise RequestError(
                f"regular expression {self._name} has {len(expression)} characters; {MAX_LENGTH} are allowed"
            )
        if any(_SURROGATES[0] <= ord(c) <= _SURROGATES[1] for c in expression):
            raise RequestError(f"regular expression {self._name} has half of a surrogate pair")
        try:
            with warnings.catch_warnings():  # of classes such as [[a]
                warnings.simplefilter("ignore")
                tree = sre_parse.parse(expression)
        except re.error as e:
            raise RequestError(f"regular expression {self._name} is not valid: {one_line(e)}") from e
        except (RecursionError, OverflowError) as e:
            raise RequestError(f"regular expression {self._name} is nested or repeated too much") from e
        flags = tree.state.flags & ~re.UNICODE
        self._dot_all = bool(flags & re.DOTALL)
        if flags & ~re.DOTALL:
            raise self._refuse("a flag such as (?i)")
        self._items: Sequence[Any] = tree.data
        self._shortest = int(tree.getwidth()[0])
        self._parts = 0

    def translate(self, side: Side) -> str:
        if self._shortest > MAX_SHORTEST:
            raise RequestError(
                f"regular expression {self._name} needs at least {self._shortest} characters of text; "
                f"{MAX_SHORTEST} are allowed"
            )
        try:
            return self._edges(self._items, side, side, 0)
        except RecursionError as e:
            raise RequestError(f"regular expression {self._name} is nested too much") from e

    def _edges(self, items: Sequence[Any], left: Side, right: Side, depth: int) -> str:
        """A sequence, of which the first may begin with ^ and the last may end with $."""
        items = list(items)
        while items and _is_anchor(items[0], "AT_BEGINNING"):
            left = self._anchored("^", left)
            del items[0]
        end = ""
        while items and _is_anchor(items[-1], "AT_END"):
            right = self._anchored("$", right)
            end = _LAST_LINE_END if self._exact else ""
            del items[-1]
        if not items:
            return _ANY_TEXT if "search" in (left, right) else end
        if len(items) == 1:
            return self._edge(items[0], left, right, depth) + end
        first = self._edge(items[0], left, "inside", depth)
        middle = "".join(self._part(item, depth) for item in items[1:-1])
        return first + middle + self._edge(items[-1], "inside", right, depth) + end

    def _edge(self, item: Any, left: Side, right: Side, depth: int) -> str:
        if not _has_anchor([item]):
            before, after = (_ANY_TEXT if side == "search" else "" for side in (left, right))
            return before + self._part(item, depth) + after
        self._count(depth)
        name, value = str(item[0]), item[1]
        if name == "AT" and "BOUNDARY" in str(value):
            raise self._refuse("a word boundary")
        if name == "SUBPATTERN":
            self._check_flags(value)
            return f"(?:{self._edges(value[3], left, right, depth + 1)})"
        if name == "BRANCH":
            return f"(?:{'|'.join(self._edges(one, left, right, depth + 1) for one in value[1])})"
        raise self._refuse("^ or $ in the middle" if name == "AT" else "^ or $ in a repetition")

    def _anchored(self, anchor: str, side: Side) -> Side:
        if side == "inside":
            raise self._refuse(f"{anchor} in the middle")
        return "edge"

    def _part(self, item: Any, depth: int) -> str:
        """An item without anchors."""
        self._count(depth)
        name, value = str(item[0]), item[1]
        if name == "LITERAL":
            self._written([(value, value)])
            return _character(value)
        if name == "NOT_LITERAL":
            return _class(_complement([(value, value)]))
        if name == "ANY":
            return _class(_complement([] if self._dot_all else _LINE_ENDS[:1] if self._exact else _LINE_ENDS))
        if name == "IN":
            return self._set(value)
        if name == "SUBPATTERN":
            self._check_flags(value)
            return self._sequence(value[3], depth)
        if name == "BRANCH":
            return f"(?:{'|'.join(self._sequence(one, depth, bare=True) for one in value[1])})"
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(value, depth)
        if name == "AT":
            raise self._refuse("a word boundary" if "BOUNDARY" in str(value) else "^ or $ in the middle")
        raise self._refuse(_REFUSED.get(name, name))

    def _sequence(self, items: Sequence[Any], depth: int, bare: bool = False) -> str:
        text = "".join(self._part(item, depth + 1) for item in items)
        return text if bare else f"(?:{text})"

    def _repeat(self, value: Any, depth: int) -> str:
        low, high, items = value
        unbounded = high is sre_parse.MAXREPEAT
        if low > MAX_REPEAT or (not unbounded and high > MAX_REPEAT):
            raise self._refuse(f"a repetition above {MAX_REPEAT}")
        text = self._sequence(items, depth)
        if unbounded and low in (0, 1):
            return text + "*+"[low]
        if (low, high) == (0, 1):
            return f"{text}?"
        return f"{text}{{{low},{'' if unbounded else high}}}"

    def _set(self, members: Sequence[Any]) -> str:
        negated = str(members[0][0]) == "NEGATE"
        ranges: Ranges = []
        for kind, value in members[1:] if negated else members:
            name = str(kind)
            if name == "LITERAL":
                ranges.append((value, value))
            elif name == "RANGE":
                ranges.append(value)
            else:
                ranges += _category(str(value), wide=negated, exact=self._exact)
        self._parts += len(ranges) // 8
        found = _complement(ranges) if negated else _joined(ranges)
        if not found:
            raise self._refuse("an empty character class")
        return _class(self._written(found))

    def _written(self, ranges: Ranges) -> Ranges:
        """Those characters of a class that llguidance writes in JSON: it leaves out those without an escape
        of one letter, and takes quotes for members of a class that has all below the blank."""
        if not self._json:
            return ranges
        found = _complement(_joined([*_complement(ranges), *_UNWRITTEN]))
        if not found:
            raise self._refuse(f"the character {chr(ranges[0][0])!r} in JSON")
        return found

    def _count(self, depth: int) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS or depth > MAX_NESTING:
            raise RequestError(
                f"regular expression {self._name} is too large: {MAX_PARTS} parts, {MAX_NESTING} of them "
                "nested, are allowed"
            )

    def _check_flags(self, value: Any) -> None:
        if value[1] or value[2]:
            raise self._refuse("a flag such as (?i:...)")

    def _refuse(self, what: str) -> RequestError:
        return RequestError(f"regular expression {self._name}: {what} cannot be obeyed")


def _is_anchor(item: Any, which: str) -> bool:
    return str(item[0]) == "AT" and str(item[1]) == which


def _has_anchor(items: Sequence[Any]) -> bool:
    for kind, value in items:
        name = str(kind)
        if name == "AT":
            return True
        if name == "SUBPATTERN" and _has_anchor(value[3]):
            return True
        if name == "BRANCH" and any(_has_anchor(one) for one in value[1]):
            return True
        if name.endswith("REPEAT") and _has_anchor(value[2]):
            return True
    return False


# ---- sets of characters ------------------------------------------------------------------------------------


def _category(name: str, wide: bool, exact: bool) -> Ranges:
    """The characters of `\\d` (CATEGORY_DIGIT), `\\D` (CATEGORY_NOT_DIGIT), ...

    wide: those that at least one dialect counts, else those that both do; exact: those that Python counts
    """
    _, _, name = name.partition("_")
    is_other = name.startswith("NOT_")
    name = name.removeprefix("NOT_")
    ranges = _python(name) if exact else _wide(name) if wide != is_other else _NARROW[name]
    return _complement(ranges) if is_other else list(ranges)


@cache
def _python(name: str) -> Ranges:
    pattern = {"DIGIT": r"\d+", "WORD": r"\w+", "SPACE": r"\s+"}[name]
    spans = (match[0] for match in re.finditer(pattern, "".join(map(chr, range(_IDEOGRAPHS)))))
    ranges = [(ord(span[0]), ord(span[-1])) for span in spans]
    return _joined([*ranges, (_IDEOGRAPHS, _LAST)] if name == "WORD" else ranges)


@cache
def _wide(name: str) -> Ranges:
    only_javascript = [(0x180E, 0x180E), (0xFEFF, 0xFEFF)] if name == "SPACE" else []
    return _joined([*_python(name), *only_javascript])


def _joined(ranges: Ranges) -> Ranges:
    """In order, without overlap and without surrogates."""
    joined: Ranges = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    first, last = _SURROGATES
    return [
        piece
        for low, high in joined
        for piece in ((low, min(high, first - 1)), (max(low, last + 1), high))
        if piece[0] <= piece[1]
    ]


def _complement(ranges: Ranges) -> Ranges:
    found: Ranges = []
    begin = 0
    for low, high in sorted(ranges):
        if begin < low:
            found.append((begin, low - 1))
        begin = max(begin, high + 1)
    if begin <= _LAST:
        found.append((begin, _LAST))
    return _joined(found)


def _class(ranges: Ranges) -> str:
    parts = (_character(low) + ("" if low == high else f"-{_character(high)}") for low, high in ranges)
    return f"[{''.join(parts)}]"


def _character(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else f"\\x{{{code:X}}}"
