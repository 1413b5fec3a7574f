"""Replies that follow a grammar: how one is asked for, how it ends, and what is shared by replies."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import STOP_SECONDS, TinyFiles
from replies import follows

from mllama_gguf.errors import MllamaError, RequestError
from mllama_gguf.text import constraint
from mllama_gguf.text.constraint import CANDIDATE, Mask, Matcher
from mllama_gguf.text.grammar import gbnf, grammar_of, json_schema, lark, regex
from mllama_gguf.text.vocab import Vocab


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


# ---- how a grammar is asked for ----------------------------------------------------------------------------


def test_response_formats(vocab: Vocab) -> None:
    schema = {"type": "integer", "minimum": 10}
    assert grammar_of(None, None) is None
    assert grammar_of({"type": "text"}, None) is None
    for form, expected in (
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
            json_schema(schema),
        ),
        ({"type": "json_object", "schema": schema}, json_schema(schema)),
        ({"type": "json_object"}, json_schema({"type": "object"})),
        ({"type": "regex", "regex": "a|b"}, regex("a|b")),
        ({"type": "gbnf", "grammar": 'root ::= "x"'}, gbnf('root ::= "x"')),
        ({"type": "lark", "grammar": 'start: "x"'}, lark('start: "x"')),
    ):
        assert grammar_of(form, None) == expected
        assert expected.is_json == form["type"].startswith("json")
    assert (
        grammar_of(None, 'root ::= "x"')
        == grammar_of({"type": "text"}, 'root ::= "x"')
        == gbnf('root ::= "x"')
    )
    assert follows(vocab, json_schema(True), "[null]")


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "xml"}, "'xml': expected"),
        ({}, "None: expected"),
        ({"type": ["x"] * 100_000}, "expected"),
        ("json", "must be a dict, not str"),
        ({"type": "json_schema"}, "needs json_schema.schema"),
        ({"type": "json_schema", "json_schema": "x"}, "needs json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": None}}, "needs json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "a JSON schema is an object"),
        ({"type": "regex"}, 'needs "regex"'),
        ({"type": "regex", "regex": 3}, 'needs "regex"'),
        ({"type": "regex", "regex": "("}, "not valid"),
        ({"type": "gbnf", "grammar": ""}, 'needs "grammar"'),
        ({"type": "lark"}, 'needs "grammar"'),
        ({"type": "lark", "grammar": b"\\ud800".decode("unicode_escape")}, "surrogate"),
        ({"type": "lark", "grammar": 'start: %json {"type": "null"}'}, "%json"),
        ({"type": "lark", "grammar": "".join(f"r{i}: r{i + 1}\n" for i in range(1000))}, "1000 rules"),
        ({"type": "lark", "grammar": "start: " + '"a"' * 20_000}, "60007 characters"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_formats_that_are_refused(form: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        grammar_of(form, None)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_two_grammars_at_the_same_time() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        grammar_of({"type": "json_object"}, 'root ::= "x"')
    for wrong in (" ", "", 3):
        with pytest.raises(RequestError, match="grammar must be GBNF text"):
            grammar_of(None, wrong)  # type: ignore[arg-type]


# ---- Lark --------------------------------------------------------------------------------------------------


def test_lark(vocab: Vocab) -> None:
    grammar = lark('start: "a" word+ "."\nword: " " /[b-d]{1,3}/\n')
    assert follows(vocab, grammar, "a bcd b.")
    assert not follows(vocab, grammar, "a bcdb.")
    for wrong in (
        "start: other",
        'start: "a',
        'rule: "a"',
        "start: /(/",
        "start: <|image|>",
        "start: <[333]>",
    ):
        with pytest.raises(RequestError, match="the grammar cannot be obeyed: ") as raised:
            vocab.constraints.begin(vocab, lark(wrong))
        assert "\n" not in str(raised.value)


def test_special_tokens_are_never_allowed(vocab: Vocab) -> None:
    """Except those that end a reply, where it may end."""
    special = {i for i in range(vocab.n_tokens) if not vocab.piece(i)}
    assert vocab.n_tokens - 1 in special  # the image token
    for grammar in (regex("(?s).*"), lark("start: /(?s:.*)/"), gbnf("root ::= .*")):
        allowed = {int(token) for token in vocab.constraints.begin(vocab, grammar).mask().ids()}
        assert allowed & special == vocab.stop_ids
        # All others may begin a text, except those that begin inside of a character.
        words = set(range(vocab.n_tokens)) - special
        assert words - allowed == {
            i for i in words if 0x80 <= vocab.piece(i)[0] < 0xC2 or vocab.piece(i)[0] > 0xF4
        }
    matcher = vocab.constraints.begin(vocab, lark('start: "a" (<[333]> | "b")'))
    (token,) = vocab.tokenize("a", add_bos=False)
    matcher.accept(token)
    assert {vocab.piece(int(token)) for token in matcher.mask().ids()} == {b"b"}


# ---- what is shared ----------------------------------------------------------------------------------------


def walk(vocab: Vocab, matcher: Matcher, text: str) -> None:
    for token in vocab.tokenize(text, add_bos=False):
        assert token in matcher.mask()
        matcher.accept(token)


def test_replies_of_the_same_grammar_do_not_know_of_each_other(vocab: Vocab) -> None:
    grammar = json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    first, second = (vocab.constraints.begin(vocab, grammar) for _ in range(2))
    walk(vocab, first, '{"a":1')
    walk(vocab, second, "{")
    walk(vocab, first, "2}")
    assert first.finished
    assert not second.finished
    walk(vocab, second, '"a":3}')
    assert second.finished


def test_threads_share_a_vocabulary(vocab: Vocab) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(15):
                assert follows(vocab, json_schema({"enum": [f"{seed}-{i % 4}"]}), f'"{seed}-{i % 4}"')
                assert not follows(vocab, json_schema({"const": i % 3}), "7")
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_kept_grammars_are_few_and_renewed(vocab: Vocab, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    original = vocab.constraints._build

    def build(grammar: Any, try_out: bool = True) -> Any:
        built.append(grammar.source)
        return original(grammar, try_out)

    monkeypatch.setattr(vocab.constraints, "_build", build)
    one = regex("one")
    for _ in range(constraint.USES + 1):
        vocab.constraints.begin(vocab, one)
    assert len(built) == 2
    for i in range(constraint.KEPT):
        vocab.constraints.begin(vocab, regex(f"other {i}"))
    vocab.constraints.begin(vocab, one)
    assert built.count(one.source) == 3
    assert len(vocab.constraints._kept) == constraint.KEPT


def test_a_reply_goes_on_when_the_room_of_a_kept_grammar_is_used_up(
    vocab: Vocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of a kept grammar add up over its replies. llguidance stops at a number of them."""
    monkeypatch.setitem(constraint.LIMITS, "max_lexer_states", 60)
    grammar = regex("((ab|ac|ad)x|(ba|bc|bd)y|(ca|cb|cd)z){1,9}")
    texts = ["abxbaycaz", "acxbcycbz", "adxbdycdz", "cazabxbay", "bayacxcdz"]
    for text in texts * 3:
        assert follows(vocab, grammar, text)


def test_a_vocabulary_goes_away_with_its_grammars(tiny_files: Callable[[str], TinyFiles]) -> None:
    vocab = Vocab(tiny_files("gqa").text)
    follows(vocab, json_schema({"type": "object", "properties": {"abc": {"const": "the cat"}}}), "{}")
    gone = weakref.ref(vocab)
    matcher = vocab.constraints.begin(vocab, json_schema({"const": "the cat sat on the mat"}))
    vocab.close()
    with pytest.raises(MllamaError):  # which text must follow is asked of the vocabulary
        for _ in range(5):
            matcher.accept(int(matcher.mask().ids()[0]))
    del vocab, matcher
    gc.collect()
    assert gone() is None


# ---- time --------------------------------------------------------------------------------------------------


def test_building_gives_up(vocab: Vocab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "MAX_BUILD_SECONDS", 0.0)
    with pytest.raises(RequestError, match="it takes more than 0 s"):
        vocab.constraints.begin(vocab, json_schema({"enum": [f"{i} words" for i in range(3000)]}))


def test_ctrl_c_is_heard_while_a_grammar_is_built(tiny_files: Callable[[str], TinyFiles]) -> None:
    program = """
import os, signal, sys, threading, time
from mllama_gguf.text import constraint
from mllama_gguf.text.grammar import json_schema
from mllama_gguf.text.vocab import Vocab
signal.signal(signal.SIGINT, signal.default_int_handler)
vocab = Vocab(sys.argv[1])
vocab.constraints.begin(vocab, json_schema(True))
constraint.MAX_BUILD_SECONDS = 20
constraint._try_out = lambda matcher: time.sleep(30)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    vocab.constraints.begin(vocab, json_schema({"const": 1}))
except KeyboardInterrupt:
    print(time.monotonic() - start)
"""
    command = [sys.executable, "-c", program, str(tiny_files("gqa").text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < STOP_SECONDS
    assert done.stderr == ""


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.1, 0.5, 0.999, 1.0])
def test_a_mask_of_some_tokens(share: float) -> None:
    """ids, `in`, likeliest and candidates say the same, for few tokens and for most."""
    rng = np.random.default_rng(int(share * 10000))
    flags = rng.random(128 * 32) < share
    flags[77] = True
    mask = Mask(128)
    mask.bits[:] = np.packbits(flags, bitorder="little").view(np.uint32)
    assert np.array_equal(mask.ids(), np.flatnonzero(flags))
    assert all((token in mask) == flags[token] for token in range(len(flags)))
    assert len(flags) not in mask
    for n_vocab in (78, 95, 96, 97, 100, 1023, 1056, 4000, 4095, len(flags), len(flags) + 5):
        candidates = np.full(n_vocab + 1, 7, CANDIDATE)
        ids = mask.ids()[: np.searchsorted(mask.ids(), n_vocab)]
        for i in range(20):
            # With many equal ones, and zeros of both signs.
            logits = rng.integers(-3, 3, n_vocab).astype(np.float32)
            logits[logits == 0] *= rng.choice((-1, 1), (logits == 0).sum())
            if i % 2:
                logits = rng.standard_normal(n_vocab).astype(np.float32)
            assert mask.likeliest(logits) == ids[logits[ids].argmax()]
            n = mask.candidates(logits, candidates[:-1])
            assert np.array_equal(candidates["id"][:n], ids)
            assert np.array_equal(candidates["logit"][:n], logits[ids])
            assert not candidates["p"][:n].any()
        assert candidates[-1] == np.full(1, 7, CANDIDATE)[0]  # beyond its room


def test_a_mask_of_tokens_without_logits() -> None:
    mask, candidates = Mask(2), np.zeros(64, CANDIDATE)
    mask.bits[:] = 0, 1 << 31
    assert mask.likeliest(np.zeros(64, np.float32)) == 63
    assert mask.candidates(np.zeros(64, np.float32), candidates) == 1
    for n_words, n_vocab in ((2, 63), (2, 33), (2, 32), (2, 1), (2, 0), (0, 5)):
        mask, logits = Mask(n_words), np.zeros(n_vocab, np.float32)
        mask.bits[:] = (0, 1 << 31)[:n_words]
        with pytest.raises(RequestError, match="allows no token"):
            mask.likeliest(logits)
        with pytest.raises(RequestError, match="allows no token"):
            mask.candidates(logits, candidates)


@pytest.mark.parametrize("word", [0x80000001, 0x0F0F00F0, 0xFFFFFFFF])
def test_logits_at_the_edges(word: int) -> None:
    """What models do not compute: infinities, and NaN, which counts as the least."""
    for n_words in (1, 33, 70):
        mask = Mask(n_words)
        mask.bits[:] = word
        ids = mask.ids()
        for others in (-np.inf, np.nan, np.finfo(np.float32).min):
            logits = np.full(n_words * 32, others, np.float32)
            assert mask.likeliest(logits) == ids[0]
            for token in (ids[0], ids[len(ids) // 2], ids[-1]):
                for greatest in (0.0, np.inf, np.finfo(np.float32).max):
                    logits[token] = greatest
                    assert mask.likeliest(logits) == token
                logits[token] = others


def test_logits_of_another_kind() -> None:
    mask = Mask(3)
    mask.bits[:] = 2**32 - 1
    logits = np.arange(192, dtype=np.float64)
    assert mask.likeliest(logits[:96]) == 95  # type: ignore[arg-type]
    assert mask.likeliest(logits[::-2].astype(np.float32)[:96]) == 0
    assert mask.likeliest(logits.astype(np.float32)[::-2]) == 0
    for candidates in (np.zeros(95, CANDIDATE), np.zeros(96, np.float64)):
        with pytest.raises(ValueError, match="candidates"):
            mask.candidates(logits[:96].astype(np.float32), candidates)
