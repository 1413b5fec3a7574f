"""Completion in `mllama chat`: what Tab adds to a line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mllama_gguf.chat.lines import file_names, find_images
from mllama_gguf.chat.preview import HEIGHT, WIDTH, width_of
from mllama_gguf.cli.chat_completion import ChatCompleter, KeptLines


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("apple one.png", "apple's.png", "pear.JPG", "notes.txt", ".hidden.png", "chat.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub folder").mkdir()
    (tmp_path / "sub folder" / "in.webp").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def completed(line: str) -> list[str]:
    """The lines that Tab offers."""
    found = ChatCompleter().get_completions(Document(line), CompleteEvent())
    return [line[: len(line) + one.start_position] + one.text for one in found]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/und", ["/undo"]),
        ("/set top", ["/set top_k", "/set top_p"]),
        ("/image p", ["/image pear.JPG"]),
        ("/image pear.JPG app", [r"/image pear.JPG apple\ one.png", r"/image pear.JPG apple\'s.png"]),
        ("/image 'apple o", ["/image 'apple one.png"]),
        (r"/image apple\ o", [r"/image apple\ one.png"]),
        ("/load ", ["/load chat.json", "/load sub\\ folder/"]),
        ("/load ~/c", ["/load ~/chat.json"]),
        ("What is in app", [r"What is in apple\ one.png", r"What is in apple\'s.png"]),
        ("What is in ./sub\\ folder/", ["What is in ./sub\\ folder/in.webp"]),
        ("~", ["~/"]),
        ("/clear ", []),
        ("What ", []),
        ("", []),
        ("/no/such/", []),
        ("x\0", []),
        ("'", ["'apple one.png", "'apple's.png", "'pear.JPG", "'sub folder/"]),
    ],
)
def test_lines(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_a_path_from_the_root(folder: Path) -> None:
    assert completed(f"{folder}/pe") == [f"{folder}/pear.JPG"]
    assert completed("/us") == ["/usr/"]


def test_what_is_completed_is_found() -> None:
    """In a question and after /image, whatever is in the name."""
    for line in completed("What is in app"):
        assert len(find_images(line).images) == 1
    for line in completed("/image app"):
        assert all(map(os.path.exists, file_names(line.removeprefix("/image "))))


def test_a_line_that_cannot_be_kept(folder: Path) -> None:
    KeptLines(os.fspath(folder)).append_string("a line")  # a folder is not a file


def test_images_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (200, 40, 3):
        terminal = os.terminal_size((columns, 24))
        monkeypatch.setattr("shutil.get_terminal_size", lambda terminal=terminal: terminal)
        for size in ((640, 480), (10, 4000), (4000, 10), (1, 1)):
            width = width_of(size)
            assert 1 <= width <= min(WIDTH, columns)
            assert width == 1 or width * size[1] / size[0] / 2 <= HEIGHT + 1
