"""Which token sees which image, and what of a prompt is in the caches already. Plain arithmetic, no model.

The rules, which are Meta's: an image's token sees its image; text sees the last image before it;
images whose
tokens stand directly side by side form a group: the j-th token of the group sees its first j images, text
after the group sees all of them; text before the first image sees none, and the cross-attention layers are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Consecutive tokens that see the same images, so that one call can decode them.

    tokens:    token ids
    group:     indices of the images of the group, counted over the prompt; empty before the first image
    n_visible: how many of the group the tokens see
    """

    tokens: tuple[int, ...]
    group: range
    n_visible: int


def split_runs(tokens: Sequence[int], image_token_id: int) -> list[Run]:
    """Cut a prompt into runs. The images are counted by their tokens, from 0."""
    spans: list[tuple[int, int, int, int]] = []  # first token, end, first image of the group, visible ones
    start, first, n_visible = 0, 0, 0  # of the span that is growing
    in_group = False  # the token before was an image's
    for i, token in enumerate(tokens):
        if token == image_token_id:
            if i > start:
                spans.append((start, i, first, n_visible))
            start = i
            first, n_visible = (first, n_visible + 1) if in_group else (first + n_visible, 1)
        in_group = token == image_token_id
    if len(tokens) > start:
        spans.append((start, len(tokens), first, n_visible))
    sizes: dict[int, int] = {}  # of the groups, by their first image
    for _, _, group, visible in spans:
        sizes[group] = max(visible, sizes.get(group, 0))
    return [
        Run(tuple(tokens[begin:end]), range(group, group + sizes[group]) if visible else range(0), visible)
        for begin, end, group, visible in spans
    ]


def visible_keys(runs: Sequence[Run], image_keys: Sequence[str]) -> list[tuple[str, ...]]:
    """For every token of the prompt the keys of the images that it sees."""
    seen = []
    for run in runs:
        keys = tuple(image_keys[i] for i in run.group[: run.n_visible])
        seen.extend([keys] * len(run.tokens))
    return seen


def common_prefix(
    cached_tokens: Sequence[int],
    cached_seen: Sequence[tuple[str, ...]],
    tokens: Sequence[int],
    seen: Sequence[tuple[str, ...]],
) -> int:
    """How many first tokens of a prompt are in the cache: same token, same images in view."""
    longest = min(len(cached_tokens), len(tokens))
    for n in range(longest):
        if cached_tokens[n] != tokens[n] or cached_seen[n] != seen[n]:
            return n
    return longest


def drop_first(runs: Sequence[Run], n: int) -> list[Run]:
    """The runs without the first n tokens."""
    rest = []
    for run in runs:
        if n < len(run.tokens):
            rest.append(Run(run.tokens[n:], run.group, run.n_visible))
        n = max(0, n - len(run.tokens))
    return rest
