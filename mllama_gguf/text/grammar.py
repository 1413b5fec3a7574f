"""What a reply must follow: a JSON schema, a regular expression, a GBNF or a Lark grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RequestError

# Between the parts of JSON stands nothing, one blank, or a new line with its indent: without a bound a model
# may write blanks until max_tokens.
_JSON: Any = {
    "whitespace_pattern": r"\x20|\n\x20{0,16}",
    # A character has one spelling only, so that no name of a property is written twice in two ways.
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
    "coerce_one_of": False,
}

Kind = Literal["json", "gbnf", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What a reply must follow.

    kind:   how it was written
    source: what llguidance reads: JSON text
    """

    kind: Kind
    source: str

    @property
    def is_json(self) -> bool:
        """Whether every reply is JSON. It ends where its JSON ends; no stop string ends it earlier."""
        return self.kind == "json"


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
        return json_schema(response_format.get("schema", {"type": "object"}))
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        if not isinstance(inner, Mapping) or inner.get("schema") is None:
            raise RequestError('response_format "json_schema" needs json_schema.schema')
        return json_schema(inner["schema"])
    if kind == "regex":
        return regex(_text(response_format, "regex"))
    if kind == "lark":
        return lark(_text(response_format, "grammar"))
    if kind == "gbnf":
        return gbnf(_text(response_format, "grammar"))
    raise RequestError(
        f'response_format type {kind!r}: expected "text", "json_object", "json_schema", "regex", "gbnf" or '
        '"lark"'
    )


def json_schema(schema: Any) -> Grammar:
    """JSON that fits a schema. Raises RequestError for a schema that cannot be obeyed."""
    from llguidance import LLMatcher

    try:
        text = json.dumps(schema)
        if isinstance(schema, bool):
            return Grammar("json", json.dumps({"grammars": [{"json_schema": schema}]}))
        return Grammar("json", LLMatcher.grammar_from_json_schema(text, overrides=_JSON))
    except (TypeError, ValueError, RecursionError) as e:
        raise RequestError(f"JSON schema cannot be used: {' '.join(str(e).split())}") from e


def regex(expression: str) -> Grammar:
    """Text that a regular expression matches from its first to its last character."""
    from llguidance import LLMatcher

    return Grammar("regex", LLMatcher.grammar_from_regex(expression))


def lark(text: str) -> Grammar:
    """Text of a Lark grammar, in llguidance's dialect; it begins with `start`."""
    return Grammar("lark", json.dumps({"grammars": [{"lark_grammar": text}]}))


def gbnf(text: str) -> Grammar:
    """Text of a GBNF grammar, llama.cpp's notation; it begins with `root`."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return Grammar("gbnf", lark(gbnf_to_lark(text)).source)
    except Exception as e:  # of no common class
        raise RequestError(f"the grammar is not GBNF that can be used: {' '.join(str(e).split())}") from e


def _text(response_format: Mapping[str, Any], key: str) -> str:
    text = response_format.get(key)
    if not isinstance(text, str) or not text:
        raise RequestError(f'response_format "{response_format["type"]}" needs "{key}", a string')
    return text
