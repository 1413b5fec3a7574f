"""Which tokens may come next in a reply that follows a grammar, by llguidance."""

from __future__ import annotations

import threading
from typing import Any, Protocol, cast
from weakref import ref

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from .grammar import Grammar


class Vocabulary(Protocol):
    """What is asked of a vocabulary; `vocab.Vocab` is one."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def stop_ids(self) -> frozenset[int]: ...

    def piece(self, token: int) -> bytes: ...

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> list[int]: ...


class _Tokens:
    """A vocabulary as llguidance reads it. llguidance keeps it, unseen by Python's garbage collector: it must
    not hold what holds llguidance's tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = ref(vocab)
        self.eos_token_id = min(vocab.stop_ids)
        self.tokens = [vocab.piece(token) for token in range(vocab.n_tokens)]
        # Without text of their own: a reply never holds them. llguidance wants other names for them.
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]
        for token in self.special_token_ids:
            self.tokens[token] = b"<|%d|>" % token

    def __call__(self, text: str) -> list[int]:
        """How text is cut into tokens. llguidance asks where the grammar leaves no choice."""
        vocab = self._vocab()
        if vocab is None:
            raise ValueError("the model is closed")
        return vocab.tokenize(text, add_bos=False, special=False)


class Constraints:
    """What llguidance makes of a vocabulary, once for all its replies. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._forbidden: npt.NDArray[np.uint8] | None = None

    def begin(self, vocab: Vocabulary, grammar: Grammar) -> Matcher:
        """A reply that follows the grammar. Raises RequestError for a grammar that cannot be used."""
        from llguidance import LLMatcher

        with self._lock:
            if self._tokenizer is None:
                self._build(vocab)
            matcher = LLMatcher(self._tokenizer, grammar.source, log_level=0)
            if matcher.is_error():
                raise RequestError(f"the grammar cannot be used: {_words(matcher.get_error())}")
            assert self._forbidden is not None
            begun = Matcher(matcher, self._forbidden)
            begun.allowed()  # a grammar of no text at all is found here
            return begun

    def _build(self, vocab: Vocabulary) -> None:
        from llguidance import LLTokenizer

        tokens = _Tokens(vocab)
        self._tokenizer = LLTokenizer(cast(Any, tokens), eos_token=sorted(vocab.stop_ids))
        forbidden = np.zeros(-(-len(tokens.tokens) // 32) * 32, bool)
        forbidden[tokens.special_token_ids] = True
        forbidden[list(vocab.stop_ids)] = False
        self._forbidden = np.packbits(forbidden, bitorder="little")


class Matcher:
    """The state of one reply. Not thread-safe."""

    def __init__(self, matcher: Any, forbidden: npt.NDArray[np.uint8]) -> None:
        self._matcher = matcher
        self._permitted = ~forbidden
        self._mask = np.zeros(len(forbidden) // 4, np.uint32)

    def allowed(self) -> npt.NDArray[np.intp]:
        """The tokens that may come next, in ascending order. Raises RequestError if there are none."""
        mask = self._mask
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed: {_words(self._matcher.get_error())}")
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8) & self._permitted, bitorder="little"))
        if not len(allowed):
            raise RequestError("the grammar allows no token of this vocabulary here")
        return allowed

    def accept(self, token: int) -> None:
        """Go on with this token. Raises RequestError if it is not allowed."""
        if not self._matcher.consume_token(token):
            raise RequestError(f"the grammar cannot be followed: {_words(self._matcher.get_error())}")

    @property
    def finished(self) -> bool:
        """Whether the reply is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())


def _words(error: str) -> str:
    return " ".join(error.replace("<non-verbose/>", "").split())
