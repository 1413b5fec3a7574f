"""Translations between the shapes of the APIs and the package, without a server and without a model."""

from __future__ import annotations

import base64
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from mllama_gguf.server import ollama_requests, openai_requests, responses
from mllama_gguf.server.asking import _old, _options, fewest
from mllama_gguf.server.contexts import to_key, to_words
from mllama_gguf.server.images import ImageLimits
from mllama_gguf.server.ollama_requests import chat, format_of, generate
from mllama_gguf.server.problems import Refused, clean
from mllama_gguf.server.replies import to_bytes
from mllama_gguf.server.times import expiry, nanoseconds, parse_duration, rfc3339
from mllama_gguf.store.defaults import Defaults

LIMITS = ImageLimits()
ONE, TWO = b"\x89PNG\r\n\x1a\n1", b"\x89PNG\r\n\x1a\n2"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def parts(content: str, *images: bytes) -> list[Any]:
    """What a message of Ollama's becomes: texts, and the bytes of images."""
    message = {"role": "user", "content": content, "images": [b64(image) for image in images]}
    ask = chat({"model": "m", "messages": [message]}, LIMITS).ask
    assert ask is not None
    return [part.get("text", part.get("image")) for part in ask.messages[0]["content"]]


def test_images_stand_where_the_text_says() -> None:
    assert parts("x") == ["x"]
    assert parts("x", ONE) == [ONE, "x"]
    assert parts("x", ONE, TWO) == [ONE, TWO, "x"]
    assert parts("a [img] b [img] c", ONE, TWO) == ["a ", ONE, " b ", TWO, " c"]
    assert parts("a [img-1] b [img-0]", ONE, TWO) == ["a ", TWO, " b ", ONE]
    assert parts("a [img-1]", ONE, TWO) == [ONE, "a ", TWO]
    assert parts("a [img-7] [img]", ONE) == ["a [img-7] ", ONE]
    assert parts("[img] [img]", ONE) == [ONE, " [img]"]
    assert parts("[img]") == ["[img]"]
    assert parts("", ONE) == [ONE]


def test_messages_of_one_role_are_one() -> None:
    talk = [("user", "a"), ("user", "b"), ("assistant", "c"), ("USER", "d"), ("tool", "e"), ("tool", "f")]
    messages = [{"role": role, "content": content} for role, content in talk]
    ask = chat({"model": "m", "messages": messages}, LIMITS).ask
    assert ask is not None
    found = [(one["role"], "".join(part["text"] for part in one["content"])) for one in ask.messages]
    assert found == [("user", "a\n\nb"), ("assistant", "c"), ("user", "d"), ("tool", "e"), ("tool", "f")]
    calls = [{"function": {"name": "paint", "arguments": {}}}]
    messages = [
        {"role": "assistant", "content": "I paint."},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    ask = chat({"model": "m", "messages": messages}, LIMITS).ask
    assert ask is not None and [len(one["tool_calls"]) for one in ask.messages] == [1]


def test_many_messages_of_one_role() -> None:
    """They are read where all clients are served: no message may cost more than the one before."""
    messages = [{"role": "user", "content": ""}] * 60_000
    responses_input = [{"role": "user", "content": [{"type": "input_text", "text": ""}]}] * 60_000
    start = time.process_time()
    ask = chat({"model": "m", "messages": messages}, LIMITS).ask
    assert ask is not None and len(ask.messages[0]["content"]) == 2 * 60_000 - 1
    openai_requests.chat({"model": "m", "messages": messages}, LIMITS, allow_gbnf=False)
    responses.request({"model": "m", "input": responses_input}, LIMITS, allow_gbnf=False)
    assert time.process_time() - start < 10


def test_options() -> None:
    def options(**given: Any) -> dict[str, Any]:
        ask = generate({"model": "m", "prompt": "x", "options": given}, LIMITS).ask
        assert ask is not None
        return dict(ask.options)

    assert options() == {}
    assert options(temperature=None, num_gpu=99, unknown=[1]) == {}
    assert options(temperature=-1, top_p=7, min_p=-2, top_k=-1) == {
        "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0,
    }  # fmt: skip
    assert options(seed=0) == {"seed": 0} and options(seed=-1) == {"seed": None}
    assert options(num_predict=5.0) == {"max_tokens": 5}
    assert options(num_predict=-1) == options(num_predict=-2) == {"max_tokens": None}
    assert options(stop="x") == options(stop=["x", ""]) == {"stop": ["x"]}
    for wrong in ({"seed": 1.5}, {"stop": 5}, {"stop": [5]}, {"top_k": True}, {"seed": 1 << 80}):
        with pytest.raises(Refused):
            options(**wrong)


def test_a_limit_of_the_context_is_soft() -> None:
    ask = generate({"model": "m", "prompt": "x", "options": {"num_ctx": 131072.0}}, LIMITS).ask
    assert ask is not None and ask.n_ctx == 131072
    assert generate({"model": "m", "prompt": "x", "options": {"num_ctx": 0}}, LIMITS).ask.n_ctx is None  # type: ignore[union-attr]


def test_a_request_without_a_prompt_loads() -> None:
    assert chat({"model": "m"}, LIMITS).ask is None
    assert generate({"name": "m", "keep_alive": 0}, LIMITS).keep_alive == 0
    assert generate({"model": "m", "context": [1, 2]}, LIMITS).ask is None
    assert generate({"model": "m", "prompt": "", "context": [1], "keep_alive": 0}, LIMITS).ask is None
    with_image = {"model": "m", "prompt": "", "images": [b64(ONE)]}
    for keep_alive, computes in ((None, True), ("5m", True), (0, False), ("0s", False)):
        for more in ({}, {"context": [1]}, {"raw": True}):
            wish = generate({**with_image, "keep_alive": keep_alive, **more}, LIMITS)
            assert (wish.ask is not None) == computes


def test_formats() -> None:
    assert format_of(None) is format_of("") is None
    assert format_of("json") == {"type": "json_object"}
    assert format_of({"type": "object"}) == {
        "type": "json_schema", "json_schema": {"schema": {"type": "object"}},
    }  # fmt: skip
    for wrong in ("xml", 5, ["json"], True):
        with pytest.raises(Refused, match="invalid format"):
            format_of(wrong)


def test_raw_prompts() -> None:
    raw = ollama_requests._raw
    assert raw("x", 0) == "x" and raw("[img-0]", 0) == "[img-0]"
    assert raw("x", 2) == "<|image|><|image|>x"
    assert raw("a [img-0] b", 1) == "a <|image|> b"
    assert raw("a <|image|> b", 1) == "a <|image|> b"
    assert raw("[img][img]", 1) == "<|image|>"


def test_the_oldest_messages() -> None:
    def old(*roles: str) -> list[int]:
        return _old([{"role": role, "content": "x"} for role in roles])

    assert old("user") == old("system", "user") == old("user", "assistant") == []
    assert old("user", "assistant", "user") == [0, 1]
    assert old("system", "user", "assistant", "system", "user") == [1, 2]
    assert old("system", "user", "user", "assistant") == [1]


def test_few_conversations_are_tried() -> None:
    """Each is rendered and tokenized as a whole: one for each of thousands of messages would take hours."""
    for most in (1, 2, 3, 7, 20_000):
        for least in {1, 2, most // 3, most - 1, most, most + 1} - {0}:
            tried: list[int] = []

            def fits(n: int, least: int = least, tried: list[int] = tried) -> bool:
                tried.append(n)
                return n >= least

            assert fewest(most, fits) == min(least, most)
            assert len(tried) <= 2 * most.bit_length() and all(1 <= n <= most for n in tried)


def test_parameters_of_openai() -> None:
    def ask(**more: Any) -> Any:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **more}
        return openai_requests.chat(body, LIMITS, allow_gbnf=False).ask

    assert ask().fallback["temperature"] == 1.0 and ask().not_own == {"temperature", "top_p"}
    assert ask(max_completion_tokens=3, max_tokens=9).options == {"max_tokens": 3}
    assert ask(temperature=None, user="u", what=1).options == {}
    assert ask(stop=["", "x"]).options == {"stop": ["x"]}
    assert ask(n=2.0).n == 2
    assert ask(top_k=-1).options == {"top_k": 0}
    said = {"role": "assistant", "content": None, "refusal": "No."}
    assert ask(messages=[said]).messages == [{"role": "assistant", "content": "No."}]


def test_options_of_the_model() -> None:
    """Request over model over API; but OpenAI's temperature and top_p are always its own."""
    own = {
        "temperature": 0.1, "top_p": 0.2, "top_k": 3, "min_p": 0.4, "seed": 5, "stop": ("six",),
        "max_tokens": 7,
    }  # fmt: skip
    loaded: Any = SimpleNamespace(model=SimpleNamespace(defaults=Defaults(options=own)))
    bare: Any = SimpleNamespace(model=SimpleNamespace(defaults=Defaults()))
    talk = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    text = {"model": "m", "prompt": "x"}

    def found(api: Any, body: Any, loaded: Any = loaded, **more: Any) -> tuple[Any, ...]:
        named = {} if api in (chat, generate) else {"allow_gbnf": False}
        options = _options(api({**body, **more}, LIMITS, **named).ask, loaded)
        s = options.sampling
        return s.temperature, s.top_p, s.top_k, s.min_p, s.seed, options.stops, options.max_tokens

    for api, body in (
        (openai_requests.chat, talk), (openai_requests.completion, text),
        (responses.request, {"model": "m", "input": "x"}),
    ):  # fmt: skip
        assert found(api, body) == (1.0, 1.0, 3, 0.4, 5, ("six",), 7)
        assert found(api, body, temperature=0.5, top_p=0.6, seed=8)[:5] == (0.5, 0.6, 3, 0.4, 8)
    assert found(openai_requests.chat, talk, stop=[])[5] == ()
    assert found(openai_requests.chat, talk, stop="y", max_tokens=9)[5:] == (("y",), 9)
    assert found(openai_requests.completion, text, bare) == (1.0, 1.0, 0, 0.0, None, (), 16)
    assert found(chat, talk) == found(generate, text) == (0.1, 0.2, 3, 0.4, 5, ("six",), 7)
    assert found(chat, talk, options={"seed": -1})[4] is None
    assert found(generate, text, options={"seed": 0, "num_predict": -1})[4:] == (0, ("six",), None)


def test_input_of_responses() -> None:
    def messages(given: Any, **more: Any) -> list[Any]:
        return list(
            responses.request({"model": "m", "input": given, **more}, LIMITS, allow_gbnf=False).ask.messages
        )

    assert messages("x", instructions="y") == [
        {"role": "system", "content": "y"}, {"role": "user", "content": "x"},
    ]  # fmt: skip
    talk = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
    ]
    assert messages(talk)[1] == {"role": "assistant", "content": [{"type": "text", "text": "b"}]}


def test_durations() -> None:
    for words, seconds in (
        (5, 5.0), (0.5, 0.5), ("5m", 300.0), ("1h30m", 5400.0), ("300", 300.0), ("1.5s", 1.5),
        ("250ms", 0.25),
        ("0", 0.0), ("0s", 0.0), ("+1m", 60.0), ("24h", 86400.0), (-1, math.inf), ("-1", math.inf),
        ("-1m", math.inf), ("99999999h", math.inf), (1e300, math.inf), (0, 0.0),
    ):  # fmt: skip
        assert parse_duration(words) == seconds, words
    for wrong in ("", "m", "5 m", "5x", "--5m", "1e5", "five", True, None, [], math.nan, "5m5", "\u0665m"):
        with pytest.raises(ValueError):
            parse_duration(wrong)


def test_dates() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000000Z"
    assert expiry(0, 5.5) == "1970-01-01T00:00:05.500000+00:00"
    assert nanoseconds(1.5) == 1_500_000_000 and nanoseconds(-1) == 0


def test_keys_in_a_context() -> None:
    key = "0123456789abcdef" * 4
    assert to_key(to_words(key)) == key and len(to_words(key)) == 8
    for wrong in ([], [1] * 7, [1] * 9, [-1] * 8, [1 << 32] * 8):
        with pytest.raises(ValueError):
            to_key(wrong)


def test_words_of_errors() -> None:
    for words, expected in (
        ("/home/me/models/x.gguf: is cut short", "x.gguf: is cut short"),
        ("x.gguf and /a/b.gguf", "x.gguf and b.gguf"),
        ("object at 0x7f0011223344 failed", "object  failed"),
        ("token 0x1f", "token 0x1f"),
        ("at http://example.org/a/b", "at http://example.org/a/b"),
        ("3/4 of it, a/b", "3/4 of it, a/b"),
        ("~/models/x.gguf", "x.gguf"),
    ):
        assert clean(words) == expected


def test_half_a_surrogate_pair_is_written() -> None:
    assert to_bytes({"a": "é"}) == '{"a":"é"}'.encode()
    assert to_bytes({"a": "\ud800"}) == b'{"a":"\\ud800"}'
