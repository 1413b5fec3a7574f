"""The vocabulary that the converter writes, read by llama.cpp, against the tokenizer.json it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tokenizers  # type: ignore[import-untyped]

from mllama_gguf.convert.huggingface import convert
from mllama_gguf.text.vocab import Vocab

TEXTS = (
    "",
    "Describe this image. a red apple on the left",
    "The apple's there; you'll SEE 12345 and 1234567890!?",
    "<|start_header_id|>user<|end_header_id|>\n\n<|image|>what is in the picture?<|eot_id|>",
    "héllo 世界 🙂 \u0000 ½ \u0149 \ufb01",
    "  spaces   \t\ttabs \r\n\r\n lines\n\n\n",
    "<|image|><|image|> < |image| >",
    "".join(chr(i) for i in range(1, 0x250)),
)


@pytest.fixture(scope="module", params=["square", "gqa", "threetiles"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Vocab, tokenizers.Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_checkpoint(tiny.ARCHS[request.param], folder / "hf")
    text: Path = convert(folder / "hf", folder / "m.gguf", type="bf16")[0]
    return Vocab(text), tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_same_tokens(both: tuple[Vocab, tokenizers.Tokenizer], text: str) -> None:
    vocab, tokenizer = both
    expected = tokenizer.encode(text).ids
    assert vocab.tokenize(text) == expected
    assert vocab.detokenize(expected, special=True) == "<|begin_of_text|>" + text


def test_same_vocabulary(both: tuple[Vocab, tokenizers.Tokenizer]) -> None:
    vocab, tokenizer = both
    byte = {character: b for b, character in enumerate(tiny.byte_tokens())}
    special = {*tiny.SPECIAL_TOKENS, tiny.IMAGE_TOKEN}
    for token, i in tokenizer.get_vocab().items():
        expected = token.encode() if token in special else bytes(byte[c] for c in token)
        assert vocab.piece(i, special=True) == expected
