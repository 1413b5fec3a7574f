"""Typed lines: commands, and images in questions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mllama_gguf.chat.commands import NAMES, parse_value
from mllama_gguf.chat.lines import (
    Command,
    Question,
    file_name,
    file_names,
    find_images,
    is_open,
    parse,
    without_quotes,
)
from mllama_gguf.chat.wrap import Wrapping
from mllama_gguf.errors import RequestError

A = "{folder}/a.png"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working and home directory: with a.png, b c.JPG and notes.txt."""
    for name in (
        "a.png",
        "b c.JPG",
        "notes.txt",
        "\u732b.webp",
        "it's.png",
        "x#1?.png",
        "s(1).png",
        "caf\udce9.png",
    ):
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
        ("Is missing.png there?", Question("Is missing.png there?", missing=("missing.png",))),
        ("What's in a.png? Isn't it nice?", Question("What's in? Isn't it nice?", ("a.png",))),
        ("What's in 'b c.JPG' and isn't it nice?", Question("What's in and isn't it nice?", ("b c.JPG",))),
        ("'a.png' 'b c.JPG'", Question("", ("a.png", "b c.JPG"))),
        ("In {folder}/b c.JPG, in ./b c.JPG?", Question("In, in?", ("{folder}/b c.JPG", "./b c.JPG"))),
        ("What is in b c.JPG?", Question("What is in b c.JPG?", missing=("c.JPG",))),
        ("It is (see a.png).", Question("It is (see).", ("a.png",))),
        ("Look at \u201ca.png\u201d!", Question("Look at!", ("a.png",))),
        ("it's.png", Question("", ("it's.png",))),
        (r"'it'\''s.png' what?", Question("what?", ("it's.png",))),
        (r"it\'s.png what?", Question("what?", ("it's.png",))),
        (r"s\(1\).png what?", Question("what?", ("s(1).png",))),
        ("file://host/{folder}/x%231%3F.png what?", Question("what?", ("/{folder}/x#1?.png",))),
        ("file://{folder}/x#1?.png", Question("", ("{folder}/x#1?.png",))),
        ("file://{folder}/caf%E9.png", Question("", ("{folder}/caf\udce9.png",))),
        ("file://{folder}/a.png\nfile://{folder}/b%20c.JPG", Question("", (A, "{folder}/b c.JPG"))),
        ("What are *.png and {x}.png?", Question("What are *.png and {x}.png?")),
        ("Don't do it", Question("Don't do it")),
        ("https://example.com/x.png what?", Question("https://example.com/x.png what?", (), ("https://example.com/x.png",))),
        ("https://example.com/", Question("https://example.com/")),
        ("http://[x.png?", Question("http://[x.png?", (), ("http://[x.png",))),
        ("(https://example.com/x.PNG?s=1)", Question("(https://example.com/x.PNG?s=1)", (), ("https://example.com/x.PNG?s=1",))),
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
        expected = Question(expected.text, images, expected.links, expected.missing)
    assert parse(line, NAMES) == expected


@pytest.mark.parametrize("text", ["a\0b.png", "x" * 100_000 + ".png", "\ud800.png", "'" * 1001, "\\", "\0"])
def test_hostile_lines(text: str, folder: Path) -> None:
    assert find_images(text).images == ()


def test_names_of_files(folder: Path) -> None:
    """As commands take them: several, with quotes, backslashes, ~ and file://, or one with blanks."""
    assert file_names("a.png b\\ c.JPG") == ["a.png", "b c.JPG"]
    assert file_names("b c.JPG") == ["b c.JPG"] and file_names("'b c.JPG'") == ["b c.JPG"]
    assert file_names("a.png none.png") == ["a.png", "none.png"]
    assert file_names("no such.png") == ["no such.png"]
    assert file_names("~/a.png") == [f"{folder}/a.png"]
    assert file_name(f"file://{folder}/b%20c.JPG") == f"{folder}/b c.JPG"
    assert file_name("~/new chat.json") == f"{folder}/new chat.json"
    assert file_name(r"new\ chat.json") == "new chat.json" and file_name("it's.png") == "it's.png"


@pytest.mark.parametrize(
    "text", ["' " * 3000, '" x.png' * 2000, "/a b.png" * 3000, "file://[x" * 1000, "\\ " * 5000]
)
def test_long_lines_are_read_quickly(text: str, folder: Path) -> None:
    begin = time.perf_counter()
    find_images(text)
    assert time.perf_counter() - begin < 5


def test_replies_break_between_words() -> None:
    def shown(text: str, columns: int) -> list[str]:
        """As a terminal of so many columns has it, from one character at a time."""
        wrapping = Wrapping(lambda: columns, lambda words: sum(1 + (ord(c) > 0x2E80) for c in words))
        return ("".join(map(wrapping.add, text)) + wrapping.rest()).split("\n")

    assert shown("a red apple to the left", 11) == ["a red apple", "to the left"]
    assert shown("a  b\n\n  - item one\n", 9) == ["a  b", "", "  - item", "one", ""]
    assert shown("x" * 25 + " yy", 10) == ["x" * 10, "x" * 10, "xxxxx yy"]
    assert shown("ab \u732b\u732b\u732b", 7) == ["ab \u732b\u732b", "\u732b"]
    assert shown("a \x1b[1m", 20) == ["a \\x1b[1m"] and shown("", 5) == [""]


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
