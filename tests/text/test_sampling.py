"""Choosing tokens. The samplers are llama.cpp's; tested is that they are used rightly."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from helpers import TinyFiles

from mllama_gguf.errors import MllamaError, ModelError, RequestError
from mllama_gguf.text.grammar import Grammar, gbnf, grammar_of
from mllama_gguf.text.sampling import OLLAMA_SAMPLERS, SAMPLERS, Sampler, SamplingOptions
from mllama_gguf.text.vocab import Vocab

SCHEMA = {
    "type": "object",
    "properties": {
        "fruit": {"enum": ["apple", "pear"]},
        "count": {"type": "integer"},
        "ripe": {"type": "boolean"},
    },
    "required": ["fruit", "count", "ripe"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocab(tiny_files: Callable[[str], TinyFiles]) -> Vocab:
    return Vocab(tiny_files("gqa").text)


SIZE = 333  # logits of "gqa"; the vocabulary has the image token more


def noise(seed: int, scale: float = 2.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=SIZE) * scale).astype(np.float32)


def sampler(vocab: Vocab, prompt: tuple[int, ...] = (), **options: Any) -> Sampler:
    return Sampler(vocab, SIZE, SamplingOptions(**options), prompt)


def test_greedy_takes_the_likeliest(vocab: Vocab) -> None:
    greedy = sampler(vocab)
    for seed in range(20):
        assert greedy.sample(noise(seed)) == noise(seed).argmax()


def test_a_seed_repeats_and_seeds_differ(vocab: Vocab) -> None:
    def tokens(seed: int | None) -> list[int]:
        one = sampler(vocab, temperature=1.0, seed=seed)
        return [one.sample(noise(i)) for i in range(30)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
    assert tokens(-1) == tokens(-1)
    assert tokens(2**40) == tokens(2**40)


def test_top_k_top_p_min_p_keep_the_likeliest(vocab: Vocab) -> None:
    logits = noise(3)
    order = np.argsort(-logits)
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def drawn(**options: Any) -> set[int]:
        one = sampler(vocab, **{**off, "seed": 1, **options})
        return {one.sample(logits) for _ in range(600)}

    assert drawn(top_k=3) == set(order[:3])
    n = int(np.searchsorted(np.cumsum(p[order]), 0.3)) + 1
    assert drawn(top_p=0.3) == set(order[:n])
    assert drawn(min_p=0.5) == set(np.flatnonzero(p >= 0.5 * p.max()))
    assert len(drawn()) > 50


def test_temperature_is_the_softmax_temperature(vocab: Vocab) -> None:
    logits = np.full(SIZE, -1e9, np.float32)
    logits[[5, 6]] = [1.0, 0.0]
    one = sampler(vocab, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    share = np.mean([one.sample(logits) == 5 for _ in range(4000)])
    assert abs(share - 1 / (1 + np.exp(-0.5))) < 0.03


def test_repeat_penalty_counts_prompt_and_reply(vocab: Vocab) -> None:
    logits = np.full(SIZE, -5.0, np.float32)
    logits[[5, 6, 7]] = [3.0, 2.9, 2.8]
    one = sampler(vocab, (SIZE, 5), repeat_penalty=1.5)  # the image token has no logit, and no part in this
    assert [one.sample(logits) for _ in range(3)] == [6, 7, 5]


def chances(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(p / p.sum())


def drawn(vocab: Vocab, logits: npt.NDArray[np.float32], **options: Any) -> set[int]:
    one = sampler(vocab, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, **options})
    return {one.sample(logits) for _ in range(1500)}


def test_the_order_of_samplers(vocab: Vocab) -> None:
    """Six tokens. With the temperature first, their probabilities are nearer to each other, and top_p and
    min_p keep more of them."""
    logits = np.full(SIZE, -1e9, np.float32)
    logits[:6] = [4.0, 3.0, 2.0, 1.0, 0.0, -1.0]

    def kept_by_top_p(temperature: float, among: int) -> set[int]:
        p = chances(logits[:among] / np.float32(temperature))
        return set(range(int(np.searchsorted(np.cumsum(p), 0.9)) + 1))

    top_p = {"temperature": 3.0, "top_p": 0.9}
    assert drawn(vocab, logits, **top_p) == kept_by_top_p(1.0, 6) == {0, 1, 2}
    ollama = {"samplers": OLLAMA_SAMPLERS}
    assert drawn(vocab, logits, **top_p, **ollama) == kept_by_top_p(3.0, 6) == {0, 1, 2, 3, 4}
    # top_k comes before top_p, or after it.
    assert drawn(vocab, logits, **top_p, top_k=4, **ollama) == kept_by_top_p(3.0, 4) == {0, 1, 2, 3}
    last = ["temperature", "top_p", "min_p", "top_k"]
    assert drawn(vocab, logits, **top_p, top_k=4, samplers=last) == {0, 1, 2, 3}
    min_p = {"temperature": 3.0, "min_p": 0.5}
    assert drawn(vocab, logits, **min_p) == {0}
    assert drawn(vocab, logits, **min_p, **ollama) == {0, 1, 2}


def test_the_default_order_of_samplers(vocab: Vocab) -> None:
    def tokens(**options: Any) -> list[int]:
        one = sampler(vocab, temperature=1.3, seed=5, **options)
        return [one.sample(noise(i)) for i in range(40)]

    assert tokens() == tokens(samplers=SAMPLERS) == tokens(samplers=list(SAMPLERS))
    assert tokens() != tokens(samplers=OLLAMA_SAMPLERS)


@pytest.mark.parametrize(
    "samplers",
    [
        "top_k",
        ("top_k",),
        ("top_k", "top_p", "min_p"),
        ("top_k", "top_p", "min_p", "temperature", "top_k"),
        ("top_k", "top_p", "min_p", "mirostat"),
        (1, 2, 3, 4),
        5,
    ],
)
def test_orders_of_samplers_that_cannot_be(samplers: Any) -> None:
    with pytest.raises(RequestError, match="samplers must be top_k, top_p, min_p, temperature"):
        SamplingOptions(samplers=samplers)


def test_presence_and_frequency_penalty_count_the_reply_alone(vocab: Vocab) -> None:
    logits = np.full(SIZE, -50.0, np.float32)
    logits[[5, 6, 7]] = [3.0, 2.4, 1.9]
    presence = sampler(vocab, (5, 5, 5), presence_penalty=0.8)
    # 5 costs 0.8 once it was said, however often.
    assert [presence.sample(logits) for _ in range(5)] == [5, 6, 5, 5, 5]
    frequency = sampler(vocab, (5, 5, 5), frequency_penalty=0.5)
    # 5: 3.0, 2.5, 2.0, 1.5 ...; 6: 2.4, 1.9, ...; 7: 1.9, 1.4
    assert [frequency.sample(logits) for _ in range(4)] == [5, 5, 6, 5]
    rewarded = sampler(vocab, (), frequency_penalty=-2.0, logit_bias={"7": 2.0})
    assert [rewarded.sample(logits) for _ in range(3)] == [7, 7, 7]


def test_logit_bias(vocab: Vocab) -> None:
    logits = noise(3)
    order = [int(token) for token in np.argsort(-logits)]
    assert sampler(vocab, logit_bias={order[0]: -100}).sample(logits) == order[1]
    assert sampler(vocab, logit_bias={str(order[200]): 100}).sample(logits) == order[200]
    assert sampler(vocab, logit_bias={np.int64(order[9]): np.float32(100)}).sample(logits) == order[9]
    assert sampler(vocab, logit_bias={}).sample(logits) == order[0]
    letter = gbnf('root ::= "a" | "b"')
    a, b = (vocab.tokenize(letter, add_bos=False)[0] for letter in "ab")
    for wanted in (a, b):
        assert sampler(vocab, grammar=letter, logit_bias={wanted: 100}).sample(logits) == wanted
    assert (logits == noise(3)).all()  # the model's own are not touched
    with pytest.raises(RequestError, match=f"the model has {SIZE} tokens, and none is {SIZE}"):
        sampler(vocab, logit_bias={SIZE: 1})


@pytest.mark.parametrize(
    "bias", [{"x": 1}, {5: 101}, {5: float("nan")}, {5: None}, {5: True}, {1.5: 1}, [5], "5", 5, {(5,): 1}]
)
def test_logit_biases_that_cannot_be(bias: Any) -> None:
    with pytest.raises(RequestError, match="logit_bias must be a dict of token ids") as raised:
        SamplingOptions(logit_bias=bias)
    assert "\n" not in str(raised.value)


def test_numbers_of_numpy(vocab: Vocab) -> None:
    def tokens(kind: Any, whole: Any) -> list[int]:
        one = sampler(vocab, temperature=kind(1.5), top_k=whole(9), top_p=kind(0.5), seed=whole(3))
        return [one.sample(noise(i)) for i in range(20)]

    assert tokens(float, int) == tokens(np.float32, np.int64) == tokens(np.float64, np.uint8)


def test_options_out_of_range() -> None:
    for wrong in (
        {"presence_penalty": 2.1},
        {"frequency_penalty": "x"},
        {"top_k": 1.5},
        {"top_k": np.float64(2)},
        {"temperature": np.array([1.0, 2.0])},
        {"logprobs": 1},
        {"logprobs": "yes"},
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 5},
        {"seed": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": True},
        {"repeat_penalty": 0},
        {"seed": 1.5},
    ):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            SamplingOptions(**wrong)  # type: ignore[arg-type]


def constrained(vocab: Vocab, grammar: Grammar | None, **options: Any) -> str:
    """What comes of noise under a grammar."""
    one = sampler(vocab, grammar=grammar, **options)
    tokens: list[int] = []
    for seed in range(200):
        token = one.sample(noise(seed))
        if token in vocab.stop_ids:
            return vocab.detokenize(tokens)
        tokens.append(token)
        if one.finished:
            return vocab.detokenize(tokens)
    raise AssertionError(f"no end: {vocab.detokenize(tokens)}")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 4}, {"repeat_penalty": 1.3}])
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA},
    ],
)
def test_json_schema(vocab: Vocab, response_format: dict[str, Any], options: dict[str, Any]) -> None:
    text = constrained(vocab, grammar_of(response_format, None), **options)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_grammar(vocab: Vocab) -> None:
    assert constrained(vocab, gbnf('root ::= "a" ("b" | "c") "d"')) in ("abd", "acd")


@pytest.mark.parametrize("grammar", ["root ::= (", "root ::= other", 'x ::= "a"', 'root ::= root "a"'])
def test_a_grammar_that_is_not_gbnf(vocab: Vocab, grammar: str) -> None:
    with pytest.raises(RequestError, match="grammar") as raised:
        sampler(vocab, grammar=gbnf(grammar))
    assert "\n" not in str(raised.value)


def test_response_format(vocab: Vocab) -> None:
    assert grammar_of(None, None) is None
    assert grammar_of({"type": "text"}, None) is None
    assert (
        grammar_of({"type": "text"}, 'root ::= "x"')
        == grammar_of(None, 'root ::= "x"')
        == gbnf('root ::= "x"')
    )
    one = sampler(vocab, grammar=grammar_of({"type": "json_object"}, None))
    assert vocab.piece(one.sample(noise(0))).startswith(b"{")
    for wrong, words in (
        ({"type": "xml"}, "xml"),
        ({}, "type"),
        ("json", "dict"),
        ({"type": "json_schema"}, "needs json_schema.schema"),
    ):
        with pytest.raises(RequestError, match=words) as raised:
            grammar_of(wrong, None)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
    with pytest.raises(RequestError, match="exclude"):
        grammar_of({"type": "json_object"}, 'root ::= "x"')
    with pytest.raises(RequestError, match="grammar"):
        grammar_of(None, " ")


class TestVocab:
    def test_special_tokens(self, vocab: Vocab) -> None:
        text = "<|start_header_id|>user<|end_header_id|>\n\n<|image|>the cat<|eot_id|>"
        tokens = vocab.tokenize(text)
        assert tokens[0] == vocab.bos
        assert tokens.count(SIZE) == 1
        assert tokens[-1] in vocab.stop_ids
        assert vocab.detokenize(tokens[1:], special=True) == text
        assert vocab.detokenize(tokens) == "user\n\nthe cat"

    def test_special_tokens_as_words(self, vocab: Vocab) -> None:
        tokens = vocab.tokenize("<|image|>", add_bos=False, special=False)
        assert SIZE not in tokens
        assert vocab.detokenize(tokens) == "<|image|>"

    @pytest.mark.parametrize("text", ["", "a", "Grüße ☃ 😀", "\x00 \n\t", "x" * 5000])
    def test_round_trip(self, vocab: Vocab, text: str) -> None:
        assert vocab.detokenize(vocab.tokenize(text, add_bos=False)) == text

    def test_facts(self, vocab: Vocab) -> None:
        assert vocab.n_tokens == SIZE + 1
        assert {vocab.text(i) for i in vocab.stop_ids} == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
        assert vocab.text(vocab.bos) == "<|begin_of_text|>"
        assert vocab.text(-1) == ""
        assert vocab.metadata["mllama.vocab_size"] == SIZE

    @pytest.mark.parametrize("token", [-1, SIZE + 1, 2**31])
    def test_unknown_tokens(self, vocab: Vocab, token: int) -> None:
        with pytest.raises(RequestError, match="not in the vocabulary"):
            vocab.detokenize([token])


def test_damaged_token_tables_are_errors(tiny_files: Callable[[str], TinyFiles], tmp_path: Path) -> None:
    """llama.cpp, left to itself, ends the process over some of these."""
    data = tiny_files("gqa").text.read_bytes()
    bos = b"tokenizer.ggml.bos_token_id" + struct.pack("<I", 4)  # the type, uint32, and then the value
    for old, new in (
        (b"<|step_id|>", b"<|eom_id|>\0"),  # the same token twice, to llama.cpp
        (b"gpt2", b"none"),
        (b"gpt2", b"bert"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez"),
        (bos + struct.pack("<I", 322), bos + struct.pack("<I", 334)),
        (b"llama-bpe", b"llama-xyz"),
    ):
        assert old in data
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data.replace(old, new))
        with pytest.raises(ModelError, match=r"damaged\.gguf: ") as raised:
            Vocab(path)
        assert "\n" not in str(raised.value)


def test_mutated_token_tables_never_end_the_process(
    tiny_files: Callable[[str], TinyFiles], tmp_path: Path
) -> None:
    data = tiny_files("square").text.read_bytes()
    begin, end = data.index(b"tokenizer.ggml.model") - 8, data.index(b"token_embd.weight")
    rng = random.Random(0)
    path = tmp_path / "mutated.gguf"
    outcomes = set()
    for _ in range(500):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(begin, end - 8)
            value = rng.choice(
                [b"\0" * 4, rng.randbytes(1), rng.randbytes(8), struct.pack("<I", rng.randrange(13))]
            )
            mutated[at : at + len(value)] = value
        path.write_bytes(mutated)
        try:
            vocab = Vocab(path)
            vocab.detokenize(vocab.tokenize("the <|image|> cat"), special=True)
            outcomes.add("loaded")
        except MllamaError as e:
            assert "\n" not in str(e)
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}
