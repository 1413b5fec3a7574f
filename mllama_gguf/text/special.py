"""Keeps what callers write from becoming special tokens.

A prompt is text in which the special tokens of the chat template count, such as `<|eot_id|>`. Where a caller
writes the same characters, a mark is put inside. Once the template is rendered, the prompt is cut at the
marks, and the pieces are tokenized one by one: no piece holds a special token of the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import RequestError

# Noncharacters of Unicode, meant for such internal use. Callers' own ones are dropped.
SPLIT = "\ufdd0"
END = "\ufdd1"  # where a message that is continued ends

MAX_DEPTH = 100

_USUAL = re.compile(r"<(?=\|[^|>\s]{1,64}\|>)")
# The beginning of a special token at the end of a text: what follows may complete it.
_BEGUN = re.compile(r"<(?:\|[^|>\s]{0,64}\|?)?\Z")


class Guard:
    """Puts the marks into texts."""

    def __init__(self, special: Iterable[str] = ()) -> None:
        """special: how the special tokens of the vocabulary are spelled; `<|...|>` are known anyway."""
        others = sorted({s for s in special if len(s) > 1 and not _USUAL.match(s)}, key=len, reverse=True)
        self._others = re.compile("|".join(re.escape(s) for s in others)) if others else None
        self._begun = {s[:n] for s in others for n in range(1, len(s))}
        self._longest = max((len(s) for s in others), default=0)

    def text(self, text: str) -> str:
        """A text that is not a special token, and does not become one by what stands before or after it."""
        text = text.replace(SPLIT, "").replace(END, "")
        text = _USUAL.sub(f"<{SPLIT}", text)
        if self._others is not None:
            text = self._others.sub(lambda found: f"{found[0][0]}{SPLIT}{found[0][1:]}", text)
        if _BEGUN.search(text) or any(text[-n:] in self._begun for n in range(1, self._longest)):
            text += SPLIT
        return text

    def value(self, value: Any, where: str, depth: int = 0) -> Any:
        """A value of JSON's kinds with all its texts guarded, names of properties too.

        where: its name, for errors

        Raises RequestError for other values, and for what is nested too much.
        """
        if depth > MAX_DEPTH:
            raise RequestError(f"{where} is nested too much")
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            if not all(isinstance(name, str) for name in value):
                raise RequestError(f"{where} has names that are not texts")
            return {self.text(name): self.value(item, where, depth + 1) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item, where, depth + 1) for item in value]
        raise RequestError(f"{where} has a {type(value).__name__}, which JSON does not have")
