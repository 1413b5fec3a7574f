"""Which token sees which image, and how much of a prompt is in the cache."""

from __future__ import annotations

import random

import pytest

from mllama_gguf.decode.runs import Run, common_prefix, drop_first, split_runs, visible_keys

IMAGE = 99


def runs(*tokens: int) -> list[tuple[list[int], list[int], int]]:
    return [(list(r.tokens), list(r.group), r.n_visible) for r in split_runs(tokens, IMAGE)]


def test_text_alone_sees_nothing() -> None:
    assert runs(1, 2, 3) == [([1, 2, 3], [], 0)]
    assert runs() == []


def test_text_before_an_image_sees_nothing_and_after_it_the_image() -> None:
    assert runs(1, 2, IMAGE, 3, 4) == [([1, 2], [], 0), ([IMAGE, 3, 4], [0], 1)]
    assert runs(IMAGE, 3) == [([IMAGE, 3], [0], 1)]
    assert runs(1, IMAGE) == [([1], [], 0), ([IMAGE], [0], 1)]


def test_text_sees_the_last_image_only() -> None:
    assert runs(1, IMAGE, 2, IMAGE, 3) == [([1], [], 0), ([IMAGE, 2], [0], 1), ([IMAGE, 3], [1], 1)]


def test_adjacent_images_are_a_group() -> None:
    assert runs(1, IMAGE, IMAGE, IMAGE, 2, 3) == [
        ([1], [], 0),
        ([IMAGE], [0, 1, 2], 1),
        ([IMAGE], [0, 1, 2], 2),
        ([IMAGE, 2, 3], [0, 1, 2], 3),
    ]
    assert runs(IMAGE, IMAGE, 2, IMAGE, 3, IMAGE, IMAGE) == [
        ([IMAGE], [0, 1], 1),
        ([IMAGE, 2], [0, 1], 2),
        ([IMAGE, 3], [2], 1),
        ([IMAGE], [3, 4], 1),
        ([IMAGE], [3, 4], 2),
    ]


def seen_by_the_rules(tokens: list[int], keys: list[str]) -> list[tuple[str, ...]]:
    """The same, token by token, in another way."""
    seen = []
    for i in range(len(tokens)):
        last = max((j for j in range(i + 1) if tokens[j] == IMAGE), default=None)
        if last is None:
            seen.append(())
            continue
        first = last
        while first > 0 and tokens[first - 1] == IMAGE:
            first -= 1
        before = tokens[:first].count(IMAGE)
        seen.append(tuple(keys[before : before + last - first + 1]))
    return seen


@pytest.mark.parametrize("seed", range(50))
def test_runs_join_to_the_prompt_and_follow_the_rules(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [IMAGE if rng.random() < 0.4 else rng.randrange(5) for _ in range(rng.randrange(1, 20))]
    keys = [f"image {i % 3}" for i in range(tokens.count(IMAGE))]
    made = split_runs(tokens, IMAGE)
    assert [t for run in made for t in run.tokens] == tokens
    assert all(run.tokens and run.n_visible <= len(run.group) for run in made)
    assert visible_keys(made, keys) == seen_by_the_rules(tokens, keys)
    for n in range(len(tokens) + 1):
        rest = drop_first(made, n)
        assert [t for run in rest for t in run.tokens] == tokens[n:]
        assert visible_keys(rest, keys) == seen_by_the_rules(tokens, keys)[n:]


def test_drop_first_keeps_what_a_run_sees() -> None:
    assert drop_first(split_runs([1, IMAGE, 2, 3], IMAGE), 3) == [Run((3,), range(1), 1)]


def test_common_prefix_counts_a_token_only_with_its_images() -> None:
    def prefix(a: list[int], a_keys: list[str], b: list[int], b_keys: list[str]) -> int:
        return common_prefix(a, seen_by_the_rules(a, a_keys), b, seen_by_the_rules(b, b_keys))

    conversation = [1, IMAGE, 2, 3]
    assert prefix(conversation, ["cat"], [1, IMAGE, 2, 4], ["cat"]) == 3
    assert prefix(conversation, ["cat"], [1, IMAGE, 2, 4], ["dog"]) == 1
    assert prefix(conversation, ["cat"], conversation, ["cat"]) == 4
    assert prefix([], [], conversation, ["cat"]) == 0
    # The first token of a pair saw the first image, as it does alone.
    assert prefix(conversation, ["cat"], [1, IMAGE, IMAGE, 2], ["cat", "dog"]) == 2
    assert prefix([1, IMAGE, IMAGE, 2], ["cat", "dog"], [1, IMAGE, IMAGE, 2], ["cat", "cow"]) == 2
