"""What went wrong, in words that may leave this machine, and with which status.

Every error of a reply is made here. Words come from MllamaError alone, for what libraries raise may hold
addresses of memory; the folders of files are left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import (
    Aborted,
    ContextFullError,
    DownloadError,
    ImageError,
    MllamaError,
    RequestError,
)
from ..words import one_line

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}")
_FOLDERS = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?/(?:[^/\s'\"<>|]+/)+(?=[^/\s'\"<>|])")
LONGEST = 500  # characters of an error


@dataclass
class Refused(Exception):
    """A request that gets an error for an answer.

    status: HTTP's
    code:   OpenAI's word for what is wrong
    param:  the field that is wrong
    again:  whether the same request may succeed later
    seconds: after how long
    """

    status: int
    words: str
    code: str | None = None
    param: str | None = None
    again: bool = False
    seconds: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.words


def clean(words: object) -> str:
    """Words of an error without addresses of memory and without folders, in one line."""
    text = _ADDRESS.sub("", one_line(words, LONGEST))
    return _FOLDERS.sub("", text)


def refusal(error: BaseException) -> Refused:
    """The answer to any error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Aborted):
        return Refused(499, "request canceled")
    if isinstance(error, ContextFullError):
        return Refused(400, clean(error), "context_length_exceeded", "messages")
    if isinstance(error, ImageError):
        return Refused(400, clean(error), "invalid_image")
    if isinstance(error, RequestError):
        return Refused(400, clean(error))
    if isinstance(error, DownloadError):
        return Refused(502, clean(error))
    if isinstance(error, MllamaError):
        return Refused(500, clean(error))
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return Refused(500, f"internal error ({type(error).__name__}); the log of the server says more")


def ruins_model(error: BaseException) -> bool:
    """Whether a model is to be loaded again after this error: it is not the request's fault."""
    return not isinstance(error, (Refused, Aborted, ContextFullError, ImageError, RequestError))
