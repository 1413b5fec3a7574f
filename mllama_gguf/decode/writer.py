"""From logits to a reply's text: choose a token, show its text, until something ends the reply.

A writer runs no model. Whoever does hands in logits, so that several replies can be written in turns.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..backend.types import Floats
from ..handles import OneProcess
from ..text.logprobs import TokenLogprob, token_logprob
from ..text.sampling import Sampler
from ..text.stream import TextStream
from ..text.vocab import Vocab
from .options import ReplyOptions

FinishReason = Literal["stop", "length"]


@dataclass
class Stats:
    """What a reply took. Complete once the reply has ended.

    finish_reason: "stop": the model ended its turn, the grammar lets nothing follow, or a stop string came;
                   "length": max_tokens, or n_ctx is full; None: the reply has not ended, or was cut off by an
                   error
    cached_tokens: how many of the prompt's tokens were in the cache already
    seconds:       encode: images to states; prompt: up to the first logits; decode: everything after, but for
                   what is written to disk
    """

    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "prompt": 0.0, "decode": 0.0})

    @property
    def tokens_per_second(self) -> dict[str, float | None]:
        """Speed of the prompt (only its computed tokens) and of the reply; None for what took no time."""
        computed = {
            "prompt": self.prompt_tokens - self.cached_tokens,
            "decode": self.completion_tokens,
        }
        return {name: n / self.seconds[name] if self.seconds[name] else None for name, n in computed.items()}


class Writer(OneProcess):
    """Writes one reply. Not thread-safe.

    logprobs: of the tokens whose text was shown, if the options want them
    """

    def __init__(
        self,
        vocab: Vocab,
        vocab_size: int,
        stop_ids: Collection[int],
        prompt: Sequence[int],
        options: ReplyOptions,
    ) -> None:
        """vocab_size: logits a token; stop_ids: the tokens that end a reply; prompt: token ids. Raises
        RequestError for a grammar that cannot be used."""
        self.stats = Stats(prompt_tokens=len(prompt))
        self.logprobs: list[TokenLogprob] = []
        self._unshown: list[tuple[int, int, TokenLogprob]] = []  # with the first and last character's place
        self._n_shown = 0  # characters
        self._vocab = vocab
        self._stop_ids = stop_ids
        self._max_tokens = options.max_tokens
        sampling = options.sampling
        self._sampler = Sampler(vocab, vocab_size, sampling, prompt)
        self._n_top = sampling.top_logprobs if sampling.logprobs else None
        grammar = self._grammar = sampling.grammar
        self._said: list[str] = []  # for the grammar's last look
        self._text = TextStream(() if grammar is not None and grammar.is_json else options.stops)

    def take(self, logits: Floats, *, is_full: bool) -> tuple[int, str]:
        """The next token, and the text that can be shown with it, perhaps none. Sets `stats.finish_reason`
        if it is the last one.

        logits:  float32 [vocab_size]
        is_full: whether the context has no room for this token
        """
        stats = self.stats
        token, piece = self._sampler.sample(logits), ""
        if token in self._stop_ids:
            stats.finish_reason = "stop"
        else:
            stats.completion_tokens += 1
            before = self._text.n_decoded
            piece = self._text.feed(self._vocab.piece(token))
            if self._n_top is not None:
                about = token_logprob(self._vocab, logits, token, self._n_top)
                self._unshown.append((before, self._text.n_decoded, about))
            if self._text.stopped or self._sampler.finished:
                stats.finish_reason = "stop"
            elif stats.completion_tokens == self._max_tokens or is_full:
                stats.finish_reason = "length"
        if stats.finish_reason is not None:
            piece += self._text.finish()
        if self._unshown and (piece or stats.finish_reason is not None):
            self._show(len(piece))
        if self._grammar is not None:
            self._said.append(piece)
            if stats.finish_reason == "stop":
                self._grammar.check("".join(self._said))
        return token, piece

    def _show(self, n_characters: int) -> None:
        """So many more characters are shown: the tokens that they are of count."""
        self._n_shown += n_characters
        ended = self.stats.finish_reason is not None and not self._text.stopped
        while self._unshown:
            begin, end, about = self._unshown[0]
            if not (ended or begin < self._n_shown or end <= self._n_shown):
                break
            self.logprobs.append(about)
            del self._unshown[0]
