"""GBNF grammars, llama.cpp's notation, made ready for llguidance's converter to Lark.

The converter reads some escapes, classes and names in another way than llama.cpp does. Large grammars take it
much time or all of the stack. So a grammar is cut into its words here, which are counted and written again
in a form that means the same to both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import RequestError
from ..words import brief, one_line

MAX_CHARACTERS = 32_768
MAX_RULES = 400
MAX_NESTING = 50
MAX_REPEAT = 10_000

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_WORD = re.compile(
    r"""(?P<comment>\#[^\r\n]*)
      | (?P<text>"(?:[^"\\]|\\.)*")
      | (?P<set>\[(?:[^\]\\]|\\.)*\])
      | (?P<name>[^\W]+(?:[-\w]*))
      | (?P<repeat>\{[^{}]*\})
      | (?P<is>::=)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL)


def to_lark(grammar: str) -> str:
    """A GBNF grammar as Lark, of which `start` is GBNF's `root`.

    A grammar without recursion becomes one regular expression, and means exactly what it means to llama.cpp.
    In others the rules without recursion become words, which end as late as they can.

    Raises RequestError for a grammar that is too large, or that the converter does not take.
    """
    if len(grammar) > MAX_CHARACTERS:
        raise RequestError(f"a grammar of {len(grammar)} characters; {MAX_CHARACTERS} are allowed")
    if any(_SURROGATES[0] <= ord(c) <= _SURROGATES[1] for c in grammar):
        raise RequestError("the grammar has half of a surrogate pair")
    from llguidance.gbnf_to_lark import gbnf_to_lark

    _check_size(grammar)
    try:
        return str(gbnf_to_lark(_plain(grammar)))
    except RequestError:
        raise
    except Exception as e:  # of no common class
        words: object = e
        try:  # for words about the grammar as it was given
            gbnf_to_lark(grammar)
        except Exception as original:
            words = original
        raise RequestError(f"the grammar is not GBNF that can be used: {one_line(words)}") from e


def _words(grammar: str) -> Iterator[tuple[str, str]]:
    for match in _WORD.finditer(grammar):
        assert match.lastgroup is not None
        yield match.lastgroup, match[0]


def _check_size(grammar: str) -> None:
    rules = nesting = 0
    for kind, word in _words(grammar):
        rules += kind == "is"
        nesting += (word == "(") - (word == ")")
        if kind == "other" and word in '"[':
            raise RequestError(f"the grammar has a {word} without its end")
        if rules > MAX_RULES:
            raise RequestError(f"a grammar of more than {MAX_RULES} rules")
        if nesting > MAX_NESTING:
            raise RequestError(f"the grammar is nested more than {MAX_NESTING} times")


def _plain(grammar: str) -> str:
    """The grammar in words that mean the same to llama.cpp and to the converter. Rules get numbers, so that
    no two names become the same."""
    names: dict[str, str] = {}
    defined = {name for name, rest in re.findall(r"(?m)^[^\S\n]*([\w-]+)\s*(::=)", grammar) if rest}
    if "root" not in defined:
        raise RequestError("the grammar has no rule 'root'")
    parts = []
    for kind, word in _words(grammar):
        if kind == "comment":
            continue
        if kind == "name":
            word = names.setdefault(word, f"rule-{len(names)}")
        elif kind == "text":
            word = f'"{"".join(_in_text(c) for c in _characters(word[1:-1]))}"'
        elif kind == "set":
            word = _set(word[1:-1])
        elif kind == "repeat":
            _check_repeat(word)
        elif word == ".":
            word = _ANY
        elif word == "(":
            word = '("" '  # else the converter writes ("a"{2}){3} as "a"{2}{3}
        parts.append(word)
    for name in names:
        if name not in defined:
            raise RequestError(f"the grammar has no rule {brief(name)}")
    # The converter turns a grammar without recursion into one regular expression, but not its first rule.
    return f"root ::= {names['root']}\n{''.join(parts)}"


def _characters(text: str) -> list[int]:
    found = []
    for match in _CHARACTER.finditer(text):
        number = match[1] or match[2] or match[3]
        if number:
            code = int(number, 16)
        elif match[4] is not None:
            if match[4] not in _ESCAPES:
                raise RequestError(f"the grammar has the unknown escape {brief(match[0])}")
            code = ord(_ESCAPES[match[4]])
        else:
            code = ord(match[5])
        if code > _LAST or _SURROGATES[0] <= code <= _SURROGATES[1]:
            raise RequestError(f"the grammar has {brief(match[0])}, which is not a character")
        found.append(code)
    return found


def _in_text(code: int) -> str:
    c = chr(code)
    if c in '"\\':
        return f"\\{c}"
    return c if c.isprintable() else f"\\x{code:02x}" if code < 0x80 else c


def _set(inside: str) -> str:
    """A class, in which no character has another meaning to a regular expression."""
    negated = inside.startswith("^")
    ranges = []
    pieces = list(_CHARACTER.finditer(inside[1:] if negated else inside))
    i = 0
    while i < len(pieces):
        (low,) = _characters(pieces[i][0])
        high = low
        if i + 2 < len(pieces) and pieces[i + 1][0] == "-":
            (high,) = _characters(pieces[i + 2][0])
            i += 2
        if high < low:
            raise RequestError(f"the grammar has the class {brief(f'[{inside}]')}, which has an empty range")
        ranges.append((low, high))
        i += 1
    if not ranges:
        if negated:
            return _ANY
        raise RequestError("the grammar has an empty character class")
    if negated and _covers_all(ranges):
        raise RequestError("the grammar has an empty character class")
    return f"[{'^' * negated}{''.join(_range(low, high) for low, high in ranges)}]"


def _covers_all(ranges: list[tuple[int, int]]) -> bool:
    end = 0
    for low, high in sorted(ranges):
        if low > end and not (end == _SURROGATES[0] and low == _SURROGATES[1] + 1):
            return False
        end = max(end, high + 1)
    return end > _LAST


def _range(low: int, high: int) -> str:
    first, last = _SURROGATES
    if low < first and high > last:
        return _range(low, first - 1) + _range(last + 1, high)
    return _in_set(low) if low == high else f"{_in_set(low)}-{_in_set(high)}"


def _in_set(code: int) -> str:
    c = chr(code)
    return c if c.isalnum() or code >= 0x80 else f"\\x{code:02x}"


def _check_repeat(word: str) -> None:
    match = re.fullmatch(r"\{\s*([0-9]{1,6})\s*(?:,\s*([0-9]{1,6})?\s*)?\}", word)
    if match is None:
        raise RequestError(f"the grammar has {brief(word)}, not a repetition of at most {MAX_REPEAT}")
    low, high = int(match[1]), int(match[2] or match[1])
    if high > MAX_REPEAT or low > MAX_REPEAT or (match[2] and high < low):
        raise RequestError(
            f"the grammar has {brief(word)}; a repetition is {{least,most}}, up to {MAX_REPEAT}"
        )


_ANY = f"[{_range(0, _LAST)}]"
