"""A reply that is being written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from ..text.logprobs import TokenLogprob
from ..vision.notebook import card
from .pieces import Pieces
from .writer import FinishReason, Stats


class Reply(Pieces[str]):
    """One reply: an iterator of pieces of text, which are computed as they are asked for. One thread reads it
    at a time; a second one gets BusyError.

        reply = model.reply(image="apple.png")
        for piece in reply:
            print(piece, end="", flush=True)
        print(reply.stats.completion_tokens, reply.finish_reason)

    stats:    what it took; complete once the reply has ended
    logprobs: of the tokens whose text was given out, if the option `logprobs` is on; it grows with every
              piece. See `text.logprobs`
    """

    def __init__(
        self,
        pieces: Iterator[str],
        stats: Stats,
        cancelled: threading.Event,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> None:
        """For whoever writes it. pieces: a generator that looks at `cancelled`."""
        super().__init__(pieces)
        self.stats = stats
        self.logprobs = logprobs
        self._cancelled = cancelled
        self._said: list[str] = []

    def __next__(self) -> str:
        piece = super().__next__()
        self._said.append(piece)
        return piece

    def read(self) -> str:
        """The text from here to the end."""
        return "".join(self)

    @property
    def finish_reason(self) -> FinishReason | None:
        """As in `Stats`."""
        return self.stats.finish_reason

    def _repr_html_(self) -> str:
        """For notebooks: what was read of the text so far. Nothing is computed for it."""
        stats = self.stats
        facts: dict[str, object] = {"ended by": self.finish_reason or "nothing yet"}
        if stats.prompt_tokens:
            facts["tokens"] = f"{stats.prompt_tokens} of the prompt, {stats.completion_tokens} written"
        facts["seconds"] = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stats.seconds.items())
        return card("Reply", facts, text="".join(self._said))

    def cancel(self) -> None:
        """From any thread: stop what is computed for the reply within a fraction of a second. Its reader gets
        Aborted."""
        self._cancelled.set()
