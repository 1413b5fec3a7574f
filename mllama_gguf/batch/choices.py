"""The words by which a user chooses what happens to captions that exist. Importing them is cheap."""

from __future__ import annotations

from typing import Literal, get_args

Existing = Literal["skip", "overwrite", "append", "prepend"]
EXISTING: tuple[Existing, ...] = get_args(Existing)
# Which of them are written again although they exist.
Redo = Literal["length", "empty", "failed"]
REDO: tuple[Redo, ...] = get_args(Redo)
