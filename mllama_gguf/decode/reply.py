"""The loop that writes a reply: sample a token, show its text, decode it, until something ends the reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from ..handles import OneProcess
from ..text.sampling import Sampler, SamplingOptions
from ..text.stream import TextStream
from ..text.vocab import Vocab
from ..vision.embedding import Encoding
from .session import Session

FinishReason = Literal["stop", "length"]


@dataclass
class Stats:
    """What a reply took. Complete once the reply has ended.

    finish_reason: "stop": the model ended its turn, the grammar lets nothing follow, or a stop string came;
                   "length": max_tokens, or n_ctx is full
    cached_tokens: how many of the prompt's tokens were in the cache already
    seconds:       encode: pictures to states; prompt: up to the first logits; decode: everything after,
                   but for what is written to disk
    """

    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "prompt": 0.0, "decode": 0.0})

    @property
    def tokens_per_second(self) -> dict[str, float | None]:
        """Of the prompt (tokens that were computed) and of the reply; None for what took no time."""
        computed = {
            "prompt": self.prompt_tokens - self.cached_tokens,
            "decode": self.completion_tokens,
        }
        return {name: n / self.seconds[name] if self.seconds[name] else None for name, n in computed.items()}


@dataclass(frozen=True)
class ReplyOptions:
    """max_tokens: most tokens of the reply, None: until n_ctx is full; stops: strings that end it, not
    shown."""

    sampling: SamplingOptions
    max_tokens: int | None
    stops: tuple[str, ...]


class Reply(OneProcess):
    """One reply: an iterator of pieces of text, of which `stats` tells the rest.

    exclusive: gives the sole use of the session for one step; its argument says whether the step begins a new
               conversation state or continues this one
    """

    def __init__(
        self,
        session: Session,
        vocab: Vocab,
        vocab_size: int,
        tokens: Sequence[int],
        encode: Callable[[], Sequence[Encoding]],
        options: ReplyOptions,
        exclusive: Callable[[bool], AbstractContextManager[None]],
        stop_ids: Collection[int],
    ) -> None:
        self.stats = Stats(prompt_tokens=len(tokens))
        self._session = session
        self._vocab = vocab
        self._tokens = tokens
        self._encode = encode
        self._options = options
        self._exclusive = exclusive
        self._stop_ids = stop_ids
        self._sampler = Sampler(vocab, vocab_size, options.sampling, tokens)

    def __iter__(self) -> Iterator[str]:
        stats, session = self.stats, self._session
        grammar = self._options.sampling.grammar
        text = TextStream(() if grammar is not None and grammar.is_json else self._options.stops)

        clock = time.perf_counter
        with self._exclusive(True):
            start = clock()
            images = self._encode()
            encoded = clock()
            stats.seconds["encode"] = encoded - start
            logits, stats.cached_tokens = session.feed(self._tokens, images)
            stats.seconds["prompt"] = clock() - encoded
        row = logits[-1]
        token, shown = -1, False

        while stats.finish_reason is None:
            with self._exclusive(False):
                if shown:
                    session.save()
                start = clock()
                if token >= 0:  # not before its piece is out
                    row = session.step(token)
                piece = ""
                token = self._sampler.sample(row)
                if token in self._stop_ids:
                    stats.finish_reason = "stop"
                else:
                    stats.completion_tokens += 1
                    piece = text.feed(self._vocab.piece(token))
                    if text.stopped or self._sampler.finished:
                        stats.finish_reason = "stop"
                    elif (
                        stats.completion_tokens == self._options.max_tokens or session.n_past >= session.n_ctx
                    ):
                        stats.finish_reason = "length"
                if stats.finish_reason is not None:
                    piece += text.finish()
                stats.seconds["decode"] += clock() - start
            if piece:
                yield piece
                shown = True
