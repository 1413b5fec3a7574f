"""What a run of a batch did, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Span: TypeAlias = "tuple[float, float]"  # from and to, as time.perf_counter counts

MOST_SPANS = 32  # more than overlap with what comes later


@dataclass
class Summary:
    """What a run did.

    images:    all that the run was about: done before it, captioned, duplicates (of an image's content; they
               got its caption), failed, and those it did not come to
    again:     how many had a caption that was to be made once more
    tokens:    of the new captions
    prompt_tokens, cached_tokens: of the prompts, and how many of them were not computed again
    seconds:   encode, prompt, decode: time of each computation, which may overlap; busy: time in
               which any of them ran; wait: for an image, while none ran; total: from first image to end
    stopped:   why the run ended early, or ""
    """

    images: int = 0
    done_before: int = 0
    captioned: int = 0
    duplicates: int = 0
    failed: int = 0
    again: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("encode", "prompt", "decode", "busy", "wait", "total"), 0.0)
    )
    stopped: str = ""
    interrupted: bool = False

    @property
    def utilisation(self) -> float:
        """Share of the time in which the model computed, 0 to 1."""
        return self.seconds["busy"] / self.seconds["total"] if self.seconds["total"] else 0.0


class Busy:
    """Counts the seconds of a summary. What is computed at the same time is one busy time."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._spans: list[Span] = []  # of all that was computed lately: in order, and apart

    def encoded(self, span: Span) -> None:
        """An image was encoded ahead; or none, in an empty span."""
        self._seconds["encode"] += span[1] - span[0]
        self._add(span)

    def waited(self, span: Span, encoded: Span) -> None:
        """Nothing was computed but what was encoded ahead."""
        self._seconds["wait"] += span[1] - span[0] - _overlap(encoded, span)

    def captioned(self, span: Span, seconds: Mapping[str, float]) -> None:
        """A caption was computed. seconds: of its phases"""
        for phase, n in seconds.items():
            self._seconds[phase] += n
        self._add(span)

    def _add(self, span: Span) -> None:
        if span[0] >= span[1]:
            return
        self._seconds["busy"] += span[1] - span[0] - sum(_overlap(span, other) for other in self._spans)
        touched = [one for one in self._spans if one[0] <= span[1] and span[0] <= one[1]]
        whole = min(one[0] for one in (span, *touched)), max(one[1] for one in (span, *touched))
        self._spans = sorted([whole, *(one for one in self._spans if one not in touched)])[-MOST_SPANS:]


def _overlap(a: Span, b: Span) -> float:
    """How much two spans of time have in common."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
