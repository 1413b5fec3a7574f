"""Replies drawn at random, token by token, under a grammar: no model is needed."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema

from mllama_gguf.text.grammar import Grammar
from mllama_gguf.text.vocab import Vocab

_CLOSING = (b'"', b"}", b"]")


def closing_tokens(vocab: Vocab) -> frozenset[int]:
    """Tokens that bring JSON to its end."""
    ends = {i for i in range(vocab.n_tokens) if vocab.piece(i) and vocab.piece(i)[:1] in _CLOSING}
    return frozenset(ends | vocab.stop_ids)


def draw(
    vocab: Vocab, grammar: Grammar, rng: random.Random, closing: frozenset[int], longest: int = 300
) -> str | None:
    """A reply of random tokens. None: it has no end within so many."""
    matcher = vocab.constraints.begin(vocab, grammar)
    pieces: list[bytes] = []
    for i in range(longest):
        allowed = [int(token) for token in matcher.mask().ids()]
        ends = [token for token in allowed if token in closing]
        token = rng.choice(ends if ends and rng.random() < (0.25 if i < 40 else 0.7) else allowed)
        matcher.accept(token)
        if token not in vocab.stop_ids:
            pieces.append(vocab.piece(token))
        if token in vocab.stop_ids or matcher.finished:
            return b"".join(pieces).decode()
    return None


def follows(vocab: Vocab, grammar: Grammar, text: str) -> bool:
    """Whether a text is a complete reply of a grammar."""
    matcher = vocab.constraints.begin(vocab, grammar)
    for token in vocab.tokenize(text, add_bos=False, special=False):
        if matcher.finished or token not in matcher.mask():
            return False
        matcher.accept(token)
    return matcher.finished or bool(vocab.stop_ids.intersection(int(t) for t in matcher.mask().ids()))


def validate(reply: str, schema: Any) -> None:
    jsonschema.validate(json.loads(reply), schema)
