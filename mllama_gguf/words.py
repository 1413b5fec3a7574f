"""Names, foreign messages and sizes as words for a person, and sizes back from words."""

from __future__ import annotations

import os
import re
from typing import Any

from .errors import RequestError

_MOST_BYTES = 1 << 63


# Characters that Python does not call printable and that belong to text: a terminal only joins by them.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "\n\t") -> str:
    """A text that a terminal can show: control characters, and what else is not printable, as escapes. keep:
    control characters that stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep or c in _JOINERS else ascii(c)[1:-1] for c in text)


def as_json(value: Any) -> str:
    """JSON in one line: characters as they are, and only bytes of a name that is not UTF-8 as escapes. Such
    names come back the same through `json.loads`."""
    import json  # takes as long as all of this module

    words = json.dumps(value, ensure_ascii=False)
    try:
        words.encode()
    except UnicodeEncodeError:
        words = words.encode("utf-8", "backslashreplace").decode()
    return words


def show_name(name: str | bytes | os.PathLike[str], longest: int = 300) -> str:
    """A path or another foreign text, fit for a line: printable, and cut in the middle if it has more than
    `longest` characters (at least 3)."""
    text = printable(os.fsdecode(name), keep="")
    if len(text) <= longest:
        return text
    end = (longest - 3) // 3
    return f"{text[: longest - 3 - end]}...{text[len(text) - end :]}"


def one_line(words: object, longest: int = 300) -> str:
    """An error or another object in one line, without a dot at its end; the name of its type if it says
    nothing."""
    return show_name(" ".join(str(words).split()).rstrip("."), longest) or type(words).__name__


def brief(value: object, longest: int = 60) -> str:
    """A value that somebody gave, as Python writes it, in one short line. It may be huge or circular."""
    import reprlib

    try:
        text = repr(value[:longest]) if isinstance(value, str) else reprlib.repr(value)
    except Exception:  # of a whole number of thousands of digits, or in the code of somebody's class
        text = f"{type(value).__name__} that cannot be shown"
    return show_name(text, longest) + ("..." if isinstance(value, str) and len(value) > longest else "")


def os_reason(error: OSError) -> str:
    """Why the system refused something, without the file's name."""
    return one_line(error.strerror or error)


def signal_name(number: int) -> str:
    """A signal in words: "SIGKILL", or "signal 37" for one that has no name."""
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def parse_size(words: str, what: str) -> int:
    """Bytes of "500 MB" (powers of 1000), "8GiB" or "8G" (powers of 1024), or a number.

    what: the option or variable, for the error

    Raises RequestError.
    """
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kmgt]?)(i?b)?\s*", words.lower(), re.ASCII)
    if match:
        from fractions import Fraction  # takes as long as all of this module

        number, unit, suffix = match.groups()
        base = 1000 if suffix == "b" else 1024
        n_bytes = int(Fraction(number) * base ** " kmgt".index(unit or " "))
        if n_bytes < _MOST_BYTES:
            return n_bytes
    raise RequestError(f"{what}: {show_name(words)!r} is not a size; write bytes, or as in 500MB or 8GiB")


def show_size(n_bytes: float) -> str:
    """Bytes in words, with powers of 1000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"
