"""The commands of a chat, which begin with a slash. Each gives lines to print; some write a reply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import RequestError
from ..reading import parse_json, read_text
from ..words import brief, os_reason, show_name
from .talk import Attached, Talk

# usage, what it does
HELP = {
    "image": ("/image FILE...", "Add images to the next question. A file dropped into the line works too."),
    "paste": ("/paste", "Add the image in the clipboard."),
    "system": ("/system [TEXT]", "Set the system message; without TEXT remove it."),
    "set": ("/set NAME [VALUE]", "Set an option, such as temperature 0.7; without VALUE reset it."),
    "json": ("/json [FILE]", "Write replies as JSON of the schema in FILE; without FILE write text."),
    "redo": ("/redo", "Write another reply to the last question."),
    "undo": ("/undo", "Forget the last question and its reply."),
    "clear": ("/clear", "Forget all questions and images."),
    "save": ("/save FILE", "Save the conversation with its images."),
    "load": ("/load FILE", "Continue a saved conversation."),
    "info": ("/info", "Show the model, the options, and what the last reply took."),
    "help": ("/help", "Show this list. (/?)"),
    "bye": ("/bye", "Leave. (/exit, /quit, Ctrl-D)"),
}
ALIASES = {"?": "help", "exit": "bye", "quit": "bye", "images": "image", "show": "info"}
NAMES = frozenset(HELP) | frozenset(ALIASES)
# Those that take a file's name.
TAKES_FILE = frozenset(("image", "json", "save", "load"))
SETTABLE = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "max_tokens", "stop"
)  # fmt: skip
KEYS = """A question of several lines begins and ends with three double quotes.
Ctrl-C stops a reply. Ctrl-D leaves."""


class Leave(Exception):
    """The chat ends."""


class Commands:
    """Runs the commands on a conversation.

    show:  prints a line
    write: prints the pieces of a reply
    added: shows an image that was added
    """

    def __init__(
        self,
        talk: Talk,
        show: Callable[[str], None],
        write: Callable[[Iterator[str]], None],
        added: Callable[[Attached], None],
    ) -> None:
        self._talk, self._show, self._write, self._added = talk, show, write, added

    def run(self, name: str, rest: str) -> None:
        """Run one. Raises Leave, MllamaError."""
        name = ALIASES.get(name, name)
        if "/" in name:
            raise RequestError(f"/{show_name(name)}: there is no such image")
        if name not in HELP:
            raise RequestError(f"there is no command /{show_name(name, 40)}; /help lists them")
        getattr(self, f"_{name}")(rest)

    def add(self, name: str, data: bytes | None = None) -> None:
        """Take an image for the next question, and show it. Raises ImageError."""
        self._added(self._talk.attach(name, data))

    def _image(self, rest: str) -> None:
        from .lines import file_names

        if not rest:
            raise RequestError("name a file: /image photo.jpg")
        for name in file_names(rest):
            if re.match("https?://", name, re.IGNORECASE):
                raise RequestError(not_fetched(name))
            self.add(name)

    def _paste(self, rest: str) -> None:
        from .clipboard import image_in_clipboard

        self.add("clipboard", image_in_clipboard())

    def _system(self, rest: str) -> None:
        self._talk.system = rest
        self._show("The system message is set." if rest else "There is no system message.")

    def _set(self, rest: str) -> None:
        name, _, words = rest.partition(" ")
        name, words = name.lower(), words.strip()
        if name == "parameter" and words:  # as in Ollama's chat
            self._set(words)
            return
        if name == "system":
            self._system(_unquoted(words))
            return
        if not name:
            raise RequestError(f"name an option: {', '.join(SETTABLE)}; as in /set temperature 0.7")
        if name not in SETTABLE:
            raise RequestError(f"there is no option {brief(name)}; there are: {', '.join(SETTABLE)}")
        value = parse_value(name, words)
        self._talk.set(name, value)
        self._show(f"{name} is {'as at first' if value is None else brief(value)}.")

    def _json(self, rest: str) -> None:
        if not rest:
            self._talk.form = None
            self._show("Replies are text.")
            return
        from ..text.grammar import grammar_of
        from .lines import file_name

        path = file_name(rest)
        shown = show_name(path)
        try:
            schema = parse_json(read_text(path))
        except OSError as e:
            raise RequestError(f"{shown}: the schema cannot be read: {os_reason(e)}") from e
        except ValueError as e:
            raise RequestError(f"{shown}: it is not JSON") from e
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        grammar_of(form, None)
        self._talk.form = form
        self._show(f"Replies are JSON of the schema in {shown}.")

    def _redo(self, rest: str) -> None:
        if self._talk.turns and not self._talk.temperature:
            self._show("(With temperature 0 the same reply comes again: /set temperature 0.7)")
        self._write(self._talk.again())

    def _undo(self, rest: str) -> None:
        turn = self._talk.undo()
        self._show("There is no question." if turn is None else f"Forgotten: {brief(turn.text)}")

    def _clear(self, rest: str) -> None:
        self._talk.clear()
        self._show("The conversation is empty.")

    def _save(self, rest: str) -> None:
        if not rest:
            raise RequestError("name a file: /save chat.json")
        from .lines import file_name

        path = file_name(rest)
        try:
            self._show(f"Saved to {show_name(self._talk.save(path))}.")
        except OSError as e:
            raise RequestError(f"{show_name(path)}: cannot be written: {os_reason(e)}") from e

    def _load(self, rest: str) -> None:
        if not rest:
            raise RequestError("name a file: /load chat.json")
        from .lines import file_name

        self._talk.load(file_name(rest))
        self.show_turns()

    def show_turns(self) -> None:
        """Show what was said so far."""
        for turn in self._talk.turns:
            images = "".join(f"[{show_name(image.name)}] " for image in turn.images)
            self._show(f">>> {images}{turn.text}")
            self._show(turn.reply)

    def _info(self, rest: str) -> None:
        talk, model = self._talk, self._talk.model
        self._show(f"model     {show_name(talk.name or model.model_path)}, {model.n_ctx} tokens of context")
        system = model.defaults.system if talk.system is None else talk.system
        if system:
            self._show(f"system    {brief(system)}")
        options = {**talk.options, **({"replies": "JSON of a schema"} if talk.form else {})}
        if options:
            self._show("options   " + ", ".join(f"{name} {brief(value)}" for name, value in options.items()))
        images = sum(len(turn.images) for turn in talk.turns) + len(talk.images)
        counts = ((len(talk.turns), "question"), (images, "image"))
        self._show("so far    " + ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts))
        if talk.last is not None:
            self._show(f"last      {figures(talk.last.stats)}")

    def _help(self, rest: str) -> None:
        for usage, words in HELP.values():
            self._show(f"{usage:18} {words}")
        for line in KEYS.splitlines():
            self._show(line)

    def _bye(self, rest: str) -> None:
        raise Leave


def not_fetched(link: str) -> str:
    """What to say of the address of an image."""
    return f"{show_name(link)}: images are not fetched from the web; download it and drop the file"


def _unquoted(words: str) -> str:
    return words[1:-1] if len(words) > 1 and words[0] == words[-1] == '"' else words


def figures(stats: Any) -> str:
    """What a reply took, in words."""
    seconds, speed = stats.seconds, stats.tokens_per_second["decode"]
    words = [
        f"{stats.prompt_tokens} tokens before it, {stats.cached_tokens} of them known",
        f"image {seconds['encode']:.1f} s, prompt {seconds['prompt']:.1f} s",
        f"{stats.completion_tokens} tokens in {seconds['decode']:.1f} s",
    ]
    return ", ".join(words) + (f" ({speed:.1f} a second)" if speed else "")


def parse_value(name: str, words: str) -> Any:
    """The value of an option as it is typed. Raises RequestError."""
    if not words:
        return None
    if name == "stop":
        return _unquoted(words)
    try:
        return int(words) if name in ("top_k", "seed", "max_tokens") else float(words)
    except ValueError:
        kind = "whole number" if name in ("top_k", "seed", "max_tokens") else "number"
        raise RequestError(f"{name} must be a {kind}, not {brief(words)}") from None
