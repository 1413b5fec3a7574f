"""Schemas drawn at random, for the property tests of JSON replies.

hypothesis-jsonschema draws the values of keywords from JSON schemas of them, hypothesis puts them together.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

Schemas = st.SearchStrategy[Any]

NAMES = ["a", "b", "kind", "x y", "é", "1", 'q"', "line\n", "😀"]
PATTERNS = [
    *(
        "^a",
        "b$",
        "^a|b$",
        '^"$',
        "^[a-c]{2,4}$",
        r"\d+",
        "^(ab|c)*$",
        "[^a]",
        r"^\w+\.\w$",
        "é",
        "x{0,2}y",
        "^$",
    ),
    *(r"\s", r"^\S{1,3}$", r"\D\W", "^.$", "(^|_)a(b|$)", r"^C:\\", "^(?:[1-9][0-9]*|0)$"),
]
NUMBERS: list[Any] = [-10, -3, -1, 0, 1, 2, 3, 7, 10, 100, -2.5, 0.1, 0.5, 1.5, 99.99, 1e3, 12345678901]
VALUES: list[Any] = [None, True, False, 0, 1, -1, 1.0, 0.5, "", "a", "b", 'q"', "C:\\new", "a\nb", "😀", "é"]
VALUES += [[], [1], {}, ["a", None], {"a": 1}, {"a": "b", "kind": 1}, {"kind": "a"}, {"kind": "b"}]
TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]

_COUNT = {"type": "integer", "minimum": 0, "maximum": 4}
_NAMES = {"type": "array", "items": {"enum": NAMES}, "uniqueItems": True, "maxItems": 3}
_BOUNDS = {name: {"enum": NUMBERS} for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")}


def _of(kinds: list[str], **keywords: Any) -> Schemas:
    """Schemas of these types with some of these keywords."""
    return st.fixed_dictionaries(
        {"type": from_schema({"enum": kinds})},
        optional={name: from_schema(value) for name, value in keywords.items()},
    )


_NUMBERS = _of(["integer", "number"], **_BOUNDS, multipleOf={"enum": [1, 2, 3, 7, 0.5, 0.25, 1.5, 2.0]})
_STRINGS = _of(
    ["string"],
    minLength=_COUNT,
    maxLength=_COUNT,
    pattern={"enum": PATTERNS},
    format={"enum": ["date", "time", "date-time", "ipv4", "uuid", "email", "duration", "password"]},
)
_MIXED = st.fixed_dictionaries(
    {},
    optional={
        name: from_schema(value)
        for name, value in {
            "type": {"type": "array", "items": {"enum": TYPES}, "minItems": 1, "uniqueItems": True},
            "minimum": {"enum": NUMBERS},
            "maxLength": _COUNT,
            "minItems": _COUNT,
            "required": _NAMES,
            "enum": {"type": "array", "items": {"enum": VALUES}, "minItems": 1, "maxItems": 4},
        }.items()
    },
)
_LEAVES = st.one_of(
    _NUMBERS,
    _STRINGS,
    _MIXED,
    _of(["null", "boolean"]),
    st.booleans(),
    st.sampled_from(VALUES).map(lambda value: {"const": value}),
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.sampled_from(["#", "#/properties/a", "#/items", "#/anyOf/0", "#/$defs/d"]).map(
        lambda to: {"$ref": to}
    ),
)
_ARRAY_COUNTS = _of(["array"], minItems=_COUNT, maxItems=_COUNT)
_OBJECT_COUNTS = _of(["object"], required=_NAMES, minProperties=_COUNT, maxProperties=_COUNT)


def _nest(inner: Schemas) -> Schemas:
    named = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    some = st.lists(inner, min_size=1, max_size=3)
    arrays = st.fixed_dictionaries({}, optional={"items": inner, "prefixItems": some})
    objects = st.fixed_dictionaries(
        {"properties": named},
        optional={
            "additionalProperties": st.one_of(st.just(False), inner),
            "patternProperties": st.dictionaries(st.sampled_from(PATTERNS), inner, min_size=1, max_size=2),
        },
    )
    combined = st.fixed_dictionaries(
        {}, optional={"allOf": some, "anyOf": some, "oneOf": some, "properties": named, "$defs": named}
    )

    def joined(*parts: Schemas) -> Schemas:
        return st.tuples(*parts).map(lambda dicts: {name: d[name] for d in dicts for name in d})

    return st.one_of(joined(_ARRAY_COUNTS, arrays), joined(_OBJECT_COUNTS, objects), joined(_MIXED, combined))


SCHEMAS: Schemas = st.recursive(_LEAVES, _nest, max_leaves=8).map(
    lambda schema: schema if isinstance(schema, dict) else {}
)
