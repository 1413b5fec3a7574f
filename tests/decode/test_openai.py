"""Requests as OpenAI's clients write them, and replies in OpenAI's shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import ImageError, Mllama, RequestError
from mllama_gguf.decode.openai import ChatRequest
from mllama_gguf.decode.options import ReplyOptions

Files = Callable[[str], TinyFiles]
QUESTION = [{"role": "user", "content": "the dog"}]
ENDLESS = "root ::= [a-z ] root"

HARMLESS: dict[str, Any] = {
    "model": "gpt-4o-mini",
    "n": 1,
    "user": "u-1",
    "stream_options": {"include_usage": True},
    "tools": None,
    "tool_choice": None,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logprobs": False,
    "top_logprobs": None,
    "logit_bias": {},
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "reasoning_effort": None,
    "seed": None,
    "stop": None,
    "temperature": None,
    "top_p": None,
    "audio": None,
    "tfs_z": 1.0,
    "typical_p": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5.0,
    "echo": False,
    "safety_identifier": "x",
    "prompt_cache_key": "x",
}


def ask(*content: Any) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content
    ]
    return [{"role": "user", "content": parts}]


class TestRequests:
    def test_harmless_values_change_nothing(self, model: Mllama) -> None:
        plain = model.create_chat_completion(QUESTION, max_tokens=5)
        assert model.create_chat_completion(QUESTION, max_tokens=5, **HARMLESS)["choices"] == plain["choices"]
        for name, value in HARMLESS.items():
            with_one = ChatRequest.checked({"messages": QUESTION, name: value})
            assert with_one.options == ReplyOptions.checked({}), name
        others = {name: HARMLESS[name] for name in HARMLESS}
        assert model.caption(noisy_image(1), max_tokens=3, **others)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("functions", [{"name": "f"}]),
            ("function_call", {"name": "f"}),
            ("modalities", ["text", "audio"]),
            ("audio", {"voice": "alloy"}),
            ("prediction", {"type": "content"}),
            ("reasoning_effort", "high"),
            ("web_search_options", {}),
            ("mirostat_mode", 2),
            ("tfs_z", 0.5),
            ("typical_p", True),
            ("echo", True),
            ("echo", 0),
            ("best_of", 2),
            ("logits_processor", np.zeros(3)),
            ("suffix", "x"),
            ("temprature", 1),
            ("n", 0),
            ("n", 9),
            ("n", 1.5),
            ("n", True),
            ("stream", "yes"),
            ("stream_options", True),
            ("stream_options", {"include_usage": "yes"}),
            ("stop", 5),
            ("stop", [5]),
            ("stop", b"x"),
            ("stop", {"x": 1}),
            ("max_tokens", 1.5),
            ("max_completion_tokens", 0),
            ("max_tokens", np.zeros(2)),
            ("logprobs", 5),
            ("response_format", "json"),
        ],
    )
    def test_what_cannot_be_obeyed_is_named(self, name: str, value: Any) -> None:
        with pytest.raises(RequestError) as raised:
            ChatRequest.checked({"messages": QUESTION, name: value})
        named = "max_tokens" if name.startswith("max") else name
        assert named in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("body", [None, [], "x", {1: 2}, {}])
    def test_bodies_of_another_shape(self, body: Any) -> None:
        with pytest.raises(RequestError):
            ChatRequest.checked(body)

    def test_plain_values(self) -> None:
        request = ChatRequest.checked(
            {
                "messages": QUESTION,
                "n": np.int64(2),
                "stream": np.bool_(True),
                "stream_options": {"include_usage": True, "include_obfuscation": False},
                "max_tokens": 9,
                "max_completion_tokens": np.int32(4),
                "stop": ["a", "b"],
            }
        )
        assert (request.n, request.stream, request.include_usage) == (2, True, True)
        assert (request.options.max_tokens, request.options.stops) == (4, ("a", "b"))
        assert ChatRequest.checked({"messages": QUESTION}).include_usage is None
        assert ChatRequest.checked({"messages": QUESTION, "stream_options": {}}).include_usage is False

    def test_one_reply_is_one(self, model: Mllama) -> None:
        for ask_for in (lambda: model.caption(noisy_image(1), n=2), lambda: model.reply(QUESTION, n=2)):
            with pytest.raises(RequestError, match="for n use create_chat_completion or replies"):
                ask_for()


class TestShapes:
    def test_a_completion(self, model: Mllama) -> None:
        reply = model.create_chat_completion(QUESTION, max_tokens=4)
        assert set(reply) == {
            *("id", "object", "created", "model", "system_fingerprint", "choices", "usage", "timings")
        }
        (choice,) = reply["choices"]
        assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
        assert set(choice["message"]) == {"role", "content", "refusal"}
        assert choice["logprobs"] is None

    @pytest.mark.parametrize("include_usage", [True, False])
    def test_chunks(self, model: Mllama, include_usage: bool) -> None:
        chunks = list(
            model.create_chat_completion(
                QUESTION,
                max_tokens=4,
                grammar=ENDLESS,
                stream=True,
                stream_options={"include_usage": include_usage},
            )
        )
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        if include_usage:
            last = chunks.pop()
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 4
            assert last["usage"]["total_tokens"] == 4 + last["usage"]["prompt_tokens"]
            assert all(c["usage"] is None for c in chunks)
        else:
            assert not any("usage" in c or "timings" in c for c in chunks)
        deltas = [c["choices"][0]["delta"] for c in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
        assert all(set(delta) == {"content"} for delta in deltas[1:-1])
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]


class TestSeveral:
    def test_each_has_a_seed_of_its_own(self, model: Mllama) -> None:
        options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "grammar": ENDLESS}
        messages = ask(noisy_image(1), "the dog")
        reply = model.create_chat_completion(messages, n=3, seed=7, **options)
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in reply["choices"]]
        assert len(set(texts)) == 3
        usage = reply["usage"]
        assert usage["completion_tokens"] == 36
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        for i, text in enumerate(texts):
            model.reset()  # the same without the others' caches
            alone = model.create_chat_completion(messages, seed=7 + i, **options)
            assert alone["choices"][0]["message"]["content"] == text
            assert alone["usage"]["prompt_tokens"] == usage["prompt_tokens"]
        # Without a seed they differ too.
        free = model.create_chat_completion(messages, n=4, **options)["choices"]
        assert len({choice["message"]["content"] for choice in free}) > 1

    def test_the_prompt_is_computed_once(self, model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[int] = []
        encoded: list[int] = []
        context = model._conversation.context
        decode, encode = context.decode, context.encode

        def count_tokens(tokens: Any, *more: Any) -> Any:
            decoded.append(len(tokens))
            return decode(tokens, *more)

        def count_images(*arguments: Any) -> Any:
            encoded.append(1)
            return encode(*arguments)

        monkeypatch.setattr(context, "decode", count_tokens)
        monkeypatch.setattr(context, "encode", count_images)
        messages = ask(noisy_image(1), "the dog", noisy_image(2), "the cat")
        options = ReplyOptions.checked({"max_tokens": 3, "grammar": ENDLESS})
        replies = model.replies(messages, n=3, options=options)
        for reply in replies:
            reply.read()
        first, *others = (reply.stats for reply in replies)
        # The last token of each reply needs no step.
        assert sum(decoded) == first.prompt_tokens + 3 * 2
        assert len(encoded) == 2
        assert first.cached_tokens == 0
        assert all(stats.cached_tokens == first.prompt_tokens for stats in others)
        assert all(stats.seconds["encode"] == stats.seconds["prompt"] == 0 for stats in others)

    def test_chunks_have_their_index(self, model: Mllama) -> None:
        options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.5, "seed": 3, "grammar": ENDLESS}
        whole = model.create_chat_completion(QUESTION, n=2, **options)
        chunks = list(
            model.create_chat_completion(
                QUESTION, n=2, stream=True, stream_options={"include_usage": True}, **options
            )
        )
        texts, ends = ["", ""], []
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"]:
                ends.append((choice["index"], choice["finish_reason"]))
        assert texts == [choice["message"]["content"] for choice in whole["choices"]]
        assert ends == [(0, "length"), (1, "length")]
        assert chunks[-1]["usage"]["completion_tokens"] == 12

    def test_in_any_order_and_beside_other_uses(self, model: Mllama) -> None:
        options = ReplyOptions.checked({"max_tokens": 6, "temperature": 1.5, "seed": 3, "grammar": ENDLESS})
        expected = [reply.read() for reply in model.replies(QUESTION, n=3, options=options)]
        replies = model.replies(QUESTION, n=3, options=options)
        assert [reply.read() for reply in reversed(replies)] == expected[::-1]
        replies = model.replies(QUESTION, n=3, options=options)
        read = [replies[0].read()]
        model.caption(noisy_image(3), max_tokens=2)
        read += [replies[1].read()]
        model.reset()
        read += [replies[2].read()]
        assert read == expected

    def test_with_images_that_cannot_be_read(self, model: Mllama) -> None:
        with pytest.raises(ImageError):
            model.create_chat_completion(ask(b"nowhere", "x"), n=2)


class TestLogprobs:
    def options(self, **more: Any) -> dict[str, Any]:
        return {"max_tokens": 8, "logprobs": True, "top_logprobs": 3, **more}

    def test_they_are_of_the_models_logits(self, model: Mllama) -> None:
        messages = ask(noisy_image(1), "the dog")
        (greedy,) = model.create_chat_completion(messages, **self.options())["choices"]
        entries = greedy["logprobs"]["content"]
        assert greedy["logprobs"]["refusal"] is None
        assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in entries)
        text = b"".join(bytes(one["bytes"]) for one in entries).decode("utf-8", "replace")
        assert text.startswith(greedy["message"]["content"])
        # Temperature, penalties, bias and grammar change the choice, not what the model found likely.
        model.reset()
        changed = self.options(temperature=2.0, seed=5, grammar=ENDLESS, frequency_penalty=1.0)
        (other,) = model.create_chat_completion(messages, **changed)["choices"]
        assert other["logprobs"]["content"][0]["top_logprobs"] == entries[0]["top_logprobs"]
        json.dumps(other, allow_nan=False)

    def test_one_entry_a_token(self, model: Mllama) -> None:
        for grammar in (ENDLESS, 'root ::= "ß☃😀" more\nmore ::= [a-z ] more'):
            reply = model.create_chat_completion(QUESTION, **self.options(grammar=grammar, max_tokens=9))
            entries = reply["choices"][0]["logprobs"]["content"]
            assert len(entries) == reply["usage"]["completion_tokens"] == 9
            assert all(len(one["top_logprobs"]) == 3 for one in entries)

    def test_without_top(self, model: Mllama) -> None:
        (choice,) = model.create_chat_completion(QUESTION, max_tokens=3, logprobs=True)["choices"]
        assert [one["top_logprobs"] for one in choice["logprobs"]["content"]] == [[], [], []]

    @pytest.mark.parametrize("stop", [None, "ab", "b a"])
    def test_chunks_carry_those_of_their_text(self, model: Mllama, stop: str | None) -> None:
        options = self.options(grammar="root ::= [ab ] root", max_tokens=30, stop=stop)
        options |= {"temperature": 1.5, "seed": 1}
        whole = model.create_chat_completion(QUESTION, **options)["choices"][0]
        entries, text = [], ""
        model.reset()
        for chunk in model.create_chat_completion(QUESTION, stream=True, **options):
            (choice,) = chunk["choices"]
            entries += choice["logprobs"]["content"] if choice["logprobs"] else []
            text += choice["delta"].get("content", "")
            said = b"".join(bytes(one["bytes"]) for one in entries).decode()
            assert said.startswith(text)  # no text comes before its tokens
        assert (entries, text) == (whole["logprobs"]["content"], whole["message"]["content"])
        if stop is not None:
            assert whole["finish_reason"] == "stop"
        # Of a stop string nothing is told but the rest of a token that begins before it.
        assert len(said) - len(text) < max([len(one["bytes"]) for one in entries], default=1)

    def test_a_reply_object(self, model: Mllama) -> None:
        reply = model.reply(QUESTION, max_tokens=4, grammar=ENDLESS, logprobs=True)
        assert len(reply.logprobs) == 0
        next(reply)
        assert len(reply.logprobs) >= 1
        reply.read()
        assert len(reply.logprobs) == 4
        assert model.reply(QUESTION, max_tokens=2).logprobs == []
