"""How likely tokens were."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from helpers import TinyFiles

from mllama_gguf.text.logprobs import token_logprob
from mllama_gguf.text.vocab import Vocab

SIZE = 333


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


def test_they_are_the_log_of_the_softmax(vocab: Vocab) -> None:
    logits = (np.random.default_rng(1).normal(size=SIZE) * 4).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    order = np.argsort(-logits)
    for n_top in (0, 1, 20):
        about = token_logprob(vocab, logits, 17, n_top)
        assert about.logprob == pytest.approx(np.log(p[17]), rel=1e-12)
        assert [one.token for one in about.top] == list(order[:n_top])
        assert [one.logprob for one in about.top] == pytest.approx(list(np.log(p[order[:n_top]])), rel=1e-12)


def test_the_shape_is_openais(vocab: Vocab) -> None:
    logits = np.zeros(SIZE, np.float32)
    (token,) = vocab.tokenize("a", add_bos=False)
    logits[token] = 1
    shown = token_logprob(vocab, logits, token, 2).as_dict()
    assert set(shown) == {"token", "logprob", "bytes", "top_logprobs"}
    assert (shown["token"], shown["bytes"]) == ("a", [97])
    assert shown["top_logprobs"][0] == {key: shown[key] for key in ("token", "logprob", "bytes")}
    assert len(shown["top_logprobs"]) == 2
    end = token_logprob(vocab, logits, min(vocab.stop_ids), 0).as_dict()
    assert end["token"].startswith("<|")


def test_a_part_of_a_character(vocab: Vocab) -> None:
    snow = vocab.tokenize("☃", add_bos=False)
    assert len(snow) > 1
    shown = [token_logprob(vocab, np.zeros(SIZE, np.float32), token, 0).as_dict() for token in snow]
    assert bytes(b for one in shown for b in one["bytes"]).decode() == "☃"
    json.dumps(shown)


def test_extreme_logits_are_finite(vocab: Vocab) -> None:
    logits = np.full(SIZE, -np.inf, np.float32)
    logits[3] = 3e38
    about = token_logprob(vocab, logits, 4, 3)
    assert (about.logprob, about.top[0].logprob) == (-9999.0, 0.0)
    json.dumps(about.as_dict(), allow_nan=False)
