"""Chat templates that are meant to do harm. They come with a model's file."""

from __future__ import annotations

import sys
import time

import pytest

from mllama_gguf.errors import ContextFullError, MllamaError, ModelError, RequestError
from mllama_gguf.text import sandbox
from mllama_gguf.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "the apple"}]


def render(template: str) -> str:
    made = ChatTemplate(template, bos="<s>", eos="</s>", image="<|image|>")
    return made.render(MESSAGES).text


LOOP = "{% for a in range(99999) %}"
GROWING = "{% set n = namespace(x='aaaaaaaaaaaaaaaa', l=[1]) %}{% for i in range(60) %}"


@pytest.mark.parametrize(
    "template",
    [
        LOOP * 3 + "{% endfor %}" * 3,
        LOOP * 3 + "x" + "{% endfor %}" * 3,
        LOOP + "{% set s = a %}" + LOOP.replace("a in", "b in") + "{% set t = b %}" + "{% endfor %}" * 2,
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for a in [1] recursive %}{{ loop([a]) }}{% endfor %}",
        "{% for a in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ ['x'] * 10**10 }}",
        "{{ 10**(10**10) }}",
        "{{ 9**(9**(9**9)) }}",
        "{{ (2**4000) * (2**4000) }}",
        GROWING + "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        GROWING + "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        GROWING + "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}{{ n.x }}",
        GROWING + "{% set n.x = n.x | replace('a', n.x) %}{% endfor %}{{ n.x }}",
        GROWING + "{% set n.x = n.x.join([n.x, n.x, n.x]) %}{% endfor %}{{ n.x }}",
        GROWING + "{% set n.x = [n.x, n.x, n.x] | join(n.x) %}{% endfor %}{{ n.x }}",
        GROWING + "{% set n.l = [n.l, n.l, n.l, n.l] %}{% endfor %}{{ n.l }}",
        GROWING + "{% set n.l = [n.l, n.l, n.l, n.l] %}{% endfor %}{{ n.l | tojson }}",
        GROWING + "{% set n.l = [n.l, n.l, n.l, n.l] %}{% endfor %}{{ n.l | string }}",
        GROWING + "{% set n.l = n.l + n.l %}{% endfor %}{{ n.l | length }}",
        GROWING + "{% set n.x = '%s%s%s' % (n.x, n.x, n.x) %}{% endfor %}",
        GROWING + "{% set n.x = '{0}{0}{0}'.format(n.x) %}{% endfor %}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ 'x'.center(999999999) }}",
        "{{ 'x' | center(999999999) }}",
        "{{ 'x'.zfill(999999999) }}",
        "{{ ('x\\n' * 9999) | indent(99999) }}",
        "{{ [1] | batch(999999999, 2) | list }}",
        "{{ [1] | slice(999999999) | list }}",
        "{{ messages | tojson(indent=99999999) }}",
        "{{ lipsum(999999) }}",
        "{{ 'a'.translate({97: 'b' * 99999}) }}",
        "{{ messages.__class__.__mro__ }}",
        "{% set x = '' " + "~ ('a' * 1000000)" * 100 + " %}{{ x }}",
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{{ 1 " + "+ 1" * 30_000 + " }}",
        "x" * 2_000_000,
    ],
    ids=lambda template: template[:60],
)
def test_a_hostile_template_is_an_error(template: str) -> None:
    start = time.process_time()
    with pytest.raises(MllamaError, match="chat template") as raised:
        render(template)
    assert time.process_time() - start < 20
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert sys.gettrace() is None or "count" not in repr(sys.gettrace())


def test_what_is_endless_or_too_large_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="does not come to an end"):
        render(LOOP * 3 + "{% endfor %}" * 3)
    with pytest.raises(ModelError, match="too large"):
        render("{{ 'x' * 10**9 }}")


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{% for p in m.content %}x{% endfor %}{% endfor %}"]
)
def test_a_conversation_that_is_too_long_is_the_callers_fault(
    template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would load a model again that is at fault."""
    made = ChatTemplate(template, bos="<s>", eos="</s>", image="<|image|>")
    monkeypatch.setattr(sandbox, "MAX_LINES", 5000)
    made.render(MESSAGES)
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": b""}] * 10
    for messages in (MESSAGES * 10_000, [{"role": "user", "content": parts}] * 1000):
        with pytest.raises(RequestError, match="too much for the chat template") as raised:
            made.render(messages)
        assert isinstance(raised.value, ContextFullError)  # the server's word for it


def test_a_variable_that_is_too_large_is_the_callers_fault() -> None:
    made = ChatTemplate("{{ 'ab' * n }}", bos="<s>", eos="</s>", image="<|image|>")
    with pytest.raises(RequestError, match="too large"):
        made.render(MESSAGES, variables={"n": 10**9})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'ab' * 3 }}{{ 2**10 }}{{ '%s-%02d' % ('a', 7) }}", "ababab1024a-07"),
        ("{{ 'a' ~ 1 ~ none ~ [2] }}", "a1None[2]"),
        ("{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['a', 'b']) }}", "a, ba, b"),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'a-b' | replace('-', '+') }}", "a+ba+b"),
        ("{{ ' x '.strip() | upper }}{{ 'ab' | center(6) }}{{ '{:>4}'.format(1) }}", "X  ab     1"),
        ("{{ {'a': [1, 'é']} | tojson }}{{ [1] | tojson(indent=2) }}", '{"a": [1, "é"]}[\n  1\n]'),
        ("{{ [3, 1] | sort | first }}{{ [1, 2] | sum }}{{ 'a\nb' | indent(2) }}", "13a\n  b"),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ (1.5) | round(1) }}", "[[1, 2], [3]]1.5"),
        ("{% for a in range(3) %}{{ loop.index }}{{ a }};{% endfor %}", "10;21;32;"),
    ],
)
def test_templates_work_as_ever(template: str, text: str) -> None:
    assert render(template) == text


def test_a_long_chat_is_far_from_the_bounds() -> None:
    messages = [
        {"role": role, "content": [{"type": "text", "text": "word " * 200}]}
        for _ in range(1000)
        for role in ("user", "assistant")
    ]
    made = ChatTemplate(None, bos="<s>", eos="</s>", image="<|image|>")
    assert made.render(messages[:-1]).text.count("word") == 1999 * 200
