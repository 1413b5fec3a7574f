"""Schemas and grammars that are meant to do harm. scripts/trial_grammars.py tries 2000 of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyFiles, elsewhere

from mllama_gguf.errors import RequestError
from mllama_gguf.text.grammar import gbnf, json_schema, lark, regex
from mllama_gguf.text.tools import read_tools
from mllama_gguf.text.validation import check, check_schema
from mllama_gguf.text.vocab import Vocab

TRIAL = Path(__file__).parents[2] / "scripts" / "trial_grammars.py"


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


def trial(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRIAL), "--processes", "1", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **elsewhere())


def test_a_trial_of_some(tmp_path: Path) -> None:
    done = trial("--cases", "80", "--seed", "test", "--json", str(tmp_path / "results"))
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert len({result["case"] for result in results}) == 80
    assert {"works", "refused"} <= {result["outcome"] for result in results}


@pytest.mark.parametrize(
    ("case", "words"),
    [("!die", "died: case !die"), ("!sleep", "late: case !sleep"), ("!wrong", "wrong: case")],
)
def test_the_trial_sees_what_goes_wrong(case: str, words: str) -> None:
    done = trial("--only", case, "0-1", "--seconds", "1")
    assert done.returncode == 1, done.stderr
    assert words in done.stdout
    assert "2 cases" in done.stdout


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, 1e400, float("nan")], ids=range(5))
def test_numbers_that_no_float_holds(vocab: Vocab, value: Any) -> None:
    for schema in ({"type": "number", "maximum": value}, {"const": value}, {"multipleOf": value}):
        with pytest.raises(RequestError) as raised:
            json_schema({"properties": {"a": schema}})
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_a_reply_with_a_number_that_no_float_holds() -> None:
    schema = {"anyOf": [{"multipleOf": 0.5}, {"type": "string"}]}
    with pytest.raises(RequestError, match="cannot be checked"):
        json_schema(schema).check("1e400")
    with pytest.raises(RequestError, match="not JSON that Python reads"):
        json_schema(schema).check("9" * 5000)
    json_schema(schema).check("1.5")


@pytest.mark.parametrize(
    "expression",
    ["(" * 400 + ")|b" * 400, "((a)*" * 200 + ")" * 200, "[\x80-\x01]", "(?\n)"],
)
def test_words_about_expressions_are_one_line(expression: str) -> None:
    for make in (regex, lambda text: json_schema({"pattern": text})):
        with pytest.raises(RequestError) as raised:
            make(expression)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "grammar",
    [
        gbnf('root ::= ([a-z]* " "?)* root?'),
        gbnf('root ::= root root | "a" | "aa" | "aaa"'),
        lark('start: (/[a-z]*/ " "?)* start?'),
    ],
    ids=lambda grammar: grammar.kind,
)
def test_ambiguous_grammars_come_to_an_end(vocab: Vocab, grammar: Any) -> None:
    """The readings of a text add up. Before a token takes long the reply ends with an error."""
    try:
        matcher = vocab.constraints.begin(vocab, grammar)
        (a,) = vocab.tokenize("a", add_bos=False)
        for _ in range(100):
            start = time.process_time()
            assert a in matcher.mask()
            matcher.accept(a)
            assert time.process_time() - start < 3.0
    except RequestError as e:
        assert "\n" not in str(e) and len(str(e)) < 500


def doubled(
    part: Callable[[dict[str, str]], dict[str, Any]], where: str = "$defs", **root: Any
) -> dict[str, Any]:
    """A schema of few lines in which every level has the next one twice."""
    levels = {str(i): part({"$ref": f"#/{where}/{i + 1}"}) for i in range(40)}
    return {**root, where: {**levels, "40": {"type": "string"}}, "$ref": f"#/{where}/0"}


DRAFT, DRAFT_4 = "https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-04/schema#"


@pytest.mark.parametrize(
    "schema",
    [
        *(doubled(lambda ref, name=name: {name: [ref, ref]}) for name in ("anyOf", "oneOf", "allOf")),
        doubled(lambda ref: {"anyOf": [ref, ref], "$schema": DRAFT}),
        doubled(lambda ref: {"properties": {"a": ref, "b": ref}, "anyOf": [ref, ref]}),
        doubled(lambda ref: {"items": ref, "anyOf": [ref, ref]}),
        doubled(lambda ref: {"type": "array", "prefixItems": [ref, ref], "items": False}),
        doubled(lambda ref: {"not": ref, "allOf": [ref]}),
        doubled(lambda ref: {"if": ref, "then": ref, "else": ref}),
        doubled(lambda ref: {"dependentSchemas": {"a": ref}, "oneOf": [ref, ref]}),
        doubled(lambda ref: {"anyOf": [ref, ref]}, "definitions"),
        doubled(lambda ref: {"anyOf": [ref, ref]}, "definitions", **{"$schema": DRAFT_4}),
        {
            "$defs": {
                str(i): {"$dynamicAnchor": f"a{i}", "anyOf": [{"$dynamicRef": f"#a{i + 1}"}] * 2}
                for i in range(40)
            },
            "$dynamicRef": "#a0",
        },
    ],
)
def test_references_that_double(vocab: Vocab, schema: dict[str, Any]) -> None:
    """jsonschema would take hours; llguidance has its own bound."""
    start = time.monotonic()
    with suppress(RequestError):
        check_schema(schema)
    with suppress(RequestError):
        check('{"a": 1, "b": [2]}', schema)
    with suppress(RequestError):
        vocab.constraints.begin(vocab, json_schema(schema))
    assert time.monotonic() - start < 20


def test_tools_whose_references_double(vocab: Vocab) -> None:
    """All schemas of a request share a bound."""
    levels = doubled(lambda ref: {"anyOf": [ref, ref], "type": "object"})["$defs"]
    schema = {"anyOf": [{"$ref": "#/$defs/0"}] * 2, "type": "object", "$defs": {**levels, "40": {}}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(128)]
    start = time.process_time()
    for some in (tools[:8], tools):
        with suppress(RequestError):
            vocab.constraints.begin(vocab, read_tools(some, "required", None).grammar())
    assert time.process_time() - start < 15


def test_patterns_below_a_draft_of_its_own() -> None:
    """A part that names its draft is checked as the rest is: without its patterns."""
    part = {
        "$schema": DRAFT,
        "type": "object",
        "properties": {"b": {"pattern": "^(a+)+$"}, "c": {"const": 1}},
    }
    schema = {"type": "object", "properties": {"a": part}}
    check(json.dumps({"a": {"b": "a" * 40 + "!", "c": 1}}), schema)
    with pytest.raises(RequestError, match="does not fit"):
        check('{"a": {"c": 2}}', schema)
