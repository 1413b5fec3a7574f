"""Text to tokens: long text in pieces, and vocabularies that would end the process."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import vocabulary
from helpers import STOP_SECONDS, TinyFiles, elsewhere

from mllama_gguf import Mllama
from mllama_gguf.errors import Aborted, ModelError, RequestError
from mllama_gguf.text import vocab as module
from mllama_gguf.text.vocab import Vocab

PARTS = [
    "the ",
    "apple",
    " house",
    "don't",
    "'s",
    "12345",
    "\n",
    "\n\n",
    "  ",
    "\t",
    ".",
    ",",
    "!?",
    "_",
    "🍎",
    "e\u0301",
]
PARTS += ["<|eot_id|>", "<|image|>", "<|eot", "猫。", "кот ", "=/=", "\0", "\u2028", "a.b", "X,", "\ud800"]


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A file with a vocabulary alone, with other keys."""

    def make(n_tokens: int = 3000, **others: object) -> Path:
        path = tmp_path_factory.mktemp("vocabulary") / "v.gguf"
        vocabulary.write_vocabulary(path, n_tokens, {f"tokenizer.ggml.{k}": v for k, v in others.items()})
        return path

    return make


@pytest.mark.parametrize("splitter", ["llama-bpe", "gpt-2"])
def test_pieces_give_the_tokens_of_the_whole(
    made: Callable[..., Path], splitter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = Vocab(made(pre=splitter))
    rng = random.Random(0)
    texts = ["".join(rng.choice(PARTS) for _ in range(rng.randrange(400))) for _ in range(150)]
    options = [{"add_bos": rng.random() < 0.5, "special": rng.random() < 0.5} for _ in texts]
    whole = [vocab.tokenize(text, **given) for text, given in zip(texts, options, strict=True)]
    n_pieces = 0
    for size in (1, 7, 40):
        monkeypatch.setattr(module, "PIECE", size)
        n_pieces += sum(len(list(vocab._cut(text))) for text in texts)
        assert [vocab.tokenize(text, **given) for text, given in zip(texts, options, strict=True)] == whole
    assert n_pieces > 10 * len(texts)


def test_no_special_token_is_torn(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not one whose name has blanks and signs."""
    tokens = vocabulary.vocabulary(3000)["tokenizer.ggml.tokens"]
    types = [1] * len(tokens)
    types[2000], types[2001] = gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL
    tokens[2000], tokens[2001] = "one of, two", "<a b.c>"
    vocab = Vocab(made(tokens=tokens, token_type=types))
    monkeypatch.setattr(module, "PIECE", 2)
    got = vocab.tokenize("see one of, two and <a b.c>, yes", add_bos=False)
    assert {2000, 2001} <= set(got)


def test_text_without_an_end_of_a_word(vocab: Vocab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIECE", 50_000)
    for sign in ("a", "1", "\n", " ", "!", "\ud800"):
        assert vocab.tokenize(sign * 50_000)
        with pytest.raises(RequestError, match=r"50000 characters in a row, from .* no word ends"):
            vocab.tokenize("word, " * 5000 + sign * 60_000)


@pytest.mark.parametrize("name", ["deepseek-coder", "gpt-4o", "tekken", "falcon", "no such", "x" * 100_000])
def test_splitters_that_need_a_stack_are_refused(made: Callable[..., Path], name: str) -> None:
    with pytest.raises(
        ModelError, match=r"tokenizer\.ggml\.pre is .*; Llama 3\.2 Vision has 'llama-bpe'"
    ) as e:
        Vocab(made(pre=name))
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("name", ["", "default", None])
def test_a_missing_splitter_is_llamas(
    made: Callable[..., Path], name: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mllama_gguf"):
        vocab = Vocab(made(pre=name))
    assert "llama-bpe is used" in caplog.text
    text = "Hello 1234567, don't!\n\nWorld" + "!" * 50_000
    assert vocab.tokenize(text) == Vocab(made()).tokenize(text)


def test_the_abort_callback_stops_it(tiny_files: Callable[[str], TinyFiles]) -> None:
    stop = [False]
    with Mllama(tiny_files("gqa").one, abort=lambda: stop[0]) as model:
        text = "word " * 100_000
        n = len(model.tokenize(text))
        stop[0] = True
        for ask in (
            model.tokenize,
            lambda text: model.create_chat_completion([{"role": "user", "content": text}]),
        ):
            with pytest.raises(Aborted):
                ask(text)
        stop[0] = False
        assert len(model.tokenize(text)) == n


def test_ctrl_c_is_heard_while_megabytes_are_tokenized(tiny_files: Callable[[str], TinyFiles]) -> None:
    program = """
import signal, sys
from mllama_gguf.text.vocab import Vocab
signal.signal(signal.SIGINT, signal.default_int_handler)
vocab = Vocab(sys.argv[1])
text = "word\\n " * 10_000_000
print("begin", flush=True)
try:
    vocab.tokenize(text)
except KeyboardInterrupt:
    print("heard", flush=True)
"""
    command = [sys.executable, "-c", program, str(tiny_files("gqa").text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **elsewhere()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert process.stdout.readline() == "heard\n"
        assert time.monotonic() - sent < STOP_SECONDS  # all of the text takes a minute
        assert process.wait(20) == 0
