"""GBNF grammars mean what they mean to llama.cpp."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import TinyFiles
from replies import follows

from mllama_gguf.errors import RequestError
from mllama_gguf.text.gbnf import to_lark
from mllama_gguf.text.grammar import gbnf
from mllama_gguf.text.vocab import Vocab


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "a" ("b" | "c")? "d"', ["abd", "acd", "ad"], ["a", "abcd", "abdd"]),
        ('root ::= word "b"\nword ::= [a-z]+', ["ab", "abb", "zzb"], ["b", "a"]),
        ('root ::= x y\nx ::= "a"*\ny ::= "a"', ["a", "aaa"], ["", "b"]),
        ('root ::= x y\nx ::= "a" | "ab"\ny ::= "c" | "bc"', ["ac", "abc", "abbc"], ["a", "ab"]),
        ('root ::= "\\u0041" "12"', ["A12"], ["A1"]),
        ('root ::= "\\u004112"', ["A12"], ["䄒"]),
        (r'root ::= "\x41\U0001F600\\\"\n"', ['A😀\\"\n'], ["A"]),
        ("root ::= [a&&b]+", ["a&b"], ["c"]),
        ("root ::= [--/]", ["-", ".", "/"], ["0"]),
        ("root ::= [^a\\]]", ["b", "\n", "é"], ["a", "]"]),
        ("root ::= [a-c-]+", ["a-b"], ["d"]),
        ("root ::= .", ["\n", "猫"], ["ab", ""]),
        ('root ::= "a"{2,3} "b"{2} "c"{1,}', ["aabbc", "aaabbcc"], ["abbc", "aab"]),
        ('root ::= ("a"{2}){2}', ["aaaa"], ["aa"]),
        ('root ::= (("a"?){2} | "b"){3}', ["", "aaaaaa", "bab"], ["aaaaaaa", "bbbb"]),
        ('root ::= a-b aB a_b\na-b ::= "1"\naB ::= "2"\na_b ::= "3"', ["123"], ["111"]),
        ('start ::= "s"\nroot ::= start', ["s"], [""]),
        ('root ::= "a" | # one\n "b" # two\n\n# three\n', ["a", "b"], ["# one"]),
        ('root ::= (\n  "a"\n  | "b"\n)+', ["abab"], [""]),
        ('root ::= "["  (root ("," root)*)? "]" | [0-9]+', ["[1,[23,[]]]", "7"], ["[1,]", "[[]"]),
        ('root ::= v\nv ::= "[" ws (v ("," ws v)*)? "]" ws | "1" ws\nws ::= [ \\n]*', ["[ 1, 1 ]"], [""]),
        ('root ::= "(" root ")" root | ""', ["", "(())()"], ["("]),
        ('root ::= ""', [""], ["a"]),
        ('root ::= "a\\x00b" | "c\0d"', ["a\0b", "c\0d"], ["a"]),
    ],
)  # fmt: skip
def test_languages(vocab: Vocab, grammar: str, yes: list[str], no: list[str]) -> None:
    made = gbnf(grammar)
    assert [text for text in yes if not follows(vocab, made, text)] == []
    assert [text for text in no if follows(vocab, made, text)] == []


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("root ::= (", "Expected"),
        ('root ::= "a" )', "GBNF"),
        ("root ::= other", "no rule 'other'"),
        ('x ::= "a"', "no rule 'root'"),
        ("", "no rule 'root'"),
        ('root ::= "a', "without its end"),
        ("root ::= [a", "without its end"),
        ("root ::= []", "empty character class"),
        (r"root ::= [^\x00-\U0010FFFF]", "empty character class"),
        (r"root ::= [^\x00-\uD7FF\uE000-\U0010FFFF]", "empty character class"),
        ("root ::= [z-a]", "which has an empty range"),
        ('root ::= "a"{5,2}', "'.5,2.'"),
        ('root ::= "a"{99999}', "up to 10000"),
        ('root ::= "a"{x}', "not a repetition"),
        ('root ::= "\\q"', "unknown escape"),
        ('root ::= "\\ud800"', "not a character"),
        ('root ::= "\\U00110000"', "not a character"),
        ('root ::= "\ud800"', "surrogate"),
        ('root = "a"', "no rule 'root'"),
        ('root ::= "a"\nroot2 "b"', "no rule 'root2'"),
        ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "32768 are allowed"),
        ("root ::= " + "(" * 1000 + '"a"' + ")" * 1000, "nested more than 50"),
        ("(" * 1_000_000, "1000000 characters"),
        ("root ::= " + "(" * 30_000, "nested more than 50"),
        ("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(1000)), "more than 400 rules"),
    ],
)
def test_what_cannot_be_used(grammar: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        to_lark(grammar)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("grammar", ['root ::= root "a"', "root ::= root", 'root ::= a\na ::= "x" a'])
def test_a_grammar_of_no_text_is_refused_before_the_first_token(vocab: Vocab, grammar: str) -> None:
    if grammar.endswith('"x" a'):  # text, but without an end: found by no trial, and cut by max_tokens
        vocab.constraints.begin(vocab, gbnf(grammar))
        return
    with pytest.raises(RequestError, match="the grammar cannot be obeyed"):
        vocab.constraints.begin(vocab, gbnf(grammar))
