"""What is printed: raw into pipes, printable on a terminal, whatever the terminal and the locale are."""

from __future__ import annotations

import ast
import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers import elsewhere

import mllama_gguf
from mllama_gguf.cli import terminal
from mllama_gguf.cli.main import COMMANDS, run
from mllama_gguf.words import as_json, printable

Captured = pytest.CaptureFixture[str]
APPLE = Path(__file__).parents[2] / "examples" / "apple.png"
ESCAPES = "esc\x1b[31mred\x07.png"
LATIN = b"caf\xe9.png"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The apple under names that terminals and encodings have trouble with."""
    monkeypatch.chdir(tmp_path)
    found = [ESCAPES, os.fsdecode(LATIN), "猫.png", "line\nend.png"]
    for name in found:
        shutil.copy(APPLE, name)
    return found


def started(*args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mllama_gguf", *map(str, args)]
    environment = {**elsewhere()["env"], **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120)


def on_terminal(*args: object, cwd: Path, columns: int = 80, **env: str) -> bytes:
    """What a command writes to a terminal, where stdout and stderr are one."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "mllama_gguf", *map(str, args)]
    environment = {**elsewhere()["env"], "TERM": "xterm-256color", **env}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    out = b""
    with open(leader, "rb", buffering=0) as file:
        while True:
            try:
                piece = file.read(1 << 16)
            except OSError:  # the last writer has closed it
                break
            if not piece:
                break
            out += piece
    assert process.wait(60) == 0, out
    return out


# ---- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 猫 é 👍🏽", "plain 猫 é 👍🏽"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("over\rwritten\x08\x7f", "over\\rwritten\\x08\\x7f"),
        ("\u202eright to left", "\\u202eright to left"),
        ("bad\udcff", "bad\\udcff"),
        ("👨\u200d👩\u200d👧 a\u200cb", "👨\u200d👩\u200d👧 a\u200cb"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_json_keeps_characters_and_names() -> None:
    words = as_json({"image": "猫\udcff.png", "caption": "é\n\x1b"})
    assert words == '{"image": "猫\\udcff.png", "caption": "é\\n\\u001b"}'
    assert json.loads(words) == {"image": "猫\udcff.png", "caption": "é\n\x1b"}
    assert words.encode()


class Screen(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding, newline="\n", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> bytes:
        self.flush()
        raw = self.buffer
        assert isinstance(raw, io.BytesIO)
        return raw.getvalue()


def test_json_on_a_terminal_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"image": "a\x9b\u202e\U000e0041猫\x7f"}
    for encoding in ("utf-8", "latin-1", "ascii"):
        screen = Screen(encoding)
        monkeypatch.setattr(sys, "stdout", screen)
        terminal.fit_streams()
        terminal.echo_json(value)
        monkeypatch.undo()
        text = screen.shown.decode(encoding)
        assert text.rstrip("\n").isprintable() and json.loads(text) == value


# ---- commands ----------------------------------------------------------------------------------------------


def test_every_command_prints_in_this_way() -> None:
    """click.echo drops escape sequences from what goes into a pipe, and shows them on a terminal."""
    for path in (Path(mllama_gguf.__file__).parent / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("print", "click.echo", "click.secho"), f"{path.name}:{node.lineno}"


def test_names_are_raw_in_a_pipe(names: list[str], tmp_path: Path) -> None:
    done = started("caption", *names, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == b""
    shown = b"".join(os.fsencode(name) + b": a red apple\n" for name in names)
    assert done.stdout == shown


def test_names_are_printable_on_a_terminal(names: list[str], tmp_path: Path) -> None:
    out = on_terminal("caption", *names, cwd=tmp_path, MLLAMA_IMAGE_CACHE_SIZE="0")
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", out)  # of the bars
    assert b"esc\\x1b[31mred\\x07.png: " in plain and b"caf\\udce9.png: " in plain
    assert "猫.png".encode() in plain and b"line\\nend.png: " in plain
    assert b"\x1b[31mred" not in out and b"\x07" not in out and b"\xe9.png" not in out


def test_a_name_is_in_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a line end could look like a message of ours."""
    name = "a.png\nError: none\tx"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.name_on(sys.stdout, name) == "a.png\\nError: none\\tx"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert terminal.name_on(sys.stdout, name) == name


def test_names_in_json(names: list[str], capsys: Captured, tmp_path: Path) -> None:
    long = Path(*["d" * 60] * 5) / "猫.png"
    long.parent.mkdir(parents=True)
    shutil.copy(APPLE, long)
    assert run(["caption", *names, str(long), "--json"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line)["image"] for line in out.splitlines()] == [*names, str(long)]
    assert "猫" in out and "\\u732b" not in out
    uri = "data:image/png;base64," + "A" * 5000
    assert run(["caption", uri, "--json"]) == 1
    assert run(["preprocess", *names, str(long), "--json"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line)["image"] for line in out.splitlines()] == [*names, str(long)]


def test_a_batch_keeps_names(names: list[str], tmp_path: Path) -> None:
    assert run(["caption", *names, "--out", "c.jsonl"]) == 0
    data = Path("c.jsonl").read_bytes()
    assert "猫.png".encode() in data and b"\\u732b" not in data
    assert {json.loads(line)["image"] for line in data.splitlines()} == set(names)
    assert run(["caption", *names, "nothing\x1b猫.png", "--out", "d.jsonl"]) == 3
    failed = Path("errors.jsonl").read_bytes()
    assert "猫".encode() in failed and json.loads(failed)["image"] == "nothing\x1b猫.png"


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252:strict"},
    ],
    ids=lambda env: " ".join(f"{name}={value}" for name, value in env.items()),
)
def test_locales(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "猫é.png").write_bytes(APPLE.read_bytes())
    done = started("caption", "猫é.png", "猫é.png", "nix猫.png", "--json", cwd=tmp_path, **env)
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: nix") and done.stderr.count(b"\n") == 1, done.stderr
    for line in done.stdout.splitlines():
        assert os.fsencode(json.loads(line)["image"]) == "猫é.png".encode()
    done = started("caption", "猫é.png", "猫é.png", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b".png: a red apple\n") == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_and_tables_in_small_encodings(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in ([], *([command] for command in COMMANDS)):
        screen = Screen(encoding)
        monkeypatch.setattr(sys, "stdout", screen)
        assert run([*args, "--help"]) == 0
        monkeypatch.undo()
        assert screen.shown.isascii(), args
    screen = Screen(encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    assert run(["plan", "demo"]) == 0
    monkeypatch.undo()
    assert b"mapped" in screen.shown and b"\\u" not in screen.shown


@pytest.mark.parametrize(
    ("columns", "env"),
    [
        (20, {}),
        (20, {"TERM": "dumb", "LC_ALL": "C"}),
        (80, {"TERM": "unknown"}),
        (20, {"NO_COLOR": "1"}),
    ],
)
def test_narrow_and_dumb_terminals(columns: int, env: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(APPLE, tmp_path / "a.png")
    out = on_terminal("caption", "a.png", "--out", "c.jsonl", cwd=tmp_path, columns=columns, **env)
    assert b"1 image: 1 captioned" in out.replace(b"\r\n", b"")
    if env.get("TERM") in ("dumb", "unknown"):
        assert b"\x1b" not in out
    if "NO_COLOR" in env:
        assert not re.search(rb"\x1b\[[0-9;]*(3[0-7]|38;|9[0-7])[0-9;]*m", out)


def test_tables_on_a_narrow_terminal(tmp_path: Path) -> None:
    out = on_terminal("plan", "demo", cwd=tmp_path, columns=20, NO_COLOR="1")
    assert b"mapped" in out and b"CPU" in out


def test_errors_of_usage_are_printable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in (
        ["\x1b[2J"],
        ["caption", "--\x1b[2J"],
        ["models", "\x1b[2J"],
        ["caption", "a", "-t", "\x1b[2J"],
        ["quantize", "\x1b[2J", "x.gguf", "--type", "\x1b[2J"],
    ):
        screen = Screen("utf-8")
        monkeypatch.setattr(sys, "stderr", screen)
        code = run(args)
        monkeypatch.undo()
        assert code == 2 and b"\x1b" not in screen.shown and b"[2J" in screen.shown


@pytest.mark.parametrize(
    "args",
    [
        ["quantize", "a", "b"],
        ["caption", "a", "--existing", "x\ny"],
        ["caption"],
        ["caption", "a", "--seed", "9" * 5000],
        ["caption", "a", "--existing", "x" * 5000],
    ],
)
def test_errors_of_usage_are_one_line(args: list[str], capsys: Captured) -> None:
    assert run(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and said.count("\n") == 1 and len(said) < 700
