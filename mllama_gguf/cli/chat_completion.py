"""Completion in `mllama chat`: commands, options, names of files."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from ..chat.commands import ALIASES, HELP, SETTABLE, TAKES_FILE


class ChatCompleter(Completer):
    """Completes what stands before the cursor."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """As prompt_toolkit asks for them."""
        text = document.text_before_cursor
        command, blank, rest = text.partition(" ")
        if command.startswith("/") and not blank and "/" not in command[1:]:
            for name, (_, words) in HELP.items():
                if name.startswith(command[1:]):
                    yield Completion(f"/{name}", -len(command), display_meta=words)
        if command == "/set" and blank and " " not in rest:
            for name in SETTABLE:
                if name.startswith(rest):
                    yield Completion(name, -len(rest))
        elif ALIASES.get(command[1:], command[1:]) in TAKES_FILE and command.startswith("/") and blank:
            yield from self._paths.get_completions(Document(rest), complete_event)
        else:
            word = text.split(" ")[-1]
            if word.startswith(("/", "./", "../", "~/")):
                yield from self._paths.get_completions(Document(word), complete_event)
