"""Text on a terminal in lines that break between words, while it is written."""

from __future__ import annotations

from collections.abc import Callable

from ..words import printable


class Wrapping:
    """Takes the pieces of a text and gives what to print of it. A word is held back until its end is there.

    columns: the terminal's width now, in cells
    cells:   the width of a text on it
    """

    def __init__(self, columns: Callable[[], int], cells: Callable[[str], int]) -> None:
        self._columns, self._cells = columns, cells
        self._at, self._blanks, self._word = 0, "", ""

    def add(self, piece: str) -> str:
        """What to print after the next piece."""
        out = []
        for c in printable(piece):
            if c == "\n":
                out.append(self._take_word() + c)
                self._at, self._blanks = 0, ""
            elif c in " \t":
                out.append(self._take_word())
                self._blanks += " "
            elif self._cells(c) > 1:  # a script without blanks breaks everywhere
                out.append(self._take_word())
                self._word = c
                out.append(self._take_word())
            else:
                self._word += c
                if len(self._word) >= self._columns():
                    out.append(self._take_word())
        return "".join(out)

    def rest(self) -> str:
        """What is held back."""
        return self._take_word()

    def _take_word(self) -> str:
        if not self._word:
            return ""
        words, wide = self._word, self._cells(self._word)
        if self._at and self._at + len(self._blanks) + wide > self._columns():
            words, self._at = f"\n{words}", wide
        else:
            words, self._at = self._blanks + words, self._at + len(self._blanks) + wide
        self._blanks = self._word = ""
        return words
