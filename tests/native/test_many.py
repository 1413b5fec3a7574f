"""Several sequences in one step: each computes what it computes alone, whatever the others do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tiny
from golden_cases import cases, position_errors
from helpers import TinyFiles
from together import N_BATCH, TOLERANCE, Runner, run_together

from mllama_gguf import ContextFullError, ModelError, RequestError
from mllama_gguf.backend.base import Item

Files = Callable[[str], TinyFiles]


@pytest.fixture(scope="module", params=["", "off"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLAMA_CPU_KERNEL", request.param)
        yield request.param


@pytest.fixture(scope="module", params=tiny.ARCHS)
def runner(request: pytest.FixtureRequest, tiny_files: Files, kernel: str) -> Iterator[Runner]:
    made = Runner(tiny_files(request.param), n_threads=2)
    yield made
    made.close()


@pytest.mark.parametrize(("seed", "n"), [(0, 3), (1, 16)])
def test_every_mix_computes_what_each_computes_alone(runner: Runner, seed: int, n: int) -> None:
    choice = random.Random(seed)
    prompts = [choice.choice(cases(runner.arch)) for _ in range(n)]
    for one in run_together(runner, prompts, seed, 6):
        expected, greedy = runner.alone(one.case, 6)
        errors = position_errors(np.concatenate(one.rows), expected)
        assert errors.max() <= TOLERANCE, f"{one.case.name}: {errors.max():.1e} at {errors.argmax()}"
        assert one.greedy == greedy


@pytest.mark.parametrize("flash_attn", [True, False])
def test_kinds_of_attention_and_caches(tiny_files: Files, flash_attn: bool) -> None:
    """F16 caches round more, but each the same."""
    runner = Runner(tiny_files("gqa"), flash_attn=flash_attn, type_k="f16", type_v="f16", n_threads=1)
    for one in run_together(runner, cases(runner.arch), 1, 4):
        expected, _ = runner.alone(one.case, 0)
        errors = position_errors(np.concatenate(one.rows)[: len(expected)], expected)
        assert errors.max() <= 2e-3
    runner.close()


def test_a_single_sequence_is_the_context_bit_for_bit(tiny_files: Files) -> None:
    runner = Runner(tiny_files("wide"))
    context = runner.context
    for case in cases(runner.arch)[:5]:
        number = context.sequence_new(0)
        context.truncate(0)
        for run in runner.runs(case):
            slot = runner.slot(case, run.group)
            for at in range(0, len(run.tokens), N_BATCH):
                tokens = run.tokens[at : at + N_BATCH]
                (rows,) = context.decode_many([Item(number, tokens, slot, run.n_visible, "all")])
                assert not isinstance(rows, ModelError)
                np.testing.assert_array_equal(rows, context.decode(tokens, slot, run.n_visible, "all"))
        context.sequence_free(number)
    runner.close()


def test_memory_follows_the_tokens(tiny_files: Files) -> None:
    runner = Runner(tiny_files("gqa"), n_ctx=1)
    context, before = runner.context, runner.context.memory().self_kv
    numbers = [context.sequence_new(512) for _ in range(3)]
    grown = context.memory().self_kv - before
    context.decode_many([Item(numbers[0], [3] * 90, -1, 0) for _ in range(1)])
    assert context.memory().self_kv - before == grown
    for _ in range(4):
        context.decode_many([Item(numbers[0], [3] * 90, -1, 0)])
    assert context.memory().self_kv - before > grown
    for number in numbers:
        context.sequence_free(number)
    assert context.memory().self_kv == before
    runner.close()


def test_the_way_of_tokens_into_another_sequence(tiny_files: Files) -> None:
    runner = Runner(tiny_files("gqa"))
    context = runner.context
    a, b = context.sequence_new(512), context.sequence_new(512)
    tokens = list(range(3, 40)) * 9
    for at in range(0, len(tokens), 37):
        context.decode_many([Item(a, tokens[at : at + 37], -1, 0)])
    context.sequence_prefix_kv_set(b, len(tokens), context.sequence_prefix_kv_get(a, len(tokens)))
    assert context.sequence_n_past(b) == len(tokens)
    one, other = context.decode_many([Item(a, [5], -1, 0), Item(b, [5], -1, 0)])
    np.testing.assert_array_equal(one, other)
    context.sequence_truncate(a, 10)
    assert context.sequence_n_past(a) == 10
    runner.close()


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        ([(9, [3], -1, 0)], RequestError, "no sequence 9"),
        ([(1, [3], -1, 0), (1, [3], -1, 0)], RequestError, "sequence 1 is in two items"),
        ([(1, [], -1, 0)], RequestError, "no tokens"),
        ([(1, [10**6], -1, 0)], RequestError, "not in the vocabulary"),
        ([(1, [-1], -1, 0)], RequestError, "not in the vocabulary"),
        ([(1, [3], 7, 1)], RequestError, "no image in slot 7"),
        ([(1, [3] * 60, -1, 0), (2, [3] * 60, -1, 0)], RequestError, "120 tokens in one step; n_batch is 96"),
        ([(3, [3] * 11, -1, 0)], ContextFullError, "do not fit n_ctx 10"),
        ([], RequestError, "0 items"),
    ],
)  # fmt: skip
def test_wrong_items(
    tiny_files: Files, items: list[tuple[int, list[int], int, int]], error: type[Exception], words: str
) -> None:
    runner = Runner(tiny_files("gqa"))
    context = runner.context
    assert [context.sequence_new(n) for n in (512, 512, 10)] == [1, 2, 3]
    context.decode_many([Item(1, [3, 4], -1, 0)])
    with pytest.raises(error, match=words):
        context.decode_many([Item(*item) for item in items])
    assert context.sequence_n_past(1) == 2
    with pytest.raises(RequestError):
        context.sequence_free(0)
    with pytest.raises(RequestError):
        context.sequence_new(10**9)
    runner.close()


def test_many_sequences(tiny_files: Files) -> None:
    runner = Runner(tiny_files("gqa"), n_batch=300)
    context = runner.context
    numbers = [context.sequence_new(64) for _ in range(255)]
    with pytest.raises(RequestError, match="256 sequences at most"):
        context.sequence_new(64)
    rows = context.decode_many([Item(number, [3 + number % 50], -1, 0) for number in numbers])
    (alone,) = context.decode([3 + numbers[200] % 50], -1, 0)
    assert position_errors(np.stack([rows[200][0]]), np.stack([alone])).max() <= TOLERANCE
    runner.close()
