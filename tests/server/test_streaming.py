"""Events of a reply that are sent together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from mllama_gguf.server.jobs import Done, Mailbox, Piece
from mllama_gguf.server.problems import Refused
from mllama_gguf.server.streaming import Computed, joined
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


def test_a_reader_of_a_mailbox_is_woken_for_what_it_wants() -> None:
    async def read(whole: bool) -> None:
        loop = asyncio.get_running_loop()
        mailbox, done = Mailbox(loop, whole=whole), Done(0.0, 1.0)

        def put(*events: Piece | Done | Refused) -> asyncio.Future[None]:
            return loop.run_in_executor(None, lambda: [mailbox.put(event) for event in events] and None)

        # Nothing came; a wake-up that is late is not taken for something.
        start = loop.time()
        loop.call_soon(mailbox._wake)
        assert await mailbox.take(0.05) == []
        assert loop.time() - start > 0.04
        reading = asyncio.create_task(mailbox.take(5))
        await put(Piece("a"))
        await asyncio.sleep(0.05)
        assert reading.done() != whole
        start = loop.time()
        ending = put(Piece("b"), done)
        if not whole:
            assert await reading == [Piece("a")]
            await mailbox.gather(5)  # up to the end
            reading = asyncio.create_task(mailbox.take(5))
        await ending
        found = await reading
        assert found[-2:] == [Piece("b"), done]
        assert loop.time() - start < 2
        # What follows an end, as after a client that is gone, is waited for too.
        await put(Refused(499, "gone"), Piece("c"))
        assert [type(event) for event in await mailbox.take(5)] == [Refused, Piece]
        assert await mailbox.take(0.01) == []

    for whole in (True, False):
        asyncio.run(read(whole))


def test_a_sign_of_life_while_a_reply_is_held_back() -> None:
    """What may become a call of a tool is not shown; proxies and clients end a connection that is silent."""

    async def sent(ping: float) -> list[bytes]:
        mailbox = Mailbox(asyncio.get_running_loop(), whole=False)
        engine: Any = SimpleNamespace(submit=lambda job: None, cancel=lambda job: None)
        writer: Any = SimpleNamespace(
            media_type="x/y", ping=lambda: b"ping", frames=lambda e: [b"end"] if isinstance(e, Done) else []
        )
        job: Any = SimpleNamespace(mailbox=mailbox, time_limit=0)
        bodies: list[bytes] = []

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                bodies.append(message["body"])

        async def write() -> None:
            for _ in range(60):
                mailbox.put(Piece("x"))
                await asyncio.sleep(0.02)
            mailbox.put(Done(0.0, 1.0))

        writing = asyncio.create_task(write())
        await Computed(engine, job, writer, stream=True, ping_seconds=ping)({"path": "/"}, receive, send)
        await writing
        return bodies

    bodies = asyncio.run(sent(0.1))
    assert bodies[-1] == b"end" and set(bodies[:-1]) == {b"ping"} and 2 <= len(bodies[:-1]) <= 20
    assert asyncio.run(sent(60.0)) == [b"end"]
