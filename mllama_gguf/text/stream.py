"""Bytes of tokens to text that can be shown already: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence

from ..errors import RequestError
from ..words import brief

MAX_STOPS_TEXT = 10_000  # characters of all stop strings together: each token is compared with all of them


def stop_list(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings of an option. Raises RequestError for empty ones, other types, and too much text."""
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (None,)
    if isinstance(stop, (bytes, Mapping)) or any(not isinstance(s, str) or not s for s in stops):
        raise RequestError(
            f"stop must be a string or a list of strings, none of them empty; not {brief(stop)}"
        )
    n_characters = sum(map(len, stops))
    if n_characters > MAX_STOPS_TEXT:
        raise RequestError(
            f"stop has {n_characters} characters in all its strings; {MAX_STOPS_TEXT} are allowed"
        )
    return tuple(str(s) for s in stops)


class TextStream:
    """Turns the bytes of one reply into text, piece by piece.

    A character that is split over tokens appears once its last byte is there; of text that may be the
    beginning of a stop string nothing appears until it is known not to be one.

    n_decoded: characters that were fed, shown or not
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        self._held = ""
        self.n_decoded = 0
        self.stopped = False  # a stop string was met; what follows is dropped

    def feed(self, data: bytes) -> str:
        """The text that can be shown now, perhaps none."""
        if self.stopped:
            return ""
        text = self._decoder.decode(data)
        self.n_decoded += len(text)
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """What was held back, now that nothing follows. Bytes of an unfinished character are dropped."""
        text, self._held = self._held, ""
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-n:]
            if any(len(stop) > n and stop.startswith(end) for stop in self._stops):
                return n
        return 0
