"""A vocabulary of the size of Llama 3's, without a model: what a grammar costs depends on both.

    python tests/vocabulary.py OUT.gguf [TOKENS]

Its tokens are made up, but like those of Llama 3 they are bytes, words with and without a blank before them
in several writings, runs of blanks, signs, numbers of up to three digits, and words of other alphabets; and
all beginnings of these, so that each is reached by merges.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import tiny
from layouts import save

N_TOKENS = 128_256
_BEGINNINGS = "b c d f g h j k l m n p r s t v w st tr pr ch sh th br cl str qu ex in un re de con"
_VOWELS = "a e i o u ai ea ou io y"
_ENDS = [
    "",
    "",
    "n",
    "r",
    "s",
    "t",
    "l",
    "d",
    "ng",
    "st",
    "ck",
    "rm",
    "ve",
    "ted",
    "ing",
    "tion",
    "ment",
    "able",
]
_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_ALPHABETS = ((0x430, 0x44F), (0x3B1, 0x3C9), (0x5D0, 0x5EA), (0x627, 0x648), (0x905, 0x939), (0xE01, 0xE2E))
_IDEOGRAPHS = (0x4E00, 0x7FFF)


def vocabulary(n_tokens: int = N_TOKENS) -> dict[str, Any]:
    """The keys of a GGUF file, of at least 2000 tokens; the special tokens are the last ones."""
    characters = tiny.byte_tokens()
    tokens = dict.fromkeys(characters)
    merges: list[str] = []
    n_plain = n_tokens - len(tiny.SPECIAL_TOKENS) - 1
    for word in _words():
        parts = [characters[b] for b in word.encode()]
        left = parts[0]
        for right in parts[1:]:
            if len(tokens) == n_plain:
                break
            if left + right not in tokens:
                tokens[left + right] = None
                merges.append(f"{left} {right}")
            left += right
        if len(tokens) == n_plain:
            break
    special = [*tiny.SPECIAL_TOKENS, tiny.IMAGE_TOKEN]
    types = [gguf.TokenType.NORMAL] * n_plain + [gguf.TokenType.CONTROL] * len(special)
    return {
        "general.architecture": "mllama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": n_plain + special.index("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": n_plain + special.index("<|eot_id|>"),
        "tokenizer.ggml.add_bos_token": True,
    }


def _words() -> Iterator[str]:
    """Endless, the frequent ones first."""
    yield from (str(n) for n in range(1000))
    yield from (f"{n:0{digits}}" for digits in (2, 3) for n in range(10 ** (digits - 1)))
    for n in range(2, 80):
        yield from (" " * n, "\t" * n, "\n" * (n // 4 + 1), " " * n + "\n", "=" * n, "-" * n)
    yield from ("".join(pair) for pair in product(_SIGNS, _SIGNS))
    rng = random.Random(0)
    while True:
        kind = rng.random()
        if kind < 0.72:
            word = "".join(
                rng.choice(_BEGINNINGS.split()) + rng.choice(_VOWELS.split()) + rng.choice(_ENDS)
                for _ in range(rng.choice((1, 1, 2, 2, 3)))
            )
            word = rng.choice((word, word, word.capitalize(), word.upper()))
            yield rng.choice(("", " ", " ", "_", ".")) + word
        elif kind < 0.90:
            low, high = rng.choice(_ALPHABETS)
            word = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(2, 7)))
            yield rng.choice(("", " ")) + word
        elif kind < 0.97:
            yield "".join(chr(rng.randint(*_IDEOGRAPHS)) for _ in range(rng.randint(1, 3)))
        else:
            yield rng.choice(("", " ")) + "".join(rng.choice(_SIGNS) for _ in range(rng.randint(2, 4)))


def write_vocabulary(path: Path, n_tokens: int = N_TOKENS, others: Mapping[str, Any] | None = None) -> None:
    """A GGUF file without tensors. others: keys with other values; None: left out"""
    keys = {**vocabulary(n_tokens), **(others or {})}
    del keys["general.architecture"]  # which the writer adds
    save(path, {name: value for name, value in keys.items() if value is not None}, {})


if __name__ == "__main__":
    write_vocabulary(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else N_TOKENS)
