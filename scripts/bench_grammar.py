#!/usr/bin/env python3
"""What a form costs a token, with a vocabulary of Llama 3's size, beside llama.cpp's grammar sampler.

    python scripts/bench_grammar.py [--tokens N] [--rounds N] [--json FILE]

No model is needed: the tokens of a known reply are taken one after the other, and before each it is asked
which tokens may come next. Milliseconds of the processor a token, median and most of all rounds:

begin:        before the first token, once for a reply
mask:         `Matcher.mask`, which is llguidance's
choice:       `Mask.likeliest` of logits whose greatest is never allowed: the dearest case of a greedy reply
accept:       `Matcher.accept`
all:          these three together, which the target of 0.3 ms is for
candidates:   `Mask.candidates`, which samplers with a temperature need in place of "choice"
in a thread:  handing a task to another thread and waiting for it, which must be less than the mask itself if
              computing it beside the model is to win
llama.cpp:    its grammar sampler applied to all tokens, and `accept`; it is given what llama_cpp converts a
              schema to, and runs in a process of its own, because some grammars end it

The vocabulary is made up (tests/vocabulary.py).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import report
from contestant import Contestant, Died

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from vocabulary import N_TOKENS, write_vocabulary

from mllama_gguf.errors import RequestError
from mllama_gguf.text.constraint import CANDIDATE
from mllama_gguf.text.grammar import Grammar, gbnf, grammar_of
from mllama_gguf.text.vocab import Vocab

LIMIT_MS = 0.3
clock = time.thread_time  # of the processor: other work on the machine counts for less
SAID = (
    "A red apple lies on a wooden table beside a blue bowl of cherries, and the light of the morning falls "
    "through a window on the left."
)
_TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "c": {"type": "array", "items": {"$ref": "#"}}},
}
_PHOTO = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "description": {"type": "string"},
        "objects": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "count": {"type": "integer", "minimum": 1}},
                "required": ["name", "count"],
                "additionalProperties": False,
            },
        },
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "taken": {"type": "string", "format": "date"},
        "indoors": {"type": "boolean"},
    },
    "required": ["title", "description", "objects", "colours", "indoors"],
    "additionalProperties": False,
}
_GBNF = r"""
root ::= "[" item ("," item)* "]"
item ::= "{" "\"name\":" text ",\"colour\":" ("\"red\"" | "\"blue\"") "}"
text ::= "\"" [a-z ]{1,30} "\""
"""
_NAMED = {"type": "object", "properties": {"😀": {"type": "boolean"}}, "required": ["😀"]}
_ALL_OF = {"allOf": [{"$ref": "#/definitions/C"}], "definitions": {"C": {"enum": ["red", "green"]}}}
_MANY = {"type": "array", "items": {"type": "integer"}, "maxItems": 20_000}
_WORDS = {"type": "string", "pattern": "^([A-Z][a-z]{1,20} ){1,20}end$"}
_AN_OBJECT = {"a": [1, {"b": SAID}], "c": None}
_A_PHOTO = {
    "title": "apple",
    "description": SAID,
    "objects": [{"name": "apple", "count": 1}, {"name": "bowl", "count": 2}],
    "colours": ["red", "blue"],
    "taken": "2024-02-29",
    "indoors": True,
}
_SOME_ITEMS = '[{"name":"an apple","colour":"red"},{"name":"a bowl","colour":"blue"}]'
# (name, form, a reply)
FORMS: list[tuple[str, Any, str]] = [
    ("any JSON object", {}, json.dumps(_AN_OBJECT)),
    ("photo: six properties", _PHOTO, json.dumps(_A_PHOTO, separators=(",", ":"))),
    ("integer, minimum 10", {"type": "integer", "minimum": 10}, "4711"),
    ("number from 0 to 1", {"type": "number", "minimum": 0, "maximum": 1}, "0.4711"),
    ("integer, multipleOf 5", {"type": "integer", "multipleOf": 5}, "4710"),
    ("enum of an emoji", {"enum": ["😀"]}, '"😀"'),
    ("property 😀", _NAMED, '{"😀":true}'),
    ("enum C:\\new", {"enum": ["C:\\new"]}, '"C:\\\\new"'),
    ("const with a new line", {"const": "a\nb"}, '"a\\nb"'),
    ("enum with a quote", {"enum": ['say "a"']}, '"say \\"a\\""'),
    ('pattern ^"$', {"type": "string", "pattern": '^"$'}, '"\\""'),
    ("pattern ^a|b$", {"type": "string", "pattern": "^a|b$"}, '"a word with b"'),
    ("allOf with $ref to an enum", _ALL_OF, '"green"'),
    ("recursive tree", _TREE, '{"v":1,"c":[{"v":2,"c":[{"v":3}]},{"v":4}]}'),
    ("items {}", {"type": "array", "items": {}}, '[1,"two",{"three":[4]}]'),
    ("maxLength 100000", {"type": "string", "maxLength": 100_000}, json.dumps(SAID)),
    ("maxItems 20000", _MANY, "[1,22,333,4444]"),
    ("enum of 100", {"enum": [f"word {i}" for i in range(100)]}, '"word 77"'),
    ("pattern [a-z]{1,100}", {"type": "string", "pattern": "^[a-z]{1,100}$"}, json.dumps("apple" * 12)),
    ("pattern of words", _WORDS, '"An Red Apple Lies On Wood end"'),
    ("format email", {"type": "string", "format": "email"}, '"an.apple@table.example.org"'),
    ("format date-time", {"type": "string", "format": "date-time"}, '"2024-02-29T12:34:56Z"'),
    ("regex (red|green) [a-z]+", {"regex": "(red|green) [a-z]+"}, "green apples"),
    (r"regex \w+( \w+){3,40}\.", {"regex": r"\w+( \w+){3,40}\."}, SAID.replace(",", "")),
    ("GBNF: list of items", {"gbnf": _GBNF}, _SOME_ITEMS),
]


def grammar_of_form(form: dict[str, Any]) -> Grammar:
    if "regex" in form:
        asked = {"type": "regex", "regex": form["regex"]}
    elif "gbnf" in form:
        return gbnf(form["gbnf"])
    else:
        asked = {"type": "json_object", **({"schema": form} if form else {})}
    grammar = grammar_of(asked, None)
    assert grammar is not None
    return grammar


def ours(vocab: Vocab, form: dict[str, Any], tokens: list[int], pool: ThreadPoolExecutor) -> dict[str, Any]:
    grammar = grammar_of_form(form)
    start = time.perf_counter()
    matcher = vocab.constraints.begin(vocab, grammar)
    begin = time.perf_counter() - start
    logits = np.zeros(vocab.n_tokens, np.float32)
    logits[vocab.bos] = 2  # no form allows it
    room = np.zeros(vocab.n_tokens, CANDIDATE)
    masks, choices, lists, accepts, handed = [], [], [], [], []
    for token in tokens:
        start = time.perf_counter()
        pool.submit(int).result()
        handed.append(time.perf_counter() - start)
        start = clock()
        allowed = matcher.mask()
        masks.append(clock() - start)
        if token not in allowed:
            raise RequestError(f"token {token} is not allowed")
        logits[token] = 1
        start = clock()
        chosen = allowed.likeliest(logits)
        choices.append(clock() - start)
        if chosen != token:
            raise RequestError(f"token {chosen} is chosen, not {token}")
        logits[token] = 0
        start = clock()
        allowed.candidates(logits, room)
        lists.append(clock() - start)
        start = clock()
        matcher.accept(token)
        accepts.append(clock() - start)
    return {
        "begin": begin,
        "mask": masks,
        "choice": choices,
        "accept": accepts,
        "all": [sum(one) for one in zip(masks, choices, accepts, strict=True)],
        "candidates": lists,
        "in a thread": handed,
    }


class Llama:
    """llama.cpp's grammar sampler, in a process of its own."""

    def __init__(self, path: str) -> None:
        from llama_cpp import llama_cpp

        self.llama = llama_cpp
        self.vocab = Vocab(path)
        self.candidates = np.zeros(self.vocab.n_tokens, [("id", "i4"), ("logit", "f4"), ("p", "f4")])


def theirs(rival: Llama, form: dict[str, Any], tokens: list[int]) -> list[float] | str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    if "regex" in form:
        return "-"
    try:
        text = form["gbnf"] if "gbnf" in form else json_schema_to_gbnf(json.dumps(form or {"type": "object"}))
    except Exception as e:
        return f"refused ({type(e).__name__})"
    llama, seconds = rival.llama, []
    with rival.vocab.handle as pointer:
        sampler = llama.llama_sampler_init_grammar(pointer, text.encode(), b"root")
        if not sampler:
            return "refused"
        array = llama.llama_token_data_array()
        for token in tokens:
            rival.candidates["id"] = np.arange(len(rival.candidates))
            rival.candidates["logit"] = 0
            array.data = ctypes.cast(rival.candidates.ctypes.data, llama.llama_token_data_p)
            array.size, array.selected, array.sorted = len(rival.candidates), -1, False
            start = clock()
            llama.llama_sampler_apply(sampler, ctypes.byref(array))
            if rival.candidates["logit"][token] == -np.inf:
                llama.llama_sampler_free(sampler)
                return f"wrong after {len(seconds)} tokens"
            llama.llama_sampler_accept(sampler, token)
            seconds.append(clock() - start)
        llama.llama_sampler_free(sampler)
    return seconds


def ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.3f}"


def most(seconds: list[float]) -> str:
    return f"{max(seconds) * 1000:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=N_TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=report.json_path, help="write the figures there too")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path, arguments.tokens)
        vocab = Vocab(path)
        start = time.perf_counter()
        vocab.constraints.begin(vocab, grammar_of_form({"regex": "a"}))
        build = time.perf_counter() - start
        print(f"{vocab.n_tokens} tokens; llguidance's tokenizer: {build:.2f} s, once for a model\n")
        parts = ("mask", "choice", "accept", "all", "candidates", "in a thread")
        head = ("form", "tokens", "begin", *parts[:4], "most", *parts[4:], "llama.cpp", "most")
        print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
        rival: Contestant | None = None
        for name, form, reply in FORMS:
            tokens = vocab.tokenize(reply, add_bos=False, special=False)
            rounds: list[dict[str, Any]] = []
            other: list[float] | str = []
            for i in range(arguments.rounds):
                rounds.append(ours(vocab, form, tokens, pool))
                if isinstance(other, str) or i >= 2:
                    continue
                try:
                    rival = rival or Contestant(Llama, str(path))
                    answer = rival.run(theirs, form, tokens)
                    other = answer if isinstance(answer, str) else [*other, *answer]
                except Died as e:
                    other, rival = str(e), None
            found = {part: [s for r in rounds for s in r[part]] for part in parts}
            cells = [name, str(len(tokens)), f"{rounds[0]['begin'] * 1000:.1f}"]
            cells += [ms(found[part]) for part in parts[:4]]
            cells += [most(found["all"]), ms(found["candidates"]), ms(found["in a thread"])]
            cells += [other, ""] if isinstance(other, str) else [ms(other), most(other)]
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)
            results[name] = {"tokens": len(tokens), "rounds": rounds, "llama.cpp": other}
        if rival is not None:
            rival.close()
        vocab.close()
    over = [
        name
        for name, result in results.items()
        if statistics.median(s for r in result["rounds"] for s in r["all"]) * 1000 > LIMIT_MS
    ]
    print(f"\nmedian above {LIMIT_MS} ms: {', '.join(over) or 'none'}")
    if arguments.json:
        about = report.about(vocabulary=arguments.tokens, rounds=arguments.rounds, tokenizer_seconds=build)
        report.write_json(arguments.json, {"about": about, "forms": results})


if __name__ == "__main__":
    main()
