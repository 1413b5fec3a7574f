"""Durations and dates as Ollama's API writes them."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta, timezone
from typing import Any

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})", re.ASCII)
_FOREVER_YEARS = 100
_LONGEST = 1e9  # seconds; more is as good as for ever


def parse_duration(value: Any) -> float:
    """Seconds of a number, of "300", or of a duration as Go writes it: "5m", "1h30m". Below 0: math.inf.

    Raises ValueError.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a duration")
    if isinstance(value, (int, float)):
        seconds = float(value)
    elif isinstance(value, str):
        seconds = _seconds(value.strip())
    else:
        raise ValueError(f"{type(value).__name__} is not a duration")
    if math.isnan(seconds):
        raise ValueError("NaN is not a duration")
    return math.inf if seconds < 0 or seconds > _LONGEST else seconds


def _seconds(words: str) -> float:
    if _NUMBER.fullmatch(words):
        return float(words)
    unsigned = words.lstrip("+-") if words[:2] not in ("--", "++", "+-", "-+") else ""
    if not unsigned or not re.fullmatch(f"({_PART.pattern})+", unsigned, re.ASCII):
        raise ValueError(f"{words[:40]!r} is not a duration; write 5m, 24h, 300 or -1")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(unsigned))
    return -seconds if words.startswith("-") else seconds


def rfc3339(seconds: float) -> str:
    """A date in UTC with microseconds: "2026-11-26T11:28:09.123456Z". seconds: since 1970."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds")[:-6] + "Z"


def expiry(now: float, seconds: float) -> str:
    """When something expires, with an offset and not a Z: Python before 3.11 does not read that. Never: in a
    hundred years."""
    date = datetime.fromtimestamp(now, timezone.utc)
    later = timedelta(days=365 * _FOREVER_YEARS) if math.isinf(seconds) else timedelta(seconds=seconds)
    return (date + later).isoformat(timespec="microseconds")


def nanoseconds(seconds: float) -> int:
    """A duration in whole nanoseconds."""
    return max(0, round(seconds * 1e9))
