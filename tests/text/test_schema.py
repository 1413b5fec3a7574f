"""JSON of a schema: what is obeyed, what is refused, and that every complete reply is valid."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from helpers import TinyFiles
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from replies import closing_tokens, draw, follows, validate
from schemas import SCHEMAS

from mllama_gguf.errors import RequestError
from mllama_gguf.text.bounds import bounds
from mllama_gguf.text.grammar import json_schema
from mllama_gguf.text.schema import readable
from mllama_gguf.text.vocab import Vocab


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


@pytest.fixture(scope="module")
def closing(vocab: Vocab) -> frozenset[int]:
    return closing_tokens(vocab)


TREE = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/T"}, "n": {"type": "integer"}},
    "required": ["n"],
}
OBEYED: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 10},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": -1},
    {"type": "integer", "minimum": 0.5, "maximum": 1e300},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 0.1},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5},
    {"type": "number", "minimum": -0.30000000000000004, "maximum": 0.9999999999999999},
    {"type": "number", "multipleOf": 0.25, "maximum": 3},
    {"type": "integer", "multipleOf": 7, "minimum": -100},
    {"type": "integer", "multipleOf": 2.5},
    {"enum": ["😀"]},
    {"enum": ["C:\\new", 'a"b', "a\nb", "/", "\b\f\r\t", ""]},
    {"const": "a\nb"},
    {"enum": [1, "1", True, None, 1.5, -0.0, [1, {"a": []}], {"b": "é", "a": None}]},
    {"type": "integer", "enum": [1.5, 2]},
    {"properties": {"😀": {"type": "null"}, 'q"\\\n\x01': {"const": 1}}, "required": ["😀"]},
    {"type": "string", "pattern": '^"$'},
    {"type": "string", "pattern": "^a|b$", "maxLength": 6},
    {"type": "string", "pattern": r"(^|_)\d+\W\S", "maxLength": 9},
    {"type": "string", "pattern": "^[a-f]+$", "format": "password", "minLength": 2, "maxLength": 4},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"allOf": [{"$ref": "#/definitions/C"}], "definitions": {"C": {"enum": ["x", "y"]}}},
    {"$ref": "#/$defs/T", "$defs": {"T": TREE}},
    {"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False},
    {"type": "array", "items": {}, "maxItems": 2},
    {"type": "array", "items": True, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": 1}], "items": False},
    {"properties": {"any": {"title": "Any"}}, "required": ["any"], "type": "object"},
    {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}], "default": None},
    {"oneOf": [{"type": "integer"}, {"type": "string", "enum": ["x"]}]},
    {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "$defs": {
            "cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
            "dog": {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]},
        },
    },
    {"type": "object", "patternProperties": {"^S_.$": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {r"\d$": {"type": "null"}}, "properties": {"a1": {"maximum": 3}}},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"a": True, "b": {}}, "additionalProperties": False, "minProperties": 1},
    {"type": "object", "required": ["x", "y"], "additionalProperties": {"type": "boolean"}},
    {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"const": 1}], "additionalItems": False},
    {"$schema": "http://json-schema.org/draft-04/schema", "minimum": 0, "exclusiveMinimum": True},
    {"$schema": "HTTP://json-schema.org/draft-07/schema#", "type": "array", "items": {"const": 1},
     "prefixItems": [{"const": 2}], "minItems": 1, "maxItems": 2},
    {"$schema": "http://json-schema.org/draft-07/schema##", "$ref": "#/definitions/a", "type": "null",
     "definitions": {"a": {"type": ["string", "null"]}}},
    {"items": {"$schema": "https://json-schema.org/draft/2020-12/schema", "const": 1}, "maxItems": 2},
    {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/a", "type": "null",
     "definitions": {"a": {"type": "boolean"}}},
    {"$id": "https://host/s", "$ref": "https://host/s#/$defs/a~1b", "$defs": {"a/b": {"const": 3}}},
    {"$ref": "#/$defs/a%20b", "$defs": {"a b": {"const": 3}}},
    {"type": "boolean", "x-guidance": {"lenient": True}, "nullable": True, "uniqueItems": False},
]  # fmt: skip


@pytest.mark.parametrize("schema", OBEYED, ids=lambda schema: json.dumps(schema)[:60])
def test_every_complete_reply_is_valid(vocab: Vocab, closing: frozenset[int], schema: dict[str, Any]) -> None:
    grammar = json_schema(schema)
    replies = [draw(vocab, grammar, random.Random(seed), closing) for seed in range(12)]
    assert sum(reply is not None for reply in replies) > 3
    for reply in replies:
        if reply is not None:
            validate(reply, schema)
            grammar.check(reply)


REFUSED: list[tuple[Any, str]] = [
    ({"type": "array", "uniqueItems": True}, "'uniqueItems' cannot be obeyed"),
    ({"properties": {"a": {"not": {"type": "string"}}}}, "#/properties/a.*'not' cannot be obeyed"),
    ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "'if'"),
    ({"type": "array", "contains": {"type": "integer"}}, "'contains'"),
    ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    ({"dependencies": {"a": ["b"]}}, "'dependencies'"),
    ({"propertyNames": {"maxLength": 3}}, "'propertyNames'"),
    ({"unevaluatedProperties": False}, "'unevaluatedProperties'"),
    ({"$dynamicRef": "#node"}, "'\\$dynamicRef'"),
    ({"additionalProperties": {"type": "integer"}, "minProperties": 2}, "'minProperties' 2 cannot be obeyed"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf', of which two choices may be true"),
    ({"patternProperties": {"^a": True, "b$": {}}}, "'patternProperties', of which two may match"),
    ({"type": "number", "multipleOf": 0.1}, "'multipleOf' 0.1 cannot be obeyed"),
    ({"type": "integer", "multipleOf": 5000}, "1000 is the most"),
    ({"multipleOf": 0}, "above 0"),
    ({"const": 1e400}, "not a number of JSON"),
    ({"const": 9007199254740993}, "9007199254740993 cannot be obeyed"),
    ({"const": 0.30000000000000004}, "0.30000000000000004 cannot be obeyed"),
    ({"type": "number", "minimum": 1e300}, "beyond"),
    ({"type": "integer", "maximum": -1e20}, "beyond"),
    ({"minimum": "1"}, "'minimum' must be a number"),
    ({"type": "string", "format": "regex"}, "'format' 'regex' cannot be obeyed"),
    ({"pattern": "(?=a)b"}, "look-ahead"),
    ({"pattern": r"(a)\1"}, "reference to a group"),
    ({"pattern": r"\bword"}, "word boundary"),
    ({"pattern": "(?i)a"}, "flag"),
    ({"pattern": "a^b"}, r"\^ or \$ in the middle"),
    ({"pattern": "("}, "not valid"),
    ({"pattern": r"\p{L}"}, "not valid"),
    ({"pattern": 3}, "must be a text"),
    ({"const": "a\0"}, r"'\\x00' cannot be written"),
    ({"enum": ["\x7f"]}, "cannot be written"),
    ({"enum": ["\ud800"]}, "half of a surrogate pair"),
    ({"enum": []}, "list of values"),
    ({"enum": [{1: 2}]}, "1 is not a name"),
    ({"enum": [b"x"]}, "not a value of JSON"),
    ({"type": "float"}, "'type' cannot be 'float'"),
    ({"type": []}, "'type' cannot be"),
    ({"type": ["null", "null"]}, "twice"),
    ({"items": [{"type": "null"}]}, "'prefixItems'"),
    ({"properties": {"a": 5}}, "5 is not a schema"),
    ({"properties": [1]}, "'properties' must be an object"),
    ({"required": "a"}, "'required' must be a list"),
    ({"required": ["a", "a"]}, "twice"),
    ({"required": [1]}, "1 is not a name"),
    ({"maxLength": -1}, "'maxLength' must be a whole number"),
    ({"minLength": 10**7}, "1000000 is the most"),
    ({"anyOf": {}}, "'anyOf' must be a list"),
    ({"title": 5}, "'title' must be a text"),
    ({"$ref": "#"}, "leads back to itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
     "leads back to itself"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads back to itself"),
    ({"$ref": "#/nowhere"}, "points to nothing"),
    ({"$ref": "https://example.com/schema.json"}, "nothing is fetched"),
    ({"$ref": "file:///etc/passwd"}, "nothing is fetched"),
    ({"$ref": "#name"}, "nothing is fetched"),
    ({"$ref": 3}, "must be a text"),
    ({"items": {"$id": "other", "$ref": "#"}}, "'\\$id' inside"),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, "draft 3"),
    ({"type": "string", "const": 5}, "Unsatisfiable"),
    ({"type": "string", "pattern": "^ab$", "maxLength": 1}, "no text has its pattern"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "property 'a' is unsatisfiable"),
    ({"type": "null", "examples": 5}, "#/examples.*is not valid"),
    ({"type": "null", "readOnly": "x"}, "#/readOnly.*is not valid"),
    ({"type": "null", "$defs": {"never": {"type": 5}}}, "#/\\$defs/never/type.*is not valid"),
    ({"type": "null", "uniqueItems": 0}, "is not valid"),
    ({"type": "null", "then": 5}, "is not valid"),
    ({"type": "null", "$anchor": "1 2"}, "is not valid"),
    ({"type": "null", "$id": "#x"}, "is not valid"),
    ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, "#/exclusiveMinimum.*is not valid"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "enum": [1, 1]}, "non-unique"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "required": []}, "non-empty"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "properties": {"a": True}}, "is not valid"),
    ({"$schema": "http://[", "type": "null"}, "is not an address"),
    ({"items": {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{"const": 1}]}},
     "#/items.*of another draft"),
    ([], "a JSON schema is an object"),
    (False, "a JSON schema is an object"),
    ("{}", "a JSON schema is an object"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "words"), REFUSED, ids=lambda value: repr(value)[:60])
def test_what_cannot_be_obeyed_is_refused_by_its_name(vocab: Vocab, schema: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        vocab.constraints.begin(vocab, json_schema(schema))
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 600
    assert "schema" in message


def test_too_large_schemas_are_refused() -> None:
    circular: dict[str, Any] = {}
    circular["properties"] = {"a": circular}
    for schema, words in (
        (circular, "nested"),
        ({"enum": [f"s{i}" for i in range(100_000)]}, "too many"),
        ({"const": "a" * 5000}, "4096"),
        ({"enum": ["a" * 4000 + str(i) for i in range(100)]}, "200000 all together"),
        ({"properties": {f"p{i}": True for i in range(2000)}}, "1000"),
        ({"anyOf": [{"type": "null"}] * 6000}, "too many"),
        ({"pattern": "a" * 10_000}, "8192"),
        ({"pattern": "(" * 200 + ")" * 200}, "too large"),
        ({"pattern": "(a{1000}){1000}"}, "at least 1000000 characters"),
    ):
        with pytest.raises(RequestError, match=words):
            readable(schema)


def test_large_and_circular_schemas_are_not_checked_for_ever() -> None:
    """jsonschema would go through the same definition again and again."""
    twice: Any = {"type": "null"}
    for _ in range(40):
        twice = {"anyOf": [twice, twice]}
    circular: dict[str, Any] = {"type": "null"}
    circular["not"] = circular
    begin = time.process_time()
    json_schema({"type": "null", "$defs": {"a": twice, "b": circular}, "default": circular})
    json_schema({"type": "null", "$defs": {f"d{i}": {"type": "null"} for i in range(5000)}})
    assert time.process_time() - begin < 2.0
    assert json_schema({"anyOf": ({"const": 1}, {"enum": (2, 3)})}).is_json  # tuples are lists


def test_numbers_are_narrowed_inwards_only() -> None:
    assert bounds({"minimum": 10}, ["integer"]) == {"minimum": 10, "maximum": 2**53 - 1}
    assert bounds({"exclusiveMinimum": 1.5, "exclusiveMaximum": 4}, ["integer"]) == {
        "minimum": 2,
        "maximum": 3,
    }
    assert bounds({"exclusiveMinimum": 0}, ["number"]) == {"minimum": 1e-15, "maximum": 10**15}
    assert bounds({"exclusiveMaximum": 1}, ["number"])["maximum"] == 0.999999999999999
    assert bounds({"minimum": 0.1, "maximum": 0.1}, None) == {"minimum": 0.1, "maximum": 0.1}
    assert bounds({}, ["number"]) == bounds({}, None) == bounds({"minimum": 3}, ["string"]) == {}
    rng = random.Random(0)
    for _ in range(2000):
        x = rng.choice([rng.uniform(-1e6, 1e6), rng.uniform(-1, 1), float(rng.randrange(-99, 99))])
        for exclusive in (False, True):
            name = ("exclusiveM" if exclusive else "m") + "inimum"
            low = bounds({name: x}, ["number"])["minimum"]
            assert (low > x if exclusive else low >= x) and low - x <= max(1e-15, abs(x) * 2e-14)
            name = ("exclusiveM" if exclusive else "m") + "aximum"
            high = bounds({name: x}, ["number"])["maximum"]
            assert (high < x if exclusive else high <= x) and x - high <= max(1e-15, abs(x) * 2e-14)


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"type": "number"}, ["-0", "1e5", "0.5E-3", "-12.25"], ["01", ".5", "1.", "+1", "NaN", "Infinity"]),
        ({"type": "integer"}, ["-0", "12"], ["1.0", "1e2", "9007199254740992", "99999999999999999999"]),
        (
            {"type": "string", "format": "date"},
            ['"2024-02-29"'],
            ['"2023-02-29"', '"0000-01-01"', '"2024-13-01"'],
        ),
        ({"type": "string"}, ['"é\\n\\"\\\\/"'], ['"\\u0041"', '"\\ud800"', '"\n"', '"\\x"', "'a'"]),
        (
            {"type": "array"},
            ["[]", "[ ]", "[\n  1,\n  2\n]", "[[[]]]"],
            ["[  ]", "[\n\n]", "[,]", "[1,]", "[] "],
        ),
        (
            {"type": "object", "properties": {"a\n": {"type": "null"}}},
            ['{"a\\n":null}', '{"b":1}'],
            ['{"a\\n":1}'],
        ),
        (
            {"type": "string", "minLength": 2, "maxLength": 2},
            ['"é😀"', '"\\n\\\\"'],
            ['"a"', '"abc"', '"\\n"'],
        ),
        ({"type": "string", "pattern": "^.$"}, ['"é"', '"\\t"'], ['"\\n"', '"\\r"', '""', '"ab"']),
    ],
)
def test_texts(vocab: Vocab, schema: dict[str, Any], yes: list[str], no: list[str]) -> None:
    grammar = json_schema(schema)
    assert [text for text in yes if not follows(vocab, grammar, text)] == []
    assert [text for text in no if follows(vocab, grammar, text)] == []


def test_a_reply_is_checked_once_more() -> None:
    grammar = json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    grammar.check('{"a": 3}')
    for reply, words in (
        ('{"a": "3"}', "does not fit"),
        ('{"a"', "not JSON"),
        ("[" * 10**6, "not JSON"),
    ):
        with pytest.raises(RequestError, match=words):
            grammar.check(reply)
    # A pattern that takes re for ever is left to llguidance, also where it decides about other keywords.
    slow = {"pattern": "^(x+x+)+y", "patternProperties": {"(x+x+)+y": True}, "additionalProperties": False}
    json_schema(slow).check(json.dumps("x" * 40))
    json_schema(slow).check(json.dumps({"x" * 40: 1}))


def test_random_schemas(vocab: Vocab, closing: frozenset[int], request: pytest.FixtureRequest) -> None:
    """Of schemas drawn at random, every complete reply of random tokens is valid.

    300 schemas; another number with `--schemas N`, which are others each time.
    """
    given_number = request.config.getoption("--schemas")
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=given_number or 300,
        deadline=None,
        database=None,
        derandomize=not given_number,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(SCHEMAS, st.integers(0, 2**32))
    def check(schema: dict[str, Any], seed: int) -> None:
        try:
            reply = draw(vocab, json_schema(schema), random.Random(seed), closing)
        except RequestError as e:
            assert "\n" not in str(e)
            assert "here" not in str(e), str(e)  # refused, but before the first token
            outcomes["refused"] += 1
            return
        outcomes["endless" if reply is None else "valid"] += 1
        if reply is not None:
            validate(reply, schema)

    check()
    print(dict(outcomes))
    assert outcomes["valid"] > 0.4 * outcomes.total()
    assert outcomes["endless"] < 0.05 * outcomes.total()
