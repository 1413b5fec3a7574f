"""What a reply must follow: a JSON schema, a regular expression, a GBNF or a Lark grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RequestError
from ..words import brief, one_line
from .gbnf import MAX_CHARACTERS, MAX_RULES, to_lark
from .pattern import whole
from .schema import readable
from .validation import Work, check_schema

Kind = Literal["json", "regex", "gbnf", "lark"]

# Between the parts of JSON stands nothing, one blank, or a new line with its indent: without a bound a model
# may write blanks until max_tokens.
_JSON_OPTIONS = {
    "whitespace_pattern": r"\x20|\n\x20{0,16}",
    # A character has one spelling only, so that the name of a property cannot come twice in two spellings.
    "json_allowed_escapes": 'nrbtf\\"',
}
# Without it llguidance looks for the tokens of the whole text that must follow, however long that is.
_LARK_OPTIONS = '%llguidance {"no_forcing": true}'


@dataclass(frozen=True)
class Grammar:
    """What a reply must follow.

    kind:   how it was given
    source: what llguidance reads
    schema: of kind "json", the schema as it was given
    """

    kind: Kind
    source: str
    schema: Any = field(default=None, compare=False, repr=False)

    @property
    def is_json(self) -> bool:
        """Whether every reply is JSON. It ends where its JSON ends; no stop string ends it earlier."""
        return self.kind == "json"

    def check(self, text: str) -> None:
        """Raise RequestError if a complete reply is not what the grammar promised.

        llguidance has made it so. This is a second look at JSON, with jsonschema, but without patterns: a
        pattern can take Python's `re` hours, and llguidance reads them exactly (see text/pattern.py).
        """
        if self.is_json:
            from .validation import check

            check(text, self.schema)


def grammar_of(response_format: Mapping[str, Any] | None, grammar: str | None) -> Grammar | None:
    """The grammar that a reply must follow, or None.

    response_format: None, or one of
        {"type": "text"}
        {"type": "json_object"}, {"type": "json_object", "schema": {...}}
        {"type": "json_schema", "json_schema": {"schema": {...}}}
        {"type": "regex", "regex": "..."}
        {"type": "gbnf", "grammar": "..."}
        {"type": "lark", "grammar": "..."}
    grammar:         GBNF text

    Raises RequestError for another format, for what cannot be obeyed, and for both at the same time.
    """
    if grammar is not None and not (isinstance(grammar, str) and grammar.strip()):
        raise RequestError("grammar must be GBNF text")
    given = None if grammar is None else gbnf(grammar)
    if response_format is None:
        return given
    if not isinstance(response_format, Mapping):
        raise RequestError(f"response_format must be a dict, not {type(response_format).__name__}")
    kind = response_format.get("type")
    if kind == "text":
        return given
    if given is not None:
        raise RequestError("response_format and grammar exclude each other")
    if kind == "json_object":
        return json_schema(response_format.get("schema") or {"type": "object"})
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        if not isinstance(inner, Mapping) or inner.get("schema") is None:
            raise RequestError('response_format "json_schema" needs json_schema.schema')
        return json_schema(inner["schema"])
    if kind == "regex":
        return regex(_text(response_format, "regex"))
    if kind == "gbnf":
        return gbnf(_text(response_format, "grammar"))
    if kind == "lark":
        return lark(_text(response_format, "grammar"))
    raise RequestError(
        f'response_format type {brief(kind)}: expected "text", "json_object", "json_schema", "regex", "gbnf" '
        'or "lark"'
    )


def json_schema(schema: Any, work: Work | None = None) -> Grammar:
    """JSON of a schema. Every complete reply passes `jsonschema.validate(json.loads(reply), schema)`.

    work: for `validation.check_schema`

    Raises RequestError for a schema that cannot be obeyed.
    """
    obeyed = {**readable(schema), "x-guidance": _JSON_OPTIONS}
    if schema is not True:
        check_schema(schema, work)
    return Grammar("json", json.dumps({"grammars": [{"json_schema": obeyed}]}), schema)


def regex(expression: str) -> Grammar:
    """Text of a regular expression in Python's notation. Every complete reply passes `re.fullmatch`.

    Raises RequestError for an expression that cannot be obeyed.
    """
    return _lark("regex", f"start: /{whole(expression)}/" if expression else 'start: ""')


def gbnf(grammar: str) -> Grammar:
    """Text of a GBNF grammar, llama.cpp's notation; see `text.gbnf.to_lark`.

    Raises RequestError for a grammar that cannot be obeyed.
    """
    return _lark("gbnf", to_lark(grammar))


def lark(grammar: str) -> Grammar:
    """Text of a Lark grammar in llguidance's dialect; it begins with the rule `start`.

    Raises RequestError for a grammar that is too large. What else is wrong is found when a reply begins.
    """
    if len(grammar) > MAX_CHARACTERS:
        raise RequestError(f"a grammar of {len(grammar)} characters; {MAX_CHARACTERS} are allowed")
    if re.search(r"%\s*json\b", grammar):
        raise RequestError(
            "a Lark grammar with %json cannot be obeyed; give the schema alone, as json_schema"
        )
    # Every rule may be within another; llguidance has no bound of its own, and ends the process.
    rules = len(re.findall(r"(?m)^[ \t]*[?!]?\w[^:\n]*:", grammar))
    if rules > MAX_RULES:
        raise RequestError(f"a grammar of {rules} rules; {MAX_RULES} are allowed")
    return _lark("lark", grammar)


def _lark(kind: Kind, text: str) -> Grammar:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(f"the grammar has half of a surrogate pair: {one_line(e)}") from e
    return Grammar(kind, json.dumps({"grammars": [{"lark_grammar": f"{text}\n{_LARK_OPTIONS}\n"}]}))


def _text(response_format: Mapping[str, Any], key: str) -> str:
    text = response_format.get(key)
    if not isinstance(text, str) or not text:
        raise RequestError(f'response_format "{response_format["type"]}" needs "{key}", a text')
    return text
