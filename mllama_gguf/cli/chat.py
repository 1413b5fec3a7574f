"""`mllama chat`: a conversation about images at the terminal."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import Aborted, MllamaError, RequestError
from ..words import one_line, show_name
from .first_use import offer_real_models, tell_of_real_models
from .opening import open_chosen, with_tuned
from .options import ModelChoice, model_options, no_cache_option, no_tuned_option
from .progress import PhaseBar
from .replies import temperature_option
from .terminal import echo

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from ..chat.commands import Commands
    from ..chat.talk import Attached, Talk

logger = logging.getLogger(__name__)
PROMPT, MORE = ">>> ", "... "
INSTALL = "pip install 'mllama_gguf[chat]'"


@click.command(
    "chat",
    epilog="\b\nExamples:\n"
    "  mllama chat photo.jpg -m ollama:llama3.2-vision\n"
    "  mllama chat --system 'Answer in French.' --temp 0.6\n"
    "  echo 'What colour is the car?' | mllama chat photo.jpg",
)
@click.argument("images", metavar="[IMAGE]...", nargs=-1)
@click.option("--system", metavar="TEXT", help="System message: how the model should answer; '': none.")
@temperature_option
@click.option("--load", "saved", metavar="FILE", help="Continue a conversation that /save wrote.")
@click.option("--preview/--no-preview", default=True, help="Show images if the terminal can do it.")
@click.option("--history/--no-history", default=True, help="Keep the typed lines for the next chat.")
@no_cache_option
@no_tuned_option
@model_options
def chat_command(
    images: tuple[str, ...],
    system: str | None,
    temperature: float | None,
    saved: str | None,
    preview: bool,
    history: bool,
    no_cache: bool,
    no_tuned: bool,
    choice: ModelChoice,
) -> None:
    """Talk about images. The IMAGEs belong to the first question.

    Type a question. Drop an image into the line, or name its file, to ask about it. /help lists the
    commands: /image, /paste, /system, /set, /json, /redo, /undo, /clear, /save, /load, /info. Ctrl-C stops a
    reply, Ctrl-D leaves.

    Without -m, and if this machine has real models, they are offered first.

    Without a terminal, standard input is one question, and only the reply is printed.
    """
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    session, show_image, offered = None, None, choice
    if is_terminal:
        # Asks the terminal what it can do, before anything else reads from it.
        from ..chat.preview import preview as find_preview

        show_image = find_preview() if preview else None
        session = _session(history)
        offered = offer_real_models(choice)
    told = choice if offered is choice else None  # not after the question which model to use
    choice = offered if no_tuned else with_tuned(offered)

    bar = PhaseBar()
    with open_chosen(choice, bar=bar, image_cache=not no_cache) as model:
        from ..chat.talk import Talk

        talk = Talk(model, system, name=choice.name)
        if saved is not None:
            talk.load(saved)
            if system is not None:
                talk.system = system
        if temperature is not None:
            talk.set("temperature", temperature)
        for image in images:
            talk.attach(image)
        if session is None:
            _answer_one(talk)
            tell_of_real_models(choice)
        else:
            _Terminal(talk, session, show_image, bar, told).run()


def _answer_one(talk: Talk) -> None:
    """The question is all of standard input; the reply is all of standard output."""
    if sys.stdin is None:
        raise RequestError("standard input is closed, but the question is read from it")
    if sys.stdin.isatty():  # only the output goes elsewhere
        echo("Type a question, then Ctrl-D.", err=True)
    text = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not text:
        raise RequestError("standard input is empty, but the question is read from it")
    for piece in talk.ask(text):
        echo(piece, nl=False)
    echo()
    _tell_of_cut(talk)


def _tell_of_cut(talk: Talk) -> None:
    """Say that the last reply has not the form that was asked for: it was cut."""
    reply = talk.last
    if reply is not None and reply.finish_reason == "length" and talk.form is not None:
        n = reply.stats.completion_tokens
        echo(f"(cut off after {n} tokens, before its form was complete)", err=True)


def _session(history: bool) -> PromptSession[str]:
    """What reads lines, with history and completion."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
    except ImportError:
        raise RequestError(f"a chat at the terminal needs prompt_toolkit: {INSTALL}") from None
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    from .chat_completion import ChatCompleter, KeptLines

    path = _history_file() if history else None
    keys = KeyBindings()
    # Pasted colours look like an event of a mouse, which prompt_toolkit would then fail to read.
    keys.add(Keys.Vt100MouseEvent)(lambda event: None)
    return PromptSession(
        history=InMemoryHistory() if path is None else KeptLines(os.fspath(path)),
        completer=ChatCompleter(),
        complete_while_typing=False,
        key_bindings=keys,
        enable_open_in_editor=True,
    )


def _history_file() -> Path | None:
    """Only for this user; None where it cannot be made."""
    import platformdirs

    path = platformdirs.user_state_path("mllama_gguf") / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600))
    except OSError:
        return None
    return path if path.is_file() else None


class _Terminal:
    """The loop: a line, what it asks for, and again."""

    def __init__(
        self,
        talk: Talk,
        session: PromptSession[str],
        show_image: Callable[[Attached], None] | None,
        bar: PhaseBar,
        told: ModelChoice | None,
    ) -> None:
        from ..chat.commands import Commands

        self._bar, self._told = bar, told
        self._talk, self._session, self._show_image = talk, session, show_image
        self._commands: Commands = Commands(talk, echo, self._write, self._added)

    def run(self) -> None:
        from ..chat.commands import Leave

        self._commands.show_turns()  # of a chat that was loaded
        for image in self._talk.images:
            self._added(image)
        if self._told is not None:
            tell_of_real_models(self._told)
        echo(f"{show_name(self._talk.name)}. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                continue  # the line is dropped
            except EOFError:
                return
            try:
                self._do(line)
            except Leave:
                return
            except (KeyboardInterrupt, Aborted):
                echo()
                echo("(stopped)")
            except MllamaError as e:
                echo(f"Error: {e}", err=True)
            except Exception as e:  # a bug must not take the conversation along
                logger.debug("a line of the chat", exc_info=True)
                echo(f"Error: unexpected {type(e).__name__}: {one_line(e)} (--verbose shows where)", err=True)

    def _read(self) -> str:
        """One line, or several between triple quotes."""
        from ..chat.lines import is_open

        text = self._session.prompt(PROMPT)
        while is_open(text):
            text += "\n" + self._session.prompt(MORE)
        return str(text)

    def _do(self, line: str) -> None:
        from ..chat.commands import NAMES, not_fetched
        from ..chat.lines import Command, parse, without_quotes

        if not line.strip():
            return
        text = without_quotes(line)
        # Nothing in quotes is a command.
        parsed = parse(text if text == line else text.lstrip("/ \n") and f"\n{text}", NAMES)
        if isinstance(parsed, Command):
            self._commands.run(parsed.name, parsed.rest)
            return
        for name in parsed.images:
            self._commands.add(name)
        for link in parsed.links:
            echo(not_fetched(link))
        for name in parsed.missing:
            echo(f"{show_name(name)}: there is no such file; the question goes without it")
        if parsed.text:
            self._write(self._talk.ask(parsed.text))

    def _write(self, pieces: Iterator[str]) -> None:
        from prompt_toolkit.utils import get_cwidth

        from ..chat.wrap import Wrapping

        wrapping = Wrapping(lambda: shutil.get_terminal_size().columns, get_cwidth)
        try:
            for piece in pieces:
                # JSON as it is: somebody may copy it.
                echo(wrapping.add(piece) if self._talk.form is None else piece, nl=False)
        finally:
            self._bar.stop()  # of a question that was stopped while it was read
            echo(wrapping.rest())
        _tell_of_cut(self._talk)

    def _added(self, image: Attached) -> None:
        if self._show_image is not None:
            self._show_image(image)
        echo(f"[{show_name(image.name)}, {image.size[0]} x {image.size[1]}]")
