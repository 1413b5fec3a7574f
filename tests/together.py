"""For tests of sequences that compute together: each against itself alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from golden_cases import Case, tiled
from helpers import TinyFiles

from mllama_gguf import LoadedModel, MllamaError
from mllama_gguf.backend.base import Item, SharedContext
from mllama_gguf.backend.callbacks import Callbacks
from mllama_gguf.backend.library import load
from mllama_gguf.decode.runs import Run, split_runs

F32 = npt.NDArray[np.float32]
# In a step with others, sums are taken in another order. Past some hundred tokens that is 2e-6 already alone.
TOLERANCE = 1e-5
N_BATCH = 96


class Runner:
    """A context, and the slots of the groups of images that were needed so far."""

    def __init__(self, files: TinyFiles, **settings: Any) -> None:
        self.arch = files.arch
        exact = {"type_k": "f32", "type_v": "f32", "n_ctx": 512, "n_batch": N_BATCH, "image_cache": False}
        self.model = LoadedModel(files.text, files.mmproj, **{**exact, **settings})
        self.context: SharedContext = self.model._backend.open_context(Callbacks(load()))
        self._slots: dict[tuple[object, ...], int] = {}
        self._alone: dict[tuple[str, int], tuple[F32, list[int]]] = {}

    def close(self) -> None:
        self.context.close()
        self.model.close()

    def slot(self, case: Case, group: Sequence[int]) -> int:
        if not group:
            return -1
        key = tuple(case.images[i] for i in group)
        if key not in self._slots:
            states = []
            for image in key:
                tiles = tiled(self.arch, image)
                states.append(self.context.encode(tiles.pixels[: tiles.n_tiles], tiles.aspect_ratio_id))
            self._slots[key] = self.context.image_fill(states)
        return self._slots[key]

    def runs(self, case: Case) -> list[Run]:
        return split_runs(case.tokens, self.arch.image_token)

    def alone(self, case: Case, n_greedy: int) -> tuple[F32, list[int]]:
        """The logits at each position of a prompt, and the tokens that follow."""
        if (case.name, n_greedy) not in self._alone:
            self._alone[case.name, n_greedy] = self._compute(case, n_greedy)
        return self._alone[case.name, n_greedy]

    def _compute(self, case: Case, n_greedy: int) -> tuple[F32, list[int]]:
        self.context.truncate(0)
        rows = []
        for run in self.runs(case):
            slot = self.slot(case, run.group)
            rows.append(self.context.decode(run.tokens, slot, run.n_visible, "all"))
        greedy = []
        while len(greedy) < n_greedy:
            greedy.append(int(rows[-1][-1].argmax()))
            rows.append(self.context.decode([greedy[-1]], slot, run.n_visible, "all"))
        return np.concatenate(rows), greedy


@dataclass
class Conversation:
    """A prompt and its reply, in pieces of any size."""

    case: Case
    number: int
    pieces: list[tuple[list[int], tuple[int, ...], int]]  # tokens, group, visible images
    n_greedy: int
    rows: list[F32] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)

    def next(self, room: int, choice: random.Random) -> tuple[list[int], tuple[int, ...], int] | None:
        if self.pieces:
            tokens, group, n_visible = self.pieces[0]
            n = min(len(tokens), choice.randint(1, room))
            self.pieces[0] = tokens[n:], group, n_visible
            if not tokens[n:]:
                self._last = self.pieces.pop(0)
            return tokens[:n], group, n_visible
        if len(self.greedy) == self.n_greedy:
            return None
        self.greedy.append(int(self.rows[-1][-1].argmax()))
        return [self.greedy[-1]], self._last[1], self._last[2]


def run_together(runner: Runner, prompts: Sequence[Case], seed: int, n_greedy: int) -> list[Conversation]:
    """All prompts in steps with others, which join and leave at random."""
    choice, context = random.Random(seed), runner.context
    waiting = [
        Conversation(
            case, 0, [(list(r.tokens), tuple(r.group), r.n_visible) for r in runner.runs(case)], n_greedy
        )
        for case in prompts
    ]
    active: list[Conversation] = []
    done: list[Conversation] = []
    while waiting or active:
        while waiting and (not active or choice.random() < 0.5):
            waiting[0].number = context.sequence_new(512)
            active.append(waiting.pop(0))
        turn = [one for one in active if choice.random() < 0.8] or active[:1]
        choice.shuffle(turn)
        items, these, room = [], [], N_BATCH
        for one in turn:
            piece = one.next(min(room, choice.choice([1, 7, 40])), choice) if room else None
            if piece is None:
                if room:
                    context.sequence_free(one.number)
                    active.remove(one)
                    done.append(one)
                continue
            tokens, group, n_visible = piece
            room -= len(tokens)
            these.append(one)
            items.append(Item(one.number, tokens, runner.slot(one.case, group), n_visible, "all"))
        if items:
            for one, rows in zip(these, context.decode_many(items), strict=True):
                assert not isinstance(rows, MllamaError)
                one.rows.append(rows)
    return done
