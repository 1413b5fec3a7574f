"""Tools and calls, without messages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from helpers import TinyFiles
from replies import closing_tokens, draw

from mllama_gguf.decode.completions import shown_calls
from mllama_gguf.errors import RequestError
from mllama_gguf.text.tools import find_calls, may_be_call, read_tools
from mllama_gguf.text.vocab import Vocab


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
TREE = {
    "type": "object",
    "properties": {"tree": {"$ref": "#/$defs/node"}},
    "required": ["tree"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"child": {"$ref": "#/$defs/node"}, "n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("choice", [None, "auto"])
def test_all_may_be_called(choice: Any) -> None:
    tools = read_tools([tool("f"), tool("g", CITY, description="G")], choice)
    assert (tools.names, tools.required, tools.grammar()) == (("f", "g"), (), None)
    assert read_tools(None, choice).names == read_tools([], choice).names == ()


def test_choices() -> None:
    tools = [tool("f"), tool("g", CITY)]
    assert read_tools(tools, "none").told == ()
    assert read_tools(None, "none").told == ()
    assert read_tools(tools, "required").required == ("f", "g")
    named = read_tools(tools, {"type": "function", "function": {"name": "g"}})
    assert (named.names, len(named.told)) == (("g",), 2)
    assert read_tools(tools, None, False).one_call


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        ("f", None, "tools must be a list"),
        ([tool("f"), tool("f")], None, "same name"),
        ([{"function": {"name": "f"}}], None, r"tools\[0\]: expected"),
        ([{"type": "function"}], None, r"tools\[0\]: expected"),
        ([{"type": "web_search"}], None, r"tools\[0\]: expected"),
        ([tool("f"), tool(" ")], None, r"tools\[1\]: name"),
        ([tool("f", "x")], None, "parameters must be a JSON schema"),
        ([tool("f", description=5)], None, "description must be"),
        ([tool(str(i)) for i in range(129)], None, "128 are allowed"),
        (None, "required", "needs tools"),
        ([tool("f")], "always", "tool_choice must be"),
        ([tool("f")], 5, "tool_choice must be"),
        ([tool("f")], {"type": "allowed_tools"}, "tool_choice must be"),
        ([tool("f")], {"type": "function", "function": {"name": "g"}}, "there is no tool 'g'"),
    ],
)
def test_tools_of_another_shape(tools: Any, choice: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        read_tools(tools, choice)
    assert "\n" not in str(raised.value)


def test_a_schema_that_cannot_be_obeyed_is_named() -> None:
    unique = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    assert read_tools([tool("f", unique)]).grammar() is None  # nothing is enforced
    with pytest.raises(RequestError, match=r"tool 'f': its parameters: .*uniqueItems"):
        read_tools([tool("f", unique)], "required").grammar()


@pytest.mark.parametrize("kind", ["string", ["string", "null"], "nothing"])
def test_arguments_that_are_no_object_cannot_be_required(kind: Any) -> None:
    with pytest.raises(RequestError, match=r"tool 'f': its parameters: 'type' must be 'object'"):
        read_tools([tool("f", {"type": kind})], "required").grammar()


def test_a_schema_keeps_its_values_where_it_is_moved(tiny_files: Callable[[str], TinyFiles]) -> None:
    """What only looks like a reference is none; a draft of its own has no effect elsewhere."""
    vocab = Vocab(tiny_files("gqa").text)
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": ["object", "null"],
        "properties": {
            "a": {"const": {"$ref": "#/b"}},
            "$ref": {"enum": ["#/c"]},
            "d": {"$ref": "#/definitions/const"},
        },
        "required": ["a", "$ref", "d"],
        "additionalProperties": False,
        "definitions": {"const": {"const": 5, "default": {"$ref": "#"}}},
    }
    tools = read_tools([tool("f", schema)], "required")
    grammar = tools.grammar()
    assert grammar is not None
    text = draw(vocab, grammar, random.Random(1), closing_tokens(vocab))
    assert text is not None
    assert find_calls(text, tools.names) == [("f", {"a": {"$ref": "#/b"}, "$ref": "#/c", "d": 5})]
    jsonschema.validate(find_calls(text, tools.names)[0][1], schema)


@pytest.mark.parametrize("seed", range(12))
def test_calls_that_are_required_fit_the_schemas(tiny_files: Callable[[str], TinyFiles], seed: int) -> None:
    vocab = Vocab(tiny_files("gqa").text)
    schemas = {"city": CITY, "tree": TREE, "nothing": None, "any": {}}
    tools = read_tools([tool(name, schema) for name, schema in schemas.items()], "required")
    grammar = tools.grammar()
    assert grammar is not None
    text = draw(vocab, grammar, random.Random(seed), closing_tokens(vocab), longest=600)
    assert text is not None
    ((name, arguments),) = find_calls(text, tools.names)
    jsonschema.validate(arguments, schemas[name] or {"type": "object", "maxProperties": 0})


class TestFindCalls:
    @pytest.mark.parametrize(
        ("text", "calls"),
        [
            ('{"name": "f", "parameters": {"x": 1}}', [("f", {"x": 1})]),
            (' \n{"name": "f", "parameters": {"x": "ü"}}\n', [("f", {"x": "ü"})]),
            ('{"name": "f"}', [("f", {})]),
            ('{"name": "f", "parameters": null}', [("f", {})]),
            ('{"name": "f", "arguments": {"x": []}}', [("f", {"x": []})]),
            ('{"name": "f", "parameters": "{\\"x\\": 1}"}', [("f", {"x": 1})]),
            ('{"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
            ('{"type": "function", "function": {"name": "f", "parameters": {}}}', [("f", {})]),
            ('{"name": "f"}; {"name": "g", "parameters": {"y": 2}}', [("f", {}), ("g", {"y": 2})]),
            ('{"name": "f"}\n{"name": "f"}', [("f", {}), ("f", {})]),
            ('[{"name": "f"}, {"name": "g"}]', [("f", {}), ("g", {})]),
            *(
                (text, [])
                for text in (
                    "",
                    "[]",
                    "Hello",
                    '{"name": "h", "parameters": {}}',
                    '{"name": "f"} and {"name": "g"}',
                    '{"name": "f"',
                    '{"name": 5}',
                    '{"name": "f", "parameters": 5}',
                    '{"name": "f", "parameters": "no JSON"}',
                    '{"name": "f", "parameters": {"x": NaN}}',
                    '{"name": "f", "parameters": {"x": [-1e999]}}',
                    '{"name": "f", "parameters": "{\\"x\\": Infinity}"}',
                    '{"name": "f"}{"name": "h"}',
                    '"f"',
                    "5",
                    "[" * 100000,
                    '{"answer": 42}',
                )
            ),
        ],
    )
    def test_texts(self, text: str, calls: list[Any]) -> None:
        assert find_calls(text, ("f", "g")) == calls

    def test_arguments_can_be_sent(self) -> None:
        """Half a character of UTF-16, which JSON can name and UTF-8 cannot have, stays an escape."""
        text = '{"name": "f", "parameters": {"x": "\\ud800ü"}}'
        (call,) = shown_calls(text, read_tools([tool("f")]))
        words = call["function"]["arguments"]
        assert words.encode() == '{"x": "\\ud800ü"}'.encode() and json.loads(words) == {"x": "\ud800ü"}

    def test_what_may_be_one(self) -> None:
        assert all(may_be_call(text) for text in ("", " \n", "{", ' {"na', "["))
        assert not any(may_be_call(text) for text in ("A", " The {", "0"))
        assert json.loads("{}") == {}
