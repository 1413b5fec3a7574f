"""A reply as an object: read, closed, cancelled; what it took; and the options that it is asked for with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import STOP_SECONDS, TinyFiles, noisy_image

from mllama_gguf import Aborted, BusyError, LoadedModel, Mllama, MllamaError, Reply, RequestError, Stats
from mllama_gguf.decode.options import ReplyOptions

Files = Callable[[str], TinyFiles]
QUESTION = [{"role": "user", "content": "the dog"}]


def test_text_and_stats(model: Mllama) -> None:
    reply = model.reply(image=noisy_image(1), prompt="the dog", max_tokens=9)
    assert isinstance(reply, Reply)
    assert (reply.finish_reason, reply.stats.completion_tokens) == (None, 0)  # nothing is computed yet
    pieces = list(reply)
    assert len(pieces) > 1
    stats = reply.stats
    assert isinstance(stats, Stats)
    assert reply.finish_reason == stats.finish_reason == "length"
    assert stats.completion_tokens == 9
    assert stats.prompt_tokens > 0
    assert all(seconds > 0 for seconds in stats.seconds.values())
    assert (list(reply), reply.read()) == ([], "")  # it is read once
    model.reset()
    assert model.caption(noisy_image(1), "the dog", max_tokens=9) == "".join(pieces)
    content = [{"type": "image", "image": noisy_image(1)}, {"type": "text", "text": "the dog"}]
    again = model.reply([{"role": "user", "content": content}], max_tokens=9)
    assert again.read() == "".join(pieces)
    assert again.stats.cached_tokens > 0


def test_reading_in_two_parts(model: Mllama) -> None:
    whole = model.reply(QUESTION, max_tokens=9).read()
    reply = model.reply(QUESTION, max_tokens=9)
    assert next(reply) + reply.read() == whole
    for piece in reply:
        pytest.fail(piece)


def test_a_closed_reply_has_no_more(model: Mllama) -> None:
    reply = model.reply(QUESTION, max_tokens=50)
    next(reply)
    reply.close()
    reply.close()
    assert reply.read() == ""
    assert reply.finish_reason is None
    unread = model.reply(QUESTION)
    unread.close()
    assert unread.read() == ""
    stream = model.caption(noisy_image(1), stream=True)
    assert isinstance(stream, Reply)


def test_two_threads_read_one_reply(model: Mllama) -> None:
    """The second one gets an error in words; the first one continues. A stream of chunks is the same."""
    inside, go = threading.Event(), threading.Event()
    original = model._conversation.session.feed

    def slow(*args: Any, **more: Any) -> Any:
        inside.set()
        go.wait(20)
        return original(*args, **more)

    for make in (
        lambda: model.reply(QUESTION, max_tokens=4),
        lambda: model.create_chat_completion(QUESTION, max_tokens=4, stream=True),
    ):
        expected, stream = len(list(make())), make()
        inside.clear()
        go.clear()
        read: list[Any] = []
        thread = threading.Thread(target=lambda stream=stream, read=read: read.extend(stream))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model._conversation.session, "feed", slow)
            thread.start()
            assert inside.wait(20)
            try:
                for use in (stream.__next__, stream.close, lambda stream=stream: list(stream)):
                    with pytest.raises(BusyError, match="is being read"):
                        use()
            finally:
                go.set()
                thread.join()
        assert len(read) == expected


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_cancelled_reply(model: Mllama, when: str) -> None:
    expected = model.reply(QUESTION, max_tokens=9).read()
    reply = model.reply(QUESTION, max_tokens=50)
    if when == "between":
        next(reply)
    reply.cancel()
    with pytest.raises(Aborted, match="cancelled"):
        next(reply)
    assert reply.read() == ""
    assert reply.finish_reason is None
    assert model.reply(QUESTION, max_tokens=9).read() == expected  # others are not


@pytest.mark.parametrize("isolate", [False, True])
def test_cancelling_from_another_thread_while_it_computes(slow: Path, isolate: bool) -> None:
    with Mllama(slow, n_ctx=512, n_threads=1, image_cache=False, isolate=isolate) as model:
        reply = model.reply(image=noisy_image(1, 900, 900), max_tokens=2)
        raised: list[Exception] = []

        def read() -> None:
            try:
                reply.read()
            except Exception as e:
                raised.append(e)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.7)
        assert thread.is_alive()
        begin = time.monotonic()
        reply.cancel()
        thread.join(20)
        assert time.monotonic() - begin < STOP_SECONDS
        assert [type(e) for e in raised] == [Aborted]
        assert model.reply(QUESTION, max_tokens=2).read()


def test_a_reply_that_lost_its_conversation(model: Mllama) -> None:
    first = model.reply(QUESTION, max_tokens=50)
    next(first)
    model.reply([{"role": "user", "content": "see"}], max_tokens=2).read()
    with pytest.raises(MllamaError, match="this reply cannot continue: its Mllama was used"):
        first.read()


def test_what_reply_wants(model: Mllama) -> None:
    options = ReplyOptions.checked({"max_tokens": 3})
    assert model.reply(QUESTION, options=options).read() == model.reply(QUESTION, max_tokens=3).read()
    for wrong, words in (
        ({}, "either messages or an image"),
        ({"messages": QUESTION, "image": noisy_image(1)}, "either messages or an image"),
        ({"messages": QUESTION, "options": options, "seed": 1}, "checked options or seed, not both"),
        ({"messages": QUESTION, "n_tokens": 3}, "there is no option 'n_tokens'; there are: max_tokens"),
        ({"messages": []}, "messages is empty"),
    ):
        with pytest.raises(RequestError, match=words):
            model.reply(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(({"max_tokens": n}, "max_tokens must be a whole number") for n in (0, -2, 1.5, True, "9")),
        ({"temperature": -1}, "temperature must be"),
        ({"stop": ""}, "stop must be"),
        ({"seed": "x"}, "seed must be"),
        ({"response_format": {"type": "xml"}}, "response_format type 'xml'"),
        ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "exclude each other"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ReplyOptions.checked(given)


def test_options_and_their_defaults() -> None:
    plain = ReplyOptions.checked({})
    assert (plain.max_tokens, plain.stops, plain.sampling.temperature) == (None, (), 0.0)
    given = ReplyOptions.checked({"max_tokens": -1, "stop": "a", "top_k": 3, "seed": 7})
    assert (given.max_tokens, given.stops) == (None, ("a",))
    assert (given.sampling.top_k, given.sampling.seed) == (3, 7)


def test_a_prompt_of_tokens_is_answered_as_its_messages_are(tiny_files: Files) -> None:
    with LoadedModel(tiny_files("gqa").one, n_ctx=256) as model, model.conversation() as conversation:
        content = [{"type": "image", "image": noisy_image(3)}, {"type": "text", "text": "the dog"}]
        messages = [{"role": "user", "content": content}]
        expected = conversation.reply(messages, max_tokens=9).read()
        tokens, images = conversation.prompt(messages)
        options = ReplyOptions.checked({"max_tokens": 9})
        assert tokens.count(model.image_token_id) == len(images) == 1
        assert conversation.reply_to(tokens, images, options).read() == expected
        with pytest.raises(RequestError, match="image token for each of 0 images"):
            conversation.reply_to(tokens, (), options)
        for wrong in (-1, model.hparams.n_token_embd):
            with pytest.raises(RequestError, match=f"token {wrong} is not in the vocabulary"):
                conversation.reply_to([wrong], (), options)
