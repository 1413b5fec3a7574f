"""`mllama chat` at a real pseudo-terminal, and from a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest
from helpers import elsewhere
from PIL import Image

from mllama_gguf.chat.talk import Talk
from mllama_gguf.cli import chat as chat_module
from mllama_gguf.cli import progress
from mllama_gguf.cli.main import run

EXAMPLES = Path(__file__).parents[2] / "examples"
APPLE, TALL = str(EXAMPLES / "apple.png"), str(EXAMPLES / "tall.png")
COMMAND = ["-m", "mllama_gguf", "chat", "--no-cache"]
SECONDS = 120  # for a loaded machine


class Chat:
    """A chat in a pseudo-terminal, and what stands on its screen."""

    def __init__(self, home: Path, *args: str) -> None:
        there = elsewhere(HOME=str(home), XDG_STATE_HOME=str(home / "state"), TERM="xterm-256color")
        env = {**there["env"], "LC_ALL": "C.UTF-8"}
        self.child: Any = pexpect.spawn(
            sys.executable, [*COMMAND, *args], cwd=str(home), env=env, encoding="utf-8", dimensions=(50, 150)
        )
        self.child.delaybeforesend = None
        self._screen = pyte.Screen(150, 50)
        self._screen.write_process_input = self.child.send  # the terminal's answers to its questions
        self._stream = pyte.Stream(self._screen)

    def line(self, text: str) -> None:
        self.child.send(text + "\r")

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def until(self, pattern: str) -> None:
        """Wait until the screen's text ends so (a regular expression)."""
        end = time.monotonic() + SECONDS
        while not re.search(f"(?:{pattern})\\Z", self.text()):
            assert time.monotonic() < end, self.text()
            with suppress(pexpect.TIMEOUT):
                self._stream.feed(self.child.read_nonblocking(4096, 0.2))

    def answers(self, text: str, pattern: str) -> None:
        """Type a line and wait for what it gives, and the next prompt."""
        self.line(text)
        self.until(rf"{pattern}[^>]*\n>>>")

    def leave(self) -> int:
        with suppress(pexpect.EOF):
            while True:
                self.child.read_nonblocking(4096, SECONDS)
        self.child.close()
        return int(self.child.exitstatus)


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    started = Chat(tmp_path, APPLE)
    try:
        started.until(r"\[.*apple\.png, \d+ x \d+\]\n(?s:.*)Ctrl-D leaves\.\n>>>")
        yield started
    finally:
        started.child.close(force=True)


def test_a_conversation(chat: Chat, tmp_path: Path) -> None:
    chat.answers("Describe this image.", "a red apple")
    chat.answers(f"'{TALL}'", r"\[.*tall\.png, ")
    chat.answers("/set temperature x", "temperature must be a number")
    chat.answers("/save chat.json", "Saved to ")
    chat.line('"""Describe')
    chat.until(r"\.\.\.")
    chat.answers('this image."""', "[a-z]")
    chat.answers("/info", "2 questions, 2 images")
    chat.child.sendeof()
    assert chat.leave() == 0
    history = tmp_path / "state" / "mllama_gguf" / "chat-history"
    assert "Describe this image." in history.read_text() and os.stat(history).st_mode & 0o077 == 0


def test_colours_in_a_line(chat: Chat) -> None:
    """They look like a mouse, which the chat does not use."""
    chat.child.send("red \x1b[31mapple\x1b[0m")
    chat.until("apple")
    chat.child.send("\x03")
    chat.until(">>>")
    assert "Unhandled" not in chat.text() and "ENTER" not in chat.text()


def test_the_end_by_a_command(chat: Chat) -> None:
    chat.line("/bye")
    assert chat.leave() == 0


def test_control_c(chat: Chat, tmp_path: Path) -> None:
    """At the prompt it drops the line; in a reply it stops the reply. The chat continues."""
    chat.child.send("half a line")
    chat.until(">>> half a line")
    chat.child.send("\x03")
    chat.until("half a line\n>>>")
    schema = {"type": "array", "items": {"enum": ["apple"]}, "minItems": 900}  # a reply that continues
    (tmp_path / "long.json").write_text(json.dumps(schema))
    chat.answers("/json long.json", "Replies are JSON of the schema")
    for _ in range(5):  # on a fast machine the reply can end before this terminal has shown its beginning
        chat.line("Tell a long story.")
        chat.until(r"long story\.\n(?s:.*\w.*)")
        chat.child.send("\x03")
        chat.until(r"\((?:stopped|cut off [^)]*)\)\n>>>")
        if chat.text().endswith("(stopped)\n>>>"):
            break
    else:
        pytest.fail("no reply was stopped")
    chat.line("/bye")
    assert chat.leave() == 0


# `mllama` that waits long for the answers of a terminal, which is a test on a loaded machine
PATIENT = f"""
import select, sys
wait = select.select
select.select = lambda r, w, x, seconds=None: wait(r, w, x, {SECONDS})
from mllama_gguf.__main__ import main
main()
"""


def test_images_keep_their_proportions(tmp_path: Path) -> None:
    """A terminal that says it has sixel, and cells of 10 x 20 pixels."""
    there = elsewhere(HOME=str(tmp_path), XDG_STATE_HOME=str(tmp_path), TERM="xterm-256color")
    child: Any = pexpect.spawn(
        sys.executable,
        ["-c", PATIENT, *COMMAND[2:], "--no-history", TALL],
        **there,
        encoding="latin-1",
        dimensions=(30, 100),
    )
    try:
        child.expect(r"\x1b\[c", SECONDS)
        child.send("\x1b[?62;4;22c")
        child.expect(r"\x1b\[16t", SECONDS)
        child.send("\x1b[6;20;10t")
        child.expect(r'\x1bP[^"]*"1;1;(\d+);(\d+)', SECONDS)  # the raster's size
        width, height = map(int, child.match.groups())
        size = Image.open(TALL).size
        assert height / width == pytest.approx(size[1] / size[0], rel=0.1) and height <= 340
        child.expect("leaves", SECONDS)
    finally:
        child.close(force=True)


def test_completion(chat: Chat) -> None:
    chat.child.send("/und\t")
    chat.until(">>> /undo")
    chat.answers("", "There is no question")


@pytest.mark.parametrize("args", [[], ["--temp", "0"], ["--temp", "0.5"]])
def test_a_temperature_of_0_is_told_to_the_model(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of Ollama has one of its own, which 0 puts out of force."""
    seen: list[dict[str, Any]] = []

    def ask(talk: Talk, text: str) -> Iterator[str]:
        seen.append(dict(talk.options))
        return iter(())

    monkeypatch.setattr(Talk, "ask", ask)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What?")))
    assert run(["chat", "--no-cache", APPLE, *args]) == 0
    assert seen == [{"temperature": float(args[1])} if args else {}]


@pytest.mark.parametrize(
    ("args", "question", "code", "out", "err"),
    [
        ([APPLE], "Describe this image.\n", 0, "a red apple\n", ""),
        ([APPLE], "", 1, "", "Error: standard input is empty, but the question is read from it\n"),
        (["none.png"], "What?", 1, "", "Error: none.png: No such file or directory\n"),
    ],
)
def test_a_pipe(args: list[str], question: str, code: int, out: str, err: str) -> None:
    done = subprocess.run(
        [sys.executable, *COMMAND, *args], input=question, **elsewhere(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_question_that_is_stopped_takes_its_bar_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase that is stopped has no end of its own; its bar must not stay over the next prompt."""
    monkeypatch.setattr(progress, "is_live", lambda stream: True)
    bar = progress.PhaseBar()

    def pieces() -> Iterator[str]:
        bar("prompt", 1, 4)
        assert bar._bar is not None
        raise KeyboardInterrupt
        yield ""

    session: Any = None
    terminal = chat_module._Terminal(Talk(session), session, None, bar, session)
    with pytest.raises(KeyboardInterrupt):
        terminal._write(pieces())
    assert bar._bar is None


@pytest.mark.parametrize("moment", ["start", "stop"])
def test_ctrl_c_while_a_bar_begins_or_ends(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is heard when the bar is whole: half of one stays on the screen and draws over the next prompt."""
    from rich.live import Live

    monkeypatch.setattr(progress, "is_live", lambda stream: True)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    real, lives = getattr(Live, moment), []

    def interrupted(live: Live, *rest: Any, **more: Any) -> None:
        lives.append(live)
        if moment == "stop":
            signal.raise_signal(signal.SIGINT)
        real(live, *rest, **more)
        if moment == "start":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Live, moment, interrupted)
    phases, batch, steps = progress.PhaseBar(), progress.BatchBar(), progress.StepBar("measuring")
    bars: list[tuple[Any, Callable[[], None]]] = [
        (phases, lambda: phases("prompt", 1, 4)),
        (batch, lambda: batch.begin(4, 1)),
        (steps, lambda: steps.advance(1, 4, "a step", "fast")),
    ]
    try:
        for n, (bar, use) in enumerate(bars, 1):
            with pytest.raises(KeyboardInterrupt), bar:
                use()
                if moment == "start":
                    pytest.fail("Ctrl-C was lost")
            assert len(lives) >= n and not any(live.is_started for live in lives)
    finally:
        signal.signal(signal.SIGINT, old)
    assert phases._bar is None


def test_a_reply_whose_form_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = {"type": "array", "items": {"enum": ["apple"]}, "minItems": 900}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    cut = "(cut off after 2 tokens, before its form was complete)\n"
    for options, words in (
        ({"max_tokens": 2, "response_format": form}, cut),
        ({"max_tokens": 2}, ""),
    ):
        saved = {"format": "mllama chat", "version": 1, "system": None, "options": options, "turns": []}
        (tmp_path / "saved.json").write_text(json.dumps(saved))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What?")))
        assert run(["chat", "--no-cache", "-m", "demo", "--load", str(tmp_path / "saved.json")]) == 0
        assert capsys.readouterr().err == words


def test_a_saved_chat_with_another_system_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"format": "mllama chat", "version": 1, "system": "Old.", "options": {}, "turns": []}
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What?")))
    args = ["chat", "--no-cache", "-m", "demo", "--load", str(tmp_path / "saved.json")]
    assert run([*args, "--system", "x " * 20_000]) == 1  # it reaches the model
    assert "tokens" in capsys.readouterr().err
