"""Events of a reply that are sent together."""

from __future__ import annotations

from mllama_gguf.server.jobs import Done, Piece
from mllama_gguf.server.problems import Refused
from mllama_gguf.server.streaming import joined
from mllama_gguf.text.logprobs import TokenLogprob


def token(text: str) -> TokenLogprob:
    return TokenLogprob(ord(text), text.encode(), -1.0)


def test_pieces_that_follow_each_other_are_one() -> None:
    done = Done(0.0, 1.0)
    events = [Piece("a"), Piece("b", 0, (token("b"),)), Piece("", 0, (token("x"),)), Piece("c", 1), done]
    assert list(joined(events)) == [
        Piece("ab", 0, (token("b"), token("x"))),
        Piece("c", 1),
        done,
    ]


def test_other_events_stay_where_they_are() -> None:
    problem = Refused(500, "no")
    events = [Piece("a"), problem, Piece("b")]
    assert list(joined(events)) == events
    assert list(joined([])) == []
    assert list(joined([Piece("")])) == [Piece("")]
