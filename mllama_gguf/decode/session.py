"""One conversation's caches: what is in them, what of a new prompt need not be computed again.

Reuse is exact: a cached token counts only if it saw the same pictures. The list kept here never claims more
than the C context holds: tokens are added to it after C has them, and taken off it before C forgets them, so
that an interruption at any point leaves a state that `_agree` can repair.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal

import numpy as np

from ..backend.base import Context
from ..backend.callbacks import Callbacks
from ..backend.types import Bytes, Floats
from ..cache.disk import ImageCache
from ..cache.entries import PIECE
from ..errors import Aborted, BackendError, ContextFullError, ImageError, ModelError, RequestError
from ..handles import OneProcess
from ..vision.embedding import Encoding
from .runs import Run, common_prefix, drop_first, split_runs, visible_keys

# Filled image slots that are kept. The current one is enough to go on; the others make a return to a recent
# picture cheap. One tile of the 11B model takes 79 MB on the CPU.
MAX_SLOTS = 4
# Where a slot is until all its pictures are in it: the key of no group.
UNFINISHED = ()
POLL_SECONDS = 0.05  # how often it is asked whether to stop


class Session(OneProcess):
    """Feeds prompts and single tokens to a context. Not thread-safe."""

    def __init__(
        self,
        context: Context,
        callbacks: Callbacks,
        image_cache: ImageCache | None = None,
        prefix_key: Callable[[Sequence[int]], str] = lambda tokens: "",
    ) -> None:
        """image_cache: where slots are filled from, and what is put into them is kept.
        prefix_key: names what the model makes of a prompt's first tokens; "": that is not kept."""
        self._context = context
        self._callbacks = callbacks
        self._disk = image_cache
        self._prefix_key = prefix_key
        self._unsaved_prefix = 0, ""  # tokens, and their key; see `save`
        # Of the unfinished slot, its key and whether its file is right; see `_settle`.
        self._check: tuple[tuple[str, ...], Future[bool]] | None = None
        self._tokens: list[int] = []
        self._seen: list[tuple[str, ...]] = []  # for each token the keys of the pictures it saw
        # Filled slots by the keys of their group; the last used one is last.
        self._slots: OrderedDict[tuple[str, ...], int] = OrderedDict()
        self._unsaved: list[tuple[int, int, str]] = []  # slot, image in it and filling key; see `save`
        self._slot = -1  # what the last token saw
        self._n_visible = 0
        self.n_ctx = context.n_ctx
        self._epoch = context.epoch

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    def feed(
        self,
        tokens: Sequence[int],
        images: Sequence[Encoding] = (),
        *,
        logits: Literal["last", "all"] = "last",
    ) -> tuple[Floats, int]:
        """Make the cache hold exactly these tokens, computing only what it does not hold yet.

        tokens: the whole prompt; its image tokens stand for `images`, in order
        logits: "last" or, computing everything anew, "all"

        Returns (float32 [1 or n_tokens, vocab_size], number of tokens that were there already).
        Raises ContextFullError, RequestError, Aborted; the cache then holds some first part of the prompt.
        """
        hparams = self._context.hparams
        n_image_tokens = sum(token == hparams.image_token_id for token in tokens)
        if n_image_tokens != len(images):
            raise RequestError(f"the prompt has {n_image_tokens} image tokens for {len(images)} pictures")
        self.check_fits(len(tokens))
        if not tokens:
            raise RequestError("the prompt is empty")

        self.save()
        self._agree()
        runs = split_runs(tokens, hparams.image_token_id)
        seen = visible_keys(runs, [image.key for image in images])
        reused = 0
        if logits == "last":
            # The last token is computed in any case, for its logits.
            reused = min(common_prefix(self._tokens, self._seen, tokens, seen), len(tokens) - 1)
        self._truncate(reused)
        prefix_key = ""
        if self._disk and reused == 0 and logits == "last" and not runs[0].group and len(runs) > 1:
            prefix_key = self._prefix_key(runs[0].tokens)
            reused = self._recall(runs[0].tokens, prefix_key)

        rows = []
        rest = drop_first(runs, reused)
        self._callbacks.prompt_total = len(tokens) - reused
        try:
            for run in rest:
                self._callbacks.prompt_offset = len(self._tokens) - reused
                self._slot, self._n_visible = self._slot_for(run, images), run.n_visible
                wanted = logits if logits == "all" or run is rest[-1] else "none"
                row = self._context.decode(run.tokens, self._slot, self._n_visible, wanted)
                if not self._settle():
                    self._context.truncate(len(self._tokens))
                    self._slot = self._slot_for(run, images)
                    row = self._context.decode(run.tokens, self._slot, self._n_visible, wanted)
                rows.append(row)
                start = len(self._tokens)
                self._seen.extend(seen[start : start + len(run.tokens)])
                self._tokens.extend(run.tokens)
                if start == 0 and prefix_key:
                    self._unsaved_prefix = len(run.tokens), prefix_key
        finally:
            self._callbacks.prompt_total = 0
        return np.concatenate(rows) if len(rows) > 1 else rows[0], reused

    def step(self, token: int) -> Floats:
        """Append one token of the reply, which sees what the token before it saw.

        Returns its logits, float32 [vocab_size]. Raises ContextFullError, Aborted, BackendError; the cache is
        then as before.
        """
        n_before = len(self._tokens)
        self._agree()
        if n_before and not self._tokens:
            raise BackendError("this reply cannot go on: its caches were lost; start it again")
        logits: Floats = self._context.decode([token], self._slot, self._n_visible, "last")[0]
        self._seen.append(self._seen[-1] if self._seen else ())
        self._tokens.append(token)
        return logits

    def check_fits(self, n_tokens: int) -> None:
        """Raise ContextFullError if a prompt of so many tokens cannot fit."""
        if n_tokens > self.n_ctx:
            raise ContextFullError(
                f"the prompt has {n_tokens} tokens, but n_ctx is {self.n_ctx}; "
                "raise n_ctx or shorten the prompt"
            )

    def save(self) -> None:
        """Keep on disk what the text model made of pictures and of the tokens before them. Apart from `feed`,
        for the reply need not wait. Raises BackendError, Aborted; what is lost then is only time."""
        if self._unsaved or self._unsaved_prefix[0]:
            self._agree()
        n, key = self._unsaved_prefix
        self._unsaved_prefix = 0, ""
        if self._disk and 0 < n <= len(self._tokens) and not self._disk.has_kv(key, "prefix_kv"):
            data = self._context.past_get(n)
            self._disk.add_kv(key, data.nbytes, [data], "prefix_kv")
        while self._unsaved and self._disk is not None:
            slot, image, key = self._unsaved.pop()
            if self._disk.has_kv(key):  # by another process, or the same picture beside itself
                continue
            n_bytes = self._context.image_size(slot, image)
            self._disk.add_kv(key, n_bytes, self._pieces(slot, image, n_bytes))

    def _recall(self, tokens: Sequence[int], key: str) -> int:
        """Let the cache hold these tokens, a prompt's first, if they are on disk; how many it then holds."""
        assert self._disk is not None
        n = len(tokens)
        if not key or not self._disk.has_kv(key, "prefix_kv"):
            return 0
        try:
            pieces = [
                piece.copy() for piece in self._disk.read_kv(key, self._context.past_size(n), "prefix_kv")
            ]
        except ImageError:
            return 0
        self._context.past_set(n, np.concatenate(pieces))
        self._seen.extend(() for _ in tokens)
        self._tokens.extend(tokens)
        return n

    def _pieces(self, slot: int, image: int, n_bytes: int) -> Iterator[Bytes]:
        for offset in range(0, n_bytes, PIECE):
            self._check_abort()
            yield self._context.image_get(slot, image, offset, min(PIECE, n_bytes - offset))

    def clear(self) -> None:
        """Forget tokens and pictures."""
        self.save()
        self._forget()
        self._context.clear()

    def _forget(self) -> None:
        self._tokens.clear()
        self._seen.clear()
        self._slots.clear()
        self._unsaved.clear()
        self._unsaved_prefix = 0, ""
        self._check = None
        self._slot, self._n_visible = -1, 0

    def _slot_for(self, run: Run, images: Sequence[Encoding]) -> int:
        if not run.group:
            return -1
        group = [images[i] for i in run.group]
        key = tuple(image.key for image in group)
        if key not in self._slots:
            self._free_unfinished()
            while len(self._slots) >= MAX_SLOTS:
                self.save()
                _, oldest = self._slots.popitem(last=False)
                self._context.image_free(oldest)
            slot = self._map(group, key) if len(group) == 1 else -1
            if slot >= 0:
                return slot
            slot = self._fill(group)
            self._slots[key] = self._slots.pop(UNFINISHED)
            self._unsaved += [
                (slot, i, image.image_kv_key)
                for i, image in enumerate(group)
                if self._disk and image.image_kv_key and not self._disk.has_kv(image.image_kv_key)
            ]
        self._slots.move_to_end(key)
        return self._slots[key]

    def _fill(self, group: Sequence[Encoding]) -> int:
        """The unfinished slot, new, with these pictures: from disk, or else computed from states."""
        on_disk = {
            i
            for i, image in enumerate(group)
            if self._disk and image.image_kv_key and self._disk.has_kv(image.image_kv_key)
        }
        while True:
            slot = self._slots[UNFINISHED] = self._context.image_fill(
                [image.n_tiles if i in on_disk else image.states() for i, image in enumerate(group)]
            )
            damaged = next((i for i in sorted(on_disk) if not self._copy(slot, i, group[i].image_kv_key)), -1)
            if damaged < 0:
                return slot
            on_disk.remove(damaged)
            self._free_unfinished()

    def _map(self, group: Sequence[Encoding], key: tuple[str, ...]) -> int:
        """The unfinished slot, new, with the memory of a picture's file; -1 if that cannot be. Whether the
        file is as it was written is found out meanwhile: see `_settle`."""
        (image,) = group
        if self._disk is None or not image.image_kv_key or not self._disk.has_kv(image.image_kv_key):
            return -1
        n_bytes = self._context.image_mapped_size(image.n_tiles)
        if not n_bytes:
            return -1
        try:
            slot = self._context.image_map(image.n_tiles, *self._disk.image_kv_place(image.image_kv_key))
        except (ModelError, RequestError):  # gone meanwhile, or not as long as it must be
            return -1
        self._slots[UNFINISHED] = slot
        reader = ThreadPoolExecutor(1, "filling")
        self._check = key, reader.submit(self._disk.is_intact, image.image_kv_key, n_bytes)
        reader.shutdown(wait=False)
        return slot

    def _settle(self) -> bool:
        """Whether what a new slot was mapped from is right, which it then has read to the end. If it is not,
        slot and file are gone, and what was computed with them is of no use."""
        if self._check is None:
            return True
        (key, check), self._check = self._check, None
        self._check_abort()
        while not wait([check], timeout=POLL_SECONDS).done:
            self._check_abort()
        if check.result():
            self._slots[key] = self._slots.pop(UNFINISHED)
            return True
        self._free_unfinished()
        return False

    def _copy(self, slot: int, image: int, key: str) -> bool:
        """Put a picture into a slot from disk; whether that went well."""
        assert self._disk is not None
        offset = 0
        try:
            for piece in self._disk.read_kv(key, self._context.image_size(slot, image)):
                self._check_abort()
                self._context.image_set(slot, image, offset, piece)
                offset += piece.nbytes
        except ImageError:
            return False
        return True

    def _check_abort(self) -> None:
        if self._callbacks.on_abort():
            raise Aborted("copying a picture was stopped")

    def _free_unfinished(self) -> None:
        self._check = None
        if UNFINISHED in self._slots:
            self._context.image_free(self._slots.pop(UNFINISHED))

    def _truncate(self, n: int) -> None:
        del self._tokens[n:]
        del self._seen[n:]
        self._context.truncate(n)

    def _agree(self) -> None:
        """Repair what an interruption between C's work and ours left behind, or the loss of the caches."""
        n_past = self._context.n_past  # starts a lost engine again
        if self._context.epoch != self._epoch:
            self._epoch = self._context.epoch
            self._forget()
        n = min(len(self._tokens), len(self._seen))
        del self._tokens[n:]
        del self._seen[n:]
        if n_past > n:
            self._context.truncate(n)
