"""Sizes and foreign texts in words."""

from __future__ import annotations

import pytest

from mllama_gguf import RequestError
from mllama_gguf.words import one_line, os_reason, parse_size, show_name, show_size


@pytest.mark.parametrize(
    ("words", "n_bytes"),
    [
        ("0", 0),
        ("77", 77),
        ("5b", 5),
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        (" 8g ", 8 << 30),
        ("8 GB", 8 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5gb", 1500 * 10**6),
        ("1.5MiB", 3 << 19),
        ("2T", 2 << 40),
        ("0.1kb", 100),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes(words: str, n_bytes: int) -> None:
    assert parse_size(words, "--budget") == n_bytes


@pytest.mark.parametrize(
    "words",
    ["", "GiB", "-1", "8 Gigs", "1e9", "8GiB8", "5 parsecs", "inf", "٣", "9" * 5000, str(1 << 63), "."],
)
def test_words_that_are_no_size(words: str) -> None:
    with pytest.raises(RequestError, match=r"^--budget: .* is not a size") as error:
        parse_size(words, "--budget")
    assert len(str(error.value)) < 500


def test_sizes_in_words() -> None:
    sizes = (0, 999, 1000, 4 * 10**9, 1234567890123)
    assert [show_size(n) for n in sizes] == ["0 bytes", "999 bytes", "1.0 kB", "4.0 GB", "1.2 TB"]


def test_one_line() -> None:
    assert one_line(ValueError("two\n lines\tof it.")) == "two lines of it"
    assert one_line(KeyError()) == "KeyError"
    assert one_line("clear \x1b[2J \udcff 猫") == "clear \\x1b[2J \\udcff 猫"
    long = one_line("begin" + "x" * 5000 + "end")
    assert len(long) == 300
    assert long.startswith("begin")
    assert long.endswith("end")
    assert os_reason(OSError(28, "No space left on device", "file")) == "No space left on device"
    assert os_reason(OSError("odd")) == "odd"


def test_names() -> None:
    assert show_name(b"a\xff b.png") == "a\\udcff b.png"
    assert show_name("a  b\n.png") == "a  b\\n.png"
    assert len(show_name("x" * 301)) == 300
    assert show_name("x" * 9, 3) == "..."
