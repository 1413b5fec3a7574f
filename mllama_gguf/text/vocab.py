"""Text to tokens and back, by llama.cpp.

llama.cpp does not know the architecture "mllama", but of the same file it loads the vocabulary alone when
told that the architecture is "llama".
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backend import library as _native
from ..checks import whole_numbers
from ..errors import Aborted, ContextFullError, ModelError, RequestError
from ..gguf.reader import read_gguf
from ..handles import FoundOnce, Handle, OneProcess
from ..words import brief, show_name
from .aside import aside
from .constraint import Constraints

logger = logging.getLogger(__name__)

SPLITTERS = ("llama-bpe", "llama3", "llama-v3", "gpt-2")  # values of tokenizer.ggml.pre
PIECE = 16_384  # characters that C tokenizes in one call
MAX_PIECE = 200_000  # the same if no word ends earlier
# Letters that both Python and llama.cpp know as such, and signs that end every word.
_LETTERS = "A-Za-z\u0430-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_AFTER_WORDS = ' \n\t.,;:!?()[]{}<>+-*/=_|"&#%@$~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f'

_SPECIAL_KINDS = (2, 3)  # of tokenizer.ggml.token_type: unknown, control


class _TooLong(ContextFullError, RequestError):
    """A text that is too long to be tokenized."""


class Vocab(OneProcess):
    """The vocabulary of a text file. Thread-safe: nothing changes after loading.

    bos, eos: token ids, -1 if the file names none
    n_tokens: all tokens, the image token included
    stop_ids: tokens that end the assistant's turn
    special:  how the special tokens are spelled
    metadata: the keys of the file, without long arrays
    constraints: replies that follow a grammar
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ModelError for a file without a usable vocabulary, BackendError without llama_cpp."""
        _native.load()
        from llama_cpp import llama_cpp as llama

        self._llama = llama
        self.path = Path(path)
        self.metadata, tokens, special = _read_keys(self.path)

        params = llama.llama_model_default_params()
        params.vocab_only = True
        params.n_gpu_layers = 0
        no_devices = (ctypes.c_void_p * 1)()  # else llama.cpp asks every GPU, and one may throw
        params.devices = ctypes.addressof(no_devices)
        said = {"general.architecture": "llama", "tokenizer.ggml.pre": _splitter(self.path, self.metadata)}
        overrides = (llama.llama_model_kv_override * (len(said) + 1))()  # the last, empty, ends the list
        for override, (key, text) in zip(overrides, said.items(), strict=False):
            override.tag = llama.LLAMA_KV_OVERRIDE_TYPE_STR
            override.key = key.encode()
            value: Any = override.value
            value.val_str = text.encode()
        params.kv_overrides = overrides
        name = os.fsencode(path)
        model = aside(lambda: llama.llama_model_load_from_file(name, params), name="mllama-vocabulary")
        if model is None:
            raise ModelError(f"{path}: its vocabulary cannot be read; was the file made for mllama?")
        pointer = llama.llama_model_get_vocab(model)
        self.handle = Handle("this vocabulary", pointer, lambda _: llama.llama_model_free(model))

        self.n_tokens = int(llama.llama_vocab_n_tokens(pointer))
        self.bos = int(llama.llama_vocab_bos(pointer))
        self.eos = int(llama.llama_vocab_eos(pointer))
        named = self.metadata.get("tokenizer.ggml.eos_token_ids", [])
        self.stop_ids = frozenset(int(i) for i in named if 0 <= i < self.n_tokens) | frozenset(
            i for i in range(self.n_tokens) if llama.llama_vocab_is_eog(pointer, i)
        )
        # llama.cpp takes some for special by their names, whatever the file says. All of these begin so.
        named_so = (i for i, token in enumerate(tokens[: self.n_tokens]) if token[:1] in ("<", "_", "["))
        self.special = special | {tokens[i] for i in named_so if llama.llama_vocab_is_control(pointer, i)}
        if not self.stop_ids:
            raise ModelError(
                f"{path}: the vocabulary names no end-of-turn token (tokenizer.ggml.eos_token_id)"
            )
        self.constraints = Constraints()
        template = self.metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) and template.strip() else None

    def close(self) -> None:
        """Free it, or let the last thread that uses it do so. Twice is fine."""
        self.handle.close()

    def tokenize(
        self,
        text: str,
        *,
        add_bos: bool = True,
        special: bool = True,
        abort: Callable[[], bool] | None = None,
    ) -> list[int]:
        """Text to token ids.

        add_bos: begin with the bos token, if the file wants one
        special: read `<|image|>` and its like as the tokens that they name; else as plain text
        abort:   asked between pieces of some thousand characters; True stops it with Aborted

        Ctrl-C works meanwhile. Raises RequestError if it is not text, and for text in which no word ends
        for very long.
        """
        if not isinstance(text, str):
            raise RequestError(f"text must be a str, not {brief(text)}")
        tokens: list[int] = []
        for piece in self._cut(text):
            if abort is not None and abort():
                raise Aborted("stopped by the abort callback")
            tokens += self._tokenize(piece, add_bos and not tokens, special)
        return tokens

    def _tokenize(self, text: str, add_bos: bool, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 2
        for _ in range(2):
            buffer = (self._llama.llama_token * size)()
            with self.handle as pointer:
                n = self._llama.llama_tokenize(pointer, data, len(data), buffer, size, add_bos, special)
            if n >= 0:
                return list(buffer[:n])
            size = -n
        raise RequestError(f"text of {len(data)} bytes cannot be tokenized")

    def _cut(self, text: str) -> Iterator[str]:
        """The text in pieces that give the same tokens as all of it: Ctrl-C and `abort` cannot stop C."""
        start = 0
        while len(text) - start > PIECE:
            cut = self._ends.search(text, start + PIECE, start + MAX_PIECE)
            if cut is None:
                if len(text) - start <= MAX_PIECE:
                    break
                raise _TooLong(
                    f"text with {MAX_PIECE} characters in a row, from {brief(text[start : start + 20])} on, "
                    "among which no word ends, cannot be tokenized"
                )
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    @FoundOnce
    def _ends(self) -> re.Pattern[str]:
        """Finds the place behind a word, where every splitter that is allowed here cuts, and at which no
        token that has a name is torn."""
        llama = self._llama
        named = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        used = set("".join(self.special))
        with self.handle as pointer:
            for token in range(self.n_tokens):
                if llama.llama_vocab_get_attr(pointer, token) & named:
                    used.update(self.text(token))
        signs = "".join(sign for sign in _AFTER_WORDS if sign not in used)
        return re.compile(f"(?<=[{_LETTERS}])(?=[{re.escape(signs)}])" if signs else "(?!)")

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Token ids to text; bytes that are not UTF-8 become U+FFFD. special: show special tokens as well.
        Raises RequestError for what are not token ids."""
        ids = whole_numbers("tokens", tokens)
        return b"".join(self.piece(token, special=special) for token in ids).decode("utf-8", "replace")

    def pieces(self) -> list[bytes]:
        """The bytes of every token; none of special ones."""
        buffer = ctypes.create_string_buffer(64)
        to_piece, found = self._llama.llama_token_to_piece, []
        with self.handle as pointer:
            for token in range(self.n_tokens):
                n = to_piece(pointer, token, buffer, 64, 0, False)
                found.append(buffer.raw[:n] if n >= 0 else self.piece(token))
        return found

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, which may be part of a character. Raises RequestError for an unknown id."""
        if not 0 <= token < self.n_tokens:
            raise RequestError(f"token {brief(token)} is not in the vocabulary of {self.n_tokens}")
        size = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            with self.handle as pointer:
                n = self._llama.llama_token_to_piece(pointer, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n
        raise RequestError(f"token {token} has no text")

    def text(self, token: int) -> str:
        """How the special token is spelled, "" for -1."""
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    def count(self, tokens: Sequence[int], token: int) -> int:
        """How often a token occurs."""
        return sum(t == token for t in tokens)


def _splitter(path: Path, keys: Mapping[str, Any]) -> str:
    """The name of the rule by which text is split into words.

    llama.cpp has code for those of Llama 3 and GPT-2. Others it leaves to std::regex, which takes stack for
    each character until the process ends. Every Llama 3.2 Vision has Llama 3's, so a file without a name, or
    with the name of none, gets it too.
    """
    name = keys.get("tokenizer.ggml.pre", "")
    if name in ("", "default"):
        logger.warning("%s: tokenizer.ggml.pre is missing; llama-bpe is used", show_name(path.name))
        return "llama-bpe"
    if name not in SPLITTERS:
        raise ModelError(
            f"{show_name(path)}: tokenizer.ggml.pre is {brief(name)}; Llama 3.2 Vision has 'llama-bpe', and "
            "'gpt-2' can be used too"
        )
    return str(name)


def _read_keys(path: Path) -> tuple[dict[str, Any], list[str], frozenset[str]]:
    """The keys of a file whose token table llama.cpp can load, its tokens, and those that it calls special.
    llama.cpp ends the process over some of what is checked here."""
    keys = read_gguf(path, whole=("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")).keys
    kinds = keys.pop("tokenizer.ggml.token_type", None)
    model, tokens = keys.get("tokenizer.ggml.model"), keys.pop("tokenizer.ggml.tokens", None)
    if model != "gpt2":
        raise ModelError(f"{path}: tokenizer.ggml.model is {brief(model)}, 'gpt2' expected")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ModelError(f"{path}: tokenizer.ggml.tokens is missing or no list of strings")
    # llama.cpp names empty tokens in this way, and takes a NUL for the end.
    names = [token.partition("\0")[0] or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(names)) != len(names):
        raise ModelError(f"{path}: tokenizer.ggml.tokens has the same token twice")
    bos = keys.get("tokenizer.ggml.bos_token_id")
    if bos is not None and not (isinstance(bos, int) and 0 <= bos < len(tokens)):
        raise ModelError(f"{path}: tokenizer.ggml.bos_token_id is {brief(bos)}, of {len(tokens)} tokens")
    named = zip(tokens, kinds if isinstance(kinds, list) else [], strict=False)
    return keys, tokens, frozenset(token for token, kind in named if kind in _SPECIAL_KINDS)
