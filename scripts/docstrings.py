"""For mkdocstrings: our docstrings as Markdown.

A docstring of ours names a parameter at the start of a line, and what it is after a colon; the lines that go
on with it are indented. This becomes a list. Other indented lines are code, as Markdown has it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"( *)([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*):(?: +(.*))?")


def as_markdown(text: str) -> str:
    """The same words, with entries as lists."""
    lines: list[str] = []
    depth: list[int] = []  # indents of the entries that are open
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        entry = _ENTRY.fullmatch(line)
        code = not depth and indent >= 4
        if entry and not code and (indent == 0 or depth):
            depth = [d for d in depth if d < indent] + [indent]
            if len(depth) == 1 and lines and lines[-1] and not lines[-1].lstrip().startswith("- "):
                lines.append("")
            lines.append(f"{'    ' * (len(depth) - 1)}- **`{entry[2]}`**: {entry[3] or ''}".rstrip())
        elif not line.strip() or (indent == 0 and depth):
            depth = depth if not line.strip() else []
            if line.strip() and lines and lines[-1]:
                lines.append("")
            lines.append(line.strip() if not code else line)
        elif depth:
            lines.append("    " * len(depth) + line.strip())
        else:
            lines.append(line)
    return "\n".join(lines)


class OurDocstrings(griffe.Extension):
    """Rewrites every docstring that griffe finds."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called once for each class, function, module and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
