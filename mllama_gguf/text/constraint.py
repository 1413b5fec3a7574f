"""Which tokens may come next in a reply that follows a grammar, by llguidance."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast
from weakref import ref

import numpy as np
import numpy.typing as npt

from ..backend import library as _native
from ..errors import OutOfMemoryError, RequestError
from ..words import one_line
from .aside import aside
from .grammar import Grammar


class Vocabulary(Protocol):
    """The parts of a vocabulary that are needed; `vocab.Vocab` is one."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def stop_ids(self) -> frozenset[int]: ...

    def pieces(self) -> list[bytes]: ...

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> list[int]: ...


T = TypeVar("T")

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data

# llguidance's own limits. What is allowed in schemas and grammars (text/schema.py, text/gbnf.py) is such that
# these are reached by few, and that a grammar is built in well under a second.
LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
MAX_BUILD_SECONDS = 3.0
KEPT = 8  # grammars, with what was found out about them
USES = 64  # replies of a kept grammar: what is found out about it takes memory
# llguidance goes through schemas by recursion, 8 KB for each of up to 5000 schemas that lead to each other.
_STACK_BYTES = 64 << 20
_TRIAL_TOKENS = 24
_TRIAL_SECONDS = 0.1


class _Tokens:
    """A vocabulary as llguidance reads it. llguidance keeps it, unseen by Python's garbage collector: it must
    not hold what holds llguidance's tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = ref(vocab)
        self.eos_token_id = min(vocab.stop_ids)
        self.tokens = vocab.pieces()
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
    """What llguidance knows about a vocabulary and some grammars, for all replies. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._permitted = np.zeros(0, np.uint32)
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()  # and how often it was used

    def begin(self, vocab: Vocabulary, grammar: Grammar) -> Matcher:
        """A reply that follows the grammar.

        Raises RequestError for a grammar that cannot be obeyed. Ctrl-C works meanwhile.
        """
        with self._lock:
            self._build_tokenizer(vocab)
            matcher, uses = self._kept.pop(grammar.source, (None, 0))
        if matcher is None or uses >= USES:
            matcher, uses = self._build(grammar), 0
        with self._lock:
            self._kept[grammar.source] = (matcher, uses + 1)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return Matcher(matcher.deep_copy(), self._permitted, lambda: self._build(grammar, try_out=False))

    def _build_tokenizer(self, vocab: Vocabulary) -> None:
        if self._tokenizer is not None:
            return
        from llguidance import LLTokenizer

        tokens = _Tokens(vocab)
        self._tokenizer = LLTokenizer(cast(Any, tokens), eos_token=sorted(vocab.stop_ids))
        permitted = np.ones(-(-len(tokens.tokens) // 32) * 32, bool)
        # A Lark grammar can ask for special tokens by their names.
        permitted[tokens.special_token_ids] = False
        permitted[list(vocab.stop_ids)] = True
        self._permitted = np.packbits(permitted, bitorder="little").view(np.uint32)
        del tokens.tokens  # llguidance has a copy, and holds `tokens`

    def _build(self, grammar: Grammar, try_out: bool = True) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        def build() -> Any:
            limits = LLParserLimits(**cast(Any, LIMITS))
            matcher = LLMatcher(self._tokenizer, grammar.source, log_level=0, limits=limits)
            if matcher.is_error():
                raise RequestError(_words(matcher.get_error()))
            if try_out:
                _try_out(Matcher(matcher.deep_copy(), self._permitted))
            return matcher

        try:
            return _in_thread(build)
        except RequestError as e:
            what = "JSON schema" if grammar.is_json else "grammar"
            raise RequestError(f"the {what} cannot be obeyed: {e}") from e


class Mask:
    """Some tokens of a vocabulary."""

    def __init__(self, n_words: int) -> None:
        """bits: uint32 words, the lowest bit first; bit i of them: if token i is among the tokens"""
        self.bits = np.zeros(n_words, np.uint32)
        self._native = _native.load()
        self._words = self._native.ffi.from_buffer("uint32_t[]", self.bits)

    def __contains__(self, token: int) -> bool:
        return token >> 5 < len(self.bits) and bool(self.bits[token >> 5] >> (token & 31) & 1)

    def ids(self) -> npt.NDArray[np.intp]:
        """The tokens, in ascending order."""
        words = np.flatnonzero(self.bits)
        if len(words) * 4 > len(self.bits):
            return np.flatnonzero(_flags(self.bits))
        bits = np.flatnonzero(_flags(self.bits[words]))
        ids: npt.NDArray[np.intp] = (words[bits >> 5] << 5) + (bits & 31)
        return ids

    def likeliest(self, logits: npt.NDArray[np.float32]) -> int:
        """The token with the greatest logit, the first of equal ones; much cheaper than by `ids`.

        logits: float32 [n_vocab], finite; tokens without one are passed over

        Raises RequestError if no token has a logit.
        """
        lib, values = self._native.lib, self._values(logits)
        token = int(lib.mllama_likeliest(values, len(values), self._words, len(self.bits)))
        if token < 0:
            raise RequestError(_NOTHING)
        return token

    def candidates(self, logits: npt.NDArray[np.float32], candidates: npt.NDArray[Any]) -> int:
        """Write the tokens and their logits, in ascending order of tokens, and return how many they are.

        logits:     as for `likeliest`
        candidates: `CANDIDATE` [n_vocab]

        Raises RequestError if no token has a logit.
        """
        if candidates.dtype != CANDIDATE or len(candidates) < len(logits):
            raise ValueError("candidates have another type than CANDIDATE, or are fewer than the logits")
        lib, ffi, values = self._native.lib, self._native.ffi, self._values(logits)
        room = ffi.from_buffer("mllama_candidate[]", candidates, require_writable=True)
        n = int(lib.mllama_candidates(values, len(values), self._words, len(self.bits), room))
        if not n:
            raise RequestError(_NOTHING)
        return n

    def _values(self, logits: npt.NDArray[np.float32]) -> Any:
        """For C."""
        return self._native.ffi.from_buffer("float[]", np.ascontiguousarray(logits, np.float32))


def _flags(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    return np.unpackbits(bits.view(np.uint8), bitorder="little").view(np.bool_)


_NOTHING = "the grammar allows no token of this vocabulary here"


class Matcher:
    """The state of one reply. Not thread-safe."""

    def __init__(
        self, matcher: Any, permitted: npt.NDArray[np.uint32], build: Callable[[], Any] | None = None
    ) -> None:
        """permitted: a bit for each token that may be in a reply at all; build: makes another matcher, in
        the state of the beginning"""
        self._matcher = matcher
        self._permitted = permitted
        self._build = build
        self._mask = Mask(len(permitted))
        self._tokens: list[int] = []

    def mask(self) -> Mask:
        """The tokens that may come next; always the same object. Raises RequestError if there are
        none."""
        bits = self._mask.bits
        self._call(lambda matcher: matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes))
        bits &= self._permitted
        if not bits.any():
            raise RequestError(_NOTHING)
        return self._mask

    def accept(self, token: int) -> None:
        """Continue with this token. Raises RequestError if it is not allowed."""
        self._call(lambda matcher: matcher.consume_token(token))
        self._tokens.append(token)

    @property
    def finished(self) -> bool:
        """Whether the reply is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _call(self, do: Callable[[Any], object]) -> None:
        do(self._matcher)
        if self._failed() and self._build is not None:
            # The states of a kept grammar add up over its replies. Without them there is room again.
            self._matcher, self._build = self._build(), None
            self._matcher.try_consume_tokens(self._tokens)
            do(self._matcher)
        if self._failed():
            words = _words(self._matcher.get_error()) or self._matcher.stop_reason()
            raise RequestError(f"the grammar cannot be followed here: {words}")

    def _failed(self) -> bool:
        return bool(self._matcher.is_error()) or self._matcher.stop_reason() in _FAILURES


_FAILURES = ("InternalError", "LexerTooComplex", "ParserTooComplex", "MaxTokensTotal", "MaxTokensParser")


def _try_out(matcher: Matcher) -> None:
    """Write the beginning of a reply at random: a grammar that allows no text, or is too complex, is found
    before anything is computed."""
    rng = random.Random(0)
    end = time.perf_counter() + _TRIAL_SECONDS
    for _ in range(_TRIAL_TOKENS):
        allowed = matcher.mask().ids()
        matcher.accept(int(allowed[rng.randrange(len(allowed))]))
        if matcher.finished or time.perf_counter() > end:
            return


def _in_thread(build: Callable[[], T]) -> T:
    """Call it in a thread with a large stack, so that Ctrl-C works in this one.

    Raises RequestError, also if that takes very long; the thread then continues to its end.
    """
    try:
        return aside(
            build,
            name="mllama-grammar",
            seconds=MAX_BUILD_SECONDS,
            stack_bytes=_STACK_BYTES,
            daemon=True,
        )
    except (RequestError, OutOfMemoryError, KeyboardInterrupt):
        raise
    except TimeoutError as e:
        raise RequestError(f"it takes more than {MAX_BUILD_SECONDS:g} s to read") from e
    except BaseException as e:  # such as a panic of Rust
        raise RequestError(_words(str(e))) from e


_IN_OTHER_WORDS = {
    "oneOf constraints": "'oneOf', of which two choices may be true at the same time",
    "are not disjoint": "'patternProperties', of which two may match the same name",
    "regexes are disjoint": "'patternProperties', of which two may match the same name",
    "Regex is empty": "no text has its pattern, its format and its length",
    "circular references": "'$ref' that leads back to itself and stands beside other keywords",
}


def _words(error: str) -> str:
    for part, words in _IN_OTHER_WORDS.items():
        if part in error:
            return words
    return one_line(error.partition("<backtrace>")[0].replace("<non-verbose/>", ""))
