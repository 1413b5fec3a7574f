"""Typed lines: commands, and pictures in questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllama_gguf.chat.commands import NAMES, parse_value
from mllama_gguf.chat.lines import Command, Question, find_images, is_open, parse, without_quotes
from mllama_gguf.errors import RequestError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working and home directory: with a.png, b c.JPG and notes.txt."""
    for name in ("a.png", "b c.JPG", "notes.txt", "\u732b.webp"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("What is this?", Question("What is this?")),
        ("What is a.png?", Question("What is?", ("a.png",))),
        ("a.png What is this?", Question("What is this?", ("a.png",))),
        ("Compare a.png and 'b c.JPG'.", Question("Compare and.", ("a.png", "b c.JPG"))),
        (r"b\ c.JPG What?", Question("What?", ("b c.JPG",))),
        ('"b c.JPG"', Question("", ("b c.JPG",))),
        ("b c.JPG", Question("", ("b c.JPG",))),
        ("file://{folder}/b%20c.JPG", Question("", ("{folder}/b c.JPG",))),
        ("{folder}/a.png", Question("", ("{folder}/a.png",))),
        ("~/a.png", Question("", ("{folder}/a.png",))),
        ("\u732b.webp \u4f55?", Question("\u4f55?", ("\u732b.webp",))),
        ("What is in notes.txt?", Question("What is in notes.txt?")),
        ("Is missing.png there?", Question("Is missing.png there?")),
        ("Don't do it", Question("Don't do it")),
        ("https://example.com/x.png what?", Question("https://example.com/x.png what?", (), ("https://example.com/x.png",))),
        ("https://example.com/", Question("https://example.com/")),
        ("/set temperature 0.7", Command("set", "temperature 0.7")),
        ("/SAVE x y.json", Command("save", "x y.json")),
        ("/no/such/file.png", Command("no/such/file.png", "")),
        ("/?", Command("?", "")),
        ("  /undo  ", Command("undo", "")),
    ],
)  # fmt: skip
def test_lines(line: str, expected: Command | Question, folder: Path) -> None:
    line = line.replace("{folder}", str(folder))
    if isinstance(expected, Question):
        images = tuple(name.replace("{folder}", str(folder)) for name in expected.images)
        expected = Question(expected.text, images, expected.links)
    assert parse(line, NAMES) == expected


@pytest.mark.parametrize("text", ["a\0b.png", "x" * 100_000 + ".png", "\ud800.png", "'" * 1001, "\\", "\0"])
def test_hostile_lines(text: str, folder: Path) -> None:
    assert find_images(text).images == ()


def test_several_lines() -> None:
    assert is_open('"""a') and is_open('  """') and not is_open('"""a"""') and not is_open('a """')
    assert without_quotes('"""a\nb"""') == "a\nb"
    assert without_quotes('say """a"""') == 'say """a"""'
    assert isinstance(parse("a\n/bye", NAMES), Question)


def test_values() -> None:
    assert parse_value("temperature", "0.7") == 0.7
    assert parse_value("seed", "7") == 7 and parse_value("stop", '" x"') == " x"
    assert parse_value("top_k", "") is None
    with pytest.raises(RequestError, match=r"top_k must be a whole number, not '1\.5'"):
        parse_value("top_k", "1.5")
