"""What commands print: exactly as it is into pipes and files, printable on a terminal.

Names of files and captions may hold escape sequences, which a terminal would obey, and characters that its
encoding does not have.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from ..words import as_json, printable

# Why nothing more can be written to a standard stream.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_ERRORS = "mllama_gguf.show"  # the name of `_show`, as an error handler of codecs


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text on stdout. err: on stderr; nl: with a line end."""
    stream = sys.stderr if err else sys.stdout
    words = str(text)
    if is_terminal(stream):
        words = printable(words)
    _write(stream, f"{words}\n" if nl else words)


def echo_json(value: Any, *, err: bool = False) -> None:
    """Print a value as JSON in one line. Characters are themselves where the stream can show them."""
    import json

    stream = sys.stderr if err else sys.stdout
    words = as_json(value)
    if is_terminal(stream):
        words = "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in words)
    try:
        words.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        words = json.dumps(value)
    _write(stream, f"{words}\n")


def echo_coloured(words: str, colour: str, *, nl: bool = True) -> None:
    """Print words of ours on stdout, in a colour if that is a terminal and NO_COLOR is not set."""
    if is_live(sys.stdout) and not os.environ.get("NO_COLOR"):
        from click import style

        words = style(words, fg=colour)
    _write(sys.stdout, f"{words}\n" if nl else words)


def name_on(stream: TextIO, name: str) -> str:
    """A file's name for a line: as it is, or on a terminal in one line, for a name may hold line ends."""
    return printable(name, keep="") if is_terminal(stream) else name


def is_terminal(stream: TextIO) -> bool:
    """Whether a person sees it. False for a closed stream."""
    with suppress(ValueError, AttributeError):
        return stream.isatty()
    return False


def is_live(stream: TextIO) -> bool:
    """Whether it is a terminal that can draw something over again."""
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("dumb", "unknown")


def fit_streams() -> None:
    """Let stdout and stderr take every text, whatever their encoding: see `_show`."""
    codecs.register_error(_ERRORS, _show)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with suppress(ValueError, OSError):
                reconfigure(errors=_ERRORS)


def _show(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for a character that an encoding does not have: the byte that it was in a file's name, or
    its number, as in \\u732b."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = bytearray()
    for char in error.object[error.start : error.end]:
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:  # of os.fsdecode
            shown.append(code - 0xDC00)
        else:
            shown += char.encode("ascii", "backslashreplace")
    return bytes(shown), error.end


def _write(stream: TextIO, words: str) -> None:
    """Raises OSError, but not for messages on a full disk: they are lost, and the work continues."""
    try:
        stream.write(words)
        stream.flush()
    except OSError as e:
        if stream is not sys.stderr or e.errno not in NO_ROOM:
            raise
        discard(stream)


def discard(stream: TextIO) -> None:
    """Drop what is still to be written to a stream. Python would complain at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def table_width(wanted: int) -> int:
    """Characters for a table that needs up to `wanted`: the terminal's, whose lines break if it is narrow. A
    pipe has no width; what is cut off there helps nobody."""
    if not is_terminal(sys.stdout):
        return wanted
    import shutil

    return max(shutil.get_terminal_size().columns, min(wanted, 110))
