"""What the documentation shows: its blocks of code, its command lines and what they print.

A block says what it is:

    ```bash       command lines, which work
    ```console    `$ ` and a command line (`> ` and more of it), then what it prints; `...` is any text
    ```python     a program that works; what stands in a comment after a print begins with what it prints
    ```json       JSON
    ```text       none of these
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

KINDS = ("bash", "console", "python", "json", "text")


@dataclass(frozen=True)
class Block:
    """line: of the file, counted from 1, where the fence is"""

    line: int
    kind: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command line. shown: what it prints, as the documentation has it; None: nothing is shown"""

    line: int
    text: str
    shown: str | None = None

    @property
    def words(self) -> str:
        """Without the comment at its end and with single blanks."""
        without = re.sub(r"\s+#\s.*", "", self.text.replace("\\\n", " "), flags=re.S)
        return " ".join(without.split())


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    lines: list[str] = []
    kind, begin, indent = None, 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.fullmatch(r"( *)```+ *(.*?) *", line)
        if fence and kind is None:
            indent, kind, begin, lines = fence[1], fence[2], number, []
        elif fence and kind is not None:
            found.append(Block(begin, kind, "\n".join(lines)))
            kind = None
        elif kind is not None:
            lines.append(line.removeprefix(indent))
    assert kind is None, f"line {begin}: the block has no end"
    return found


def outside(text: str) -> str:
    """A page with empty lines in place of its blocks."""
    return re.sub(r"^ *```.*?^ *```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.M | re.S)


def commands(block: Block) -> list[Command]:
    """The command lines of a block; `A && B` are two."""
    if block.kind == "console":
        return _shown(block)
    found = []
    if block.kind == "bash":
        held, begin = "", 0
        for number, line in enumerate(block.text.splitlines(), block.line + 1):
            begin, held = (begin, f"{held}\n{line}") if held else (number, line)
            if _is_whole(held):
                found += [Command(begin, part) for part in _parts(held)]
                held = ""
        assert not held, f"line {begin}: {held!r} has no end"
    return found


def _shown(block: Block) -> list[Command]:
    found: list[tuple[int, list[str], list[str]]] = []
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if line.startswith("$ "):
            found.append((number, [line[2:]], []))
        elif line.startswith("> ") and found and not found[-1][2]:
            found[-1][1].append(line[2:])
        else:
            assert found, f"line {number}: output before the first command"
            found[-1][2].append(line)
    return [Command(number, "\n".join(words), "\n".join(out)) for number, words, out in found]


def _is_whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:  # an open quotation
        return False
    return not text.endswith("\\")


def _parts(text: str) -> list[str]:
    """The parts between `&&` that stand outside of quotes and comments; none of a comment alone."""
    parts, begin = [], 0
    for found in re.finditer(r"\s&&\s", text):
        if _is_whole(text[begin : found.start()]) and not re.search(r"(^|\s)#\s", text[: found.start()]):
            parts.append(text[begin : found.start()])
            begin = found.end()
    parts.append(text[begin:])
    return [part.strip() for part in parts if part.strip() and not part.strip().startswith("#")]


def inline(text: str) -> list[Command]:
    """What stands between single backticks outside of blocks, on one line or two."""
    page = outside(text)
    found = []
    for one in re.finditer(r"(?<!`)`([^`]+)`(?!`)", page):
        words = " ".join(one[1].replace("\\|", "|").split())
        found += [Command(page[: one.start()].count("\n") + 1, part) for part in _parts(words)]
    return found


def agrees(printed: str, shown: str) -> bool:
    """Whether a text is what the documentation shows; blanks at the ends of lines do not count."""

    def plain(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())

    pattern = ".*?".join(map(re.escape, plain(shown).split("...")))
    return re.fullmatch(pattern, plain(printed), re.S) is not None


def promised(program: str) -> list[str]:
    """The comments after the prints of a Python program."""
    return re.findall(r"^\s*print\(.*\)  # (.*)$", program, re.M)


def pages(root: Path) -> list[Path]:
    """The pages whose blocks are tried."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
