"""Streaming: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import random
import time

import pytest

from mllama_gguf.errors import RequestError
from mllama_gguf.text.stream import TextStream, stop_list


def feed(pieces: list[bytes], *stops: str) -> tuple[list[str], bool]:
    stream = TextStream(stops)
    shown = [stream.feed(piece) for piece in pieces]
    return [*shown, stream.finish()], stream.stopped


def test_a_split_character_appears_once_it_is_whole() -> None:
    snowman = "☃".encode()
    assert feed([b"a", snowman[:1], snowman[1:2], snowman[2:], b"b"])[0] == ["a", "", "", "☃", "b", ""]


@pytest.mark.parametrize("seed", range(20))
def test_any_split_gives_the_same_text(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("aé☃😀\n") for _ in range(40))
    data = text.encode()
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(15))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    shown, _ = feed(pieces, "never")
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown)


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    assert feed([b"ok", "😀".encode()[:3]])[0] == ["ok", "", ""]


def test_bytes_that_are_no_text_do_not_stop_the_stream() -> None:
    assert "".join(feed([b"a", b"\xff", b"b"])[0]) == "a\ufffdb"


def test_stop_string_over_several_tokens() -> None:
    shown, stopped = feed([b"one ", b"EN", b"D", b" two"], "END")
    assert (shown, stopped) == (["one ", "", "", "", ""], True)


def test_what_only_began_like_a_stop_string_is_shown() -> None:
    assert feed([b"one E", b"N", b"T"], "END") == (["one ", "", "ENT", ""], False)
    assert feed([b"one E", b"N"], "END") == (["one ", "", "EN"], False)
    assert feed([b"aab"], "ab")[0] == ["a", ""]
    assert "".join(feed([b"a", b"a", b"b"], "ab")[0]) == "a"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert feed([b"x STOP y END z"], "END", "STOP") == (["x ", ""], True)


def test_stop_list() -> None:
    assert stop_list(None) == ()
    assert stop_list("a") == ("a",)
    assert stop_list(["a", "b"]) == ("a", "b")
    for wrong in ("", ["a", ""], [1]):
        with pytest.raises(RequestError, match="stop"):
            stop_list(wrong)  # type: ignore[arg-type]


def test_stop_strings_are_bounded() -> None:
    """Each token is compared with all of them: a request with a million would stop everybody else's."""
    assert len(stop_list(["ab"] * 5000)) == 5000
    for much in (["ab"] * 5001, "x" * 10_001, [f"{i:06}" for i in range(100_000)]):
        with pytest.raises(RequestError, match=r"stop has .* 10000 are allowed"):
            stop_list(much)
    stream = TextStream(["a" * 9000 + "b", *("c" for _ in range(999))])
    begin = time.process_time()
    for _ in range(60):
        assert stream.feed(b"a" * 100) == ""
    assert time.process_time() - begin < 3.0
    assert stream.finish() == "a" * 6000
