"""Regular expressions: what llguidance makes of them is what Python's `re` finds."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable

import pytest
from helpers import TinyFiles
from replies import closing_tokens, draw, follows

from mllama_gguf.errors import RequestError
from mllama_gguf.text.grammar import json_schema, regex
from mllama_gguf.text.pattern import named, searched, whole
from mllama_gguf.text.vocab import Vocab


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


def test_anchors_are_taken_apart() -> None:
    assert searched("a") == "(?s:.*)a(?s:.*)"
    assert searched("^a") == "a(?s:.*)"
    assert searched("^a|b$") == "(?:a(?s:.*)|(?s:.*)b)"
    assert searched("(^|x)a") == "(?:(?:|(?s:.*)x))a(?s:.*)"
    assert searched("") == searched("^") == searched("$") == "(?s:.*)"
    assert searched("^$") == whole("") == whole("^$") == ""
    assert named("a$") == r"(?s:.*)a(?:\x{A})?"
    for expression in ("a^b", "a$b", "(^a)*", "(a|$)b", r"\b^a", "(?m:^a)", "(a$)+"):
        with pytest.raises(RequestError, match="cannot be obeyed"):
            searched(expression)


def test_classes_name_their_characters() -> None:
    assert searched(r"^\d$") == searched("^[0-9]$") == "[0-9]"
    assert (
        named(r"^[\d]$") != "[0-9]"
    )  # Python's digits are more, and names beyond them follow another schema
    assert searched(r"^[^\D]$") == "[0-9]"
    assert searched("^[&~/-]$") == r"[\x{26}\x{2D}\x{2F}\x{7E}]"
    assert searched("^é/$") == r"\x{E9}\x{2F}"
    assert "٣" not in searched(r"^\D$")


@pytest.mark.parametrize("text", ["[[a]", "[a&&b]", "[a||b]", "[a~~b]", "[--a]"])
def test_nothing_is_printed_about_odd_classes(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert searched(text)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("(", "not valid"),
        ("a" * 10_000, "10000 characters"),
        ("(" * 3000 + ")" * 3000, "nested"),
        ("(?:a?)" * 5000, "characters"),
        ("a?" * 4000, "4096 parts"),
        ("a{4294967295}", "nested or repeated too much|at least"),
        ("a{2000000,}", "at least|repetition"),
        ("a{0,2000000}", "repetition above"),
        ("((a{100}){100}){100}", "at least 1000000"),
        (r"(?<!a)b", "look-behind"),
        ("(?>a)", "atomic|not valid"),
        ("a++", "possessive|not valid"),
        ("(?s)(?x)a", "flag|not valid"),
        ("(?a:a)", "flag"),
        ("[^\\s\\S]", "an empty character class"),
        ("\ud800", "surrogate"),
        ("(?P<a>x)(?P=a)", "reference"),
    ],
)
def test_what_cannot_be_obeyed(expression: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        searched(expression)
    assert len(str(raised.value)) < 300


TEXTS = [
    "",
    *"abc1 .é_-\n\t٣猫\u2028\ufeff",
    "ab",
    "ba",
    "a1",
    "é_",
    "a\n",
    "\nb",
    "aab",
    "a.b",
    "1 é",
    "bb\n",
]


def test_random_expressions_match_what_re_matches(vocab: Vocab) -> None:
    rng = random.Random(1)
    parts = [
        "a",
        "b",
        "é",
        ".",
        "[ab]",
        "[^a]",
        r"\d",
        r"\w",
        r"\s",
        r"\W",
        r"\S",
        r"\D",
        "\n",
        r"[^\w-]",
        r"[a-c\d]",
    ]

    def expression(depth: int = 0) -> str:
        kind = rng.randrange(6 if depth < 3 else 1)
        if kind < 2:
            return rng.choice(parts)
        if kind == 2:
            return expression(depth + 1) + expression(depth + 1)
        if kind == 3:
            return f"({expression(depth + 1)}|{expression(depth + 1)})"
        return f"(?:{expression(depth + 1)}){rng.choice(['*', '+', '?', '{1,2}', '{2}', '{2,}', '+?'])}"

    outcomes = {"both": 0, "neither": 0, "re alone": 0}
    for i in range(150):
        text = rng.choice(["", "^", "(^|b)"]) + expression() + rng.choice(["", "$", "($|b)"])
        text += f"|{expression()}$" if i % 5 == 0 else ""
        form = json_schema({"type": "string", "pattern": text})
        try:
            vocab.constraints.begin(vocab, form)
        except RequestError:  # no text matches
            continue
        for given in rng.sample(TEXTS, 8):
            quoted = '"' + given.replace("\n", "\\n").replace("\t", "\\t") + '"'
            ours, theirs = follows(vocab, form, quoted), re.search(text, given) is not None
            assert theirs or not ours, (text, given)
            outcomes["both" if ours else "re alone" if theirs else "neither"] += 1
    assert outcomes["both"] > 200
    assert outcomes["neither"] > 200
    assert outcomes["re alone"] < 0.1 * outcomes["both"]  # where dialects differ


@pytest.mark.parametrize(
    "expression",
    [
        "(red|green) apple",
        r"^\d{4}-\d\d$",
        "a*b+",
        r"[^\s]{3,5}",
        "(?s)a.{2}b",
        "é|猫",
        r"C:\\new\.txt",
        "a|b|",
        "x{0,3}$",
        '"[^"]*"',
        "/usr/[a-z]+",
    ],
)
def test_replies_of_an_expression(vocab: Vocab, expression: str) -> None:
    """The promise of {"type": "regex"}: re.fullmatch finds every complete reply."""
    closing = closing_tokens(vocab)
    replies = [draw(vocab, regex(expression), random.Random(seed), closing) for seed in range(15)]
    done = [reply for reply in replies if reply is not None]
    assert len(done) > 5
    assert [reply for reply in done if re.fullmatch(expression, reply) is None] == []


@pytest.mark.parametrize("expression", ["^a\0b$", r"^a\x01b$", "^a[\x7f]b$", r"^[\x00-\x05]$"])
def test_characters_that_are_not_written_in_json(expression: str) -> None:
    for translate in (searched, named):
        with pytest.raises(RequestError, match="in JSON cannot be obeyed"):
            translate(expression)
    whole(expression)
    for good in (r"^[\x00-\x1f]$", r"^\t\n$", r"^[^\x00-\x1f]$"):
        searched(good)


@pytest.mark.parametrize(
    "members",
    [
        *(
            r"\x00-\x1f",
            r"\x00-\x1fz",
            r"\x00-\x22",
            r"^\x20-\x7e",
            r"\x08-\x0d",
            r"^a",
            r"\x00-\x7f",
            r"\s",
            r"\W",
        ),
        *(r'"\\/', r"\x1f-\x22", r"\x0e-\x1fz", r"\x7f-\xa0", r"^\x00-\x1f", r"\t", r"\x00-\x1f\\"),
    ],
)
def test_no_class_has_more_members_in_json(vocab: Vocab, members: str) -> None:
    grammar = json_schema({"type": "string", "pattern": f"^[{members}]$"})
    texts = list(map(chr, range(0x80)))
    found = {text for text in texts if follows(vocab, grammar, json.dumps(text))}
    wanted = {text for text in texts if re.fullmatch(f"[{members}]", text)}
    assert found <= wanted
    assert wanted - found <= {chr(c) for c in (*range(32), 0x7F)} - set("\b\t\n\f\r")
