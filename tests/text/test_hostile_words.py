"""Words of others that cost far more time than their length explains."""

from __future__ import annotations

import time

import pytest

from mllama_gguf.errors import RequestError
from mllama_gguf.store.parameters import is_llama_template
from mllama_gguf.text.gbnf import to_lark

SECONDS = 2.0  # of the processor; the faults took ten or more


@pytest.mark.parametrize(
    "words", [" " * 100_000, "{{" * 50_000, "}}" * 50_000, "{{- " * 30_000, " -}}" * 30_000]
)
def test_templates_of_blanks_and_braces(words: str) -> None:
    before = time.process_time()
    assert not is_llama_template(f"x{words}x")
    assert time.process_time() - before < SECONDS


@pytest.mark.parametrize("words", ["\n" * 32_000, " " * 32_000, " \n" * 16_000, "[" * 32_000, "a\n" * 16_000])
def test_grammars_of_blanks(words: str) -> None:
    before = time.process_time()
    with pytest.raises(RequestError):
        to_lark(f"rot ::= 'a'\n{words}")
    assert time.process_time() - before < SECONDS
