"""The lines of `mllama chat`: completion of commands, options and names of files; history."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory

from ..chat.commands import ALIASES, HELP, SETTABLE, TAKES_FILE
from ..chat.lines import SUFFIXES, file_name

# The word before the cursor, perhaps in a quotation that has no end yet.
_WORD = re.compile(r"""(?:(?<=\s)|^)(?:'[^']*|"[^"]*|(?:\\.|[^\s'"\\])*)$""")
_MOST = 1000  # files of a folder that are offered


class KeptLines(FileHistory):
    """The lines of earlier chats. A line that cannot be written, as on a full disk, is only lost for the next
    chat."""

    def store_string(self, string: str) -> None:
        """As prompt_toolkit asks for it."""
        with suppress(OSError):
            super().store_string(string)


class ChatCompleter(Completer):
    """Completes what stands before the cursor."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """As prompt_toolkit asks for them."""
        text = document.text_before_cursor
        command, blank, rest = text.partition(" ")
        name = ALIASES.get(command[1:], command[1:]) if command.startswith("/") and blank else ""
        if command.startswith("/") and not blank and "/" not in command[1:]:
            found = [(name, words) for name, (_, words) in HELP.items() if name.startswith(command[1:])]
            for known, words in found:
                yield Completion(f"/{known}", -len(command), display_meta=words)
            if found:
                return
        if name == "set" and " " not in rest:
            for option in SETTABLE:
                if option.startswith(rest):
                    yield Completion(option, -len(rest))
        elif name in TAKES_FILE or name not in HELP:
            word = _WORD.search(text)
            if word is not None and (word[0] or name in TAKES_FILE):
                suffixes = SUFFIXES if name in ("", "image") or name not in HELP else (".json",)
                yield from paths(word[0], frozenset(suffixes))


def paths(word: str, suffixes: frozenset[str]) -> Iterator[Completion]:
    """The folders, and the files with these suffixes, that a word may become. Blanks get backslashes, except
    in a quotation."""
    quote = word[:1] if word[:1] in ("'", '"') else ""
    begun = word[1:] if quote else file_name(word) if word != "~" else word
    if word.endswith("/") and not begun.endswith("/"):
        begun += "/"
    folder, last = os.path.split(os.path.expanduser(begun))
    try:
        found = [entry for entry in os.scandir(folder or ".") if entry.name.startswith(last)]
    except (OSError, ValueError):
        return
    for entry in sorted(found, key=lambda entry: entry.name)[:_MOST]:
        hidden = entry.name.startswith(".") and not last.startswith(".")
        if hidden or not entry.name.isprintable():
            continue
        try:
            is_folder = entry.is_dir()
        except OSError:
            continue
        if is_folder or os.path.splitext(entry.name)[1].lower() in suffixes:
            added = entry.name[len(last) :] + ("/" if is_folder else "")
            if not quote:
                added = re.sub(r"([\s'\"\\])", r"\\\1", added)
            shown = entry.name + ("/" if is_folder else "")
            yield Completion(added, 0, display=shown)
