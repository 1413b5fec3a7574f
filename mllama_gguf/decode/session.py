"""Which tokens are in a context's cache, and what of a new prompt need not be computed again.

Reuse is exact: a cached token counts only if it saw the same images. The list kept here never claims more
than the C context holds: tokens are added to it after C has them, and taken off it before C forgets them,
so that an interruption at any point leaves a state that `_agree` can repair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

import numpy as np

from ..backend.base import Context
from ..backend.callbacks import Callbacks
from ..backend.types import Floats
from ..cache.disk import ImageCache
from ..errors import (
    BackendError,
    ContextFullError,
    ImageError,
    MllamaError,
    ModelError,
    RequestError,
)
from ..handles import OneProcess
from ..vision.embedding import Encoding
from .runs import Run, common_prefix, drop_first, split_runs, visible_keys
from .slots import Group, Slot, Slots


class _DamagedFile(ModelError):
    """Results are not finite because a file of the image cache was damaged; it is removed."""


class Session(OneProcess):
    """Feeds prompts and single tokens to a context. Not thread-safe."""

    def __init__(
        self,
        context: Context,
        callbacks: Callbacks,
        slots: Slots,
        disk: ImageCache | None = None,
        prefix_key: Callable[[Sequence[int]], str] = lambda tokens: "",
    ) -> None:
        """slots: of the context.
        disk: where prefix_kv is found and kept; None: nowhere.
        prefix_key: the key of the prefix_kv of a prompt's first tokens; "": it is not kept."""
        self.slots = slots
        self._context = context
        self._callbacks = callbacks
        self._disk = disk
        self._prefix_key = prefix_key
        self._unsaved_prefix = 0, ""  # tokens, and their key; see `save`
        self._tokens: list[int] = []
        self._seen: list[Group] = []  # for each token the keys of the images it saw
        self._slot: Slot | None = None  # what the last token saw
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
        logits: of the last token, or of all, which are then all computed

        Returns (float32 [1 or n_tokens, vocab_size], number of tokens that were there already).
        Raises ContextFullError, RequestError, Aborted; the cache then holds some first part of the prompt.
        Raises ModelError for results that are not finite; then nothing is left in the caches.
        """
        try:
            with self._nothing_kept_of_damage():
                return self._feed(tokens, images, logits)
        except _DamagedFile:  # its file is gone, so the image is computed
            with self._nothing_kept_of_damage():
                return self._feed(tokens, images, logits)

    def _feed(
        self, tokens: Sequence[int], images: Sequence[Encoding], logits: Literal["last", "all"]
    ) -> tuple[Floats, int]:
        hparams = self._context.hparams
        n_image_tokens = sum(token == hparams.image_token_id for token in tokens)
        if n_image_tokens != len(images):
            raise RequestError(f"the prompt has {n_image_tokens} image tokens for {len(images)} images")
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
            reused = self._read_prefix(runs[0].tokens, prefix_key)

        rows = []
        rest = drop_first(runs, reused)
        self._callbacks.prompt_total = len(tokens) - reused
        try:
            for run in rest:
                self._callbacks.prompt_offset = len(self._tokens) - reused
                wanted = logits if logits == "all" or run is rest[-1] else "none"
                rows.append(self._decode(run, images, wanted))
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
        then as before. Raises ModelError for logits that are not finite; then nothing is left in the caches.
        """
        n_before = len(self._tokens)
        self._agree()
        if len(self._tokens) < n_before:
            raise BackendError("this reply cannot continue: its caches were lost; start it again")
        number = -1 if self._slot is None else self._slot.number
        with self._nothing_kept_of_damage():
            logits: Floats = self._context.decode([token], number, self._n_visible, "last")[0]
        self._seen.append(self._seen[-1] if self._seen else ())
        self._tokens.append(token)
        return logits

    def rewind(self, n_tokens: int) -> bool:
        """Forget all tokens but the first ones, which the last `feed` gave. False: they are lost."""
        self._agree()
        if len(self._tokens) < n_tokens:
            return False
        self._truncate(n_tokens)
        return True

    def n_known(self, tokens: Sequence[int], image_keys: Sequence[str]) -> int:
        """How many first tokens of a prompt the cache holds, as far as is known without a look at it.

        image_keys: for each image token in order the key of the image's states
        """
        runs = split_runs(tokens, self._context.hparams.image_token_id)
        return common_prefix(self._tokens, self._seen, tokens, visible_keys(runs, image_keys))

    def check_fits(self, n_tokens: int) -> None:
        """Raise ContextFullError if a prompt of n_tokens tokens does not fit."""
        if n_tokens > self.n_ctx:
            raise ContextFullError(
                f"the prompt has {n_tokens} tokens, but n_ctx is {self.n_ctx}; "
                "raise n_ctx or shorten the prompt"
            )

    def save(self) -> None:
        """Keep image_kv and prefix_kv on disk. Apart from `feed`, because the reply need not wait for it.
        Raises BackendError, Aborted; what is lost then is only time. Raises ModelError for a prefix_kv that
        is not finite."""
        if self.slots.has_unsaved or self._unsaved_prefix[0]:
            self._agree()
        n, key = self._unsaved_prefix
        self._unsaved_prefix = 0, ""
        if self._disk and 0 < n <= len(self._tokens) and not self._disk.has_kv(key, "prefix_kv"):
            with self._nothing_kept_of_damage():
                data = self._context.prefix_kv_get(n)
            self._disk.add_kv(key, data.nbytes, [data], "prefix_kv")
        self.slots.save(self._callbacks.on_abort)

    def clear(self) -> None:
        """Forget tokens and images."""
        self.save()
        self._forget()
        self._context.clear()

    def _decode(self, run: Run, images: Sequence[Encoding], logits: Literal["none", "last", "all"]) -> Floats:
        """The logits of tokens that see the same images."""
        while True:
            if not run.group:
                row = self._context.decode(run.tokens, -1, run.n_visible, logits)
                self._look_at(None, run.n_visible)
                return row
            slot = self.slots.acquire([images[i] for i in run.group], self._callbacks.on_abort)
            try:
                try:
                    row = self._context.decode(run.tokens, slot.number, run.n_visible, logits)
                except ModelError:
                    if self.slots.verify(slot):
                        raise
                    raise _DamagedFile("the file of an image_kv is damaged") from None
                is_good = self.slots.verify(slot)
            except BaseException:
                self.slots.release(slot)
                raise
            if is_good:
                self._look_at(slot, run.n_visible)
                return row
            self.slots.release(slot)
            self._context.truncate(len(self._tokens))

    def leave(self) -> None:
        """Hold no slot any more: for a session that is not used again."""
        self._look_at(None, 0)

    def _look_at(self, slot: Slot | None, n_visible: int) -> None:
        """What the last token saw. slot: acquired, and released when another one takes its place."""
        before, self._slot, self._n_visible = self._slot, slot, n_visible
        if before is not None:
            self.slots.release(before)

    def _read_prefix(self, tokens: Sequence[int], key: str) -> int:
        """Let the cache hold these tokens, a prompt's first, if they are on disk; how many it then holds."""
        assert self._disk is not None
        n = len(tokens)
        if not key or not self._disk.has_kv(key, "prefix_kv"):
            return 0
        n_bytes = self._context.prefix_kv_size(n)
        try:
            pieces = [piece.copy() for piece in self._disk.read_kv(key, n_bytes, "prefix_kv")]
        except ImageError:
            return 0
        self._context.prefix_kv_set(n, np.concatenate(pieces))
        self._seen.extend(() for _ in tokens)
        self._tokens.extend(tokens)
        return n

    @contextmanager
    def _nothing_kept_of_damage(self) -> Iterator[None]:
        """After a ModelError nothing in the caches is of use, nor to be kept on disk."""
        try:
            yield
        except ModelError:
            self._forget()
            with suppress(MllamaError):  # its process may be lost
                self._context.clear()
            raise

    def _forget(self) -> None:
        self._tokens.clear()
        self._seen.clear()
        self._look_at(None, 0)
        self.slots.forget(self._context.epoch)
        self._unsaved_prefix = 0, ""

    def _truncate(self, n: int) -> None:
        del self._tokens[n:]
        del self._seen[n:]
        self._context.truncate(n)

    def _agree(self) -> None:
        """Repair what an interruption between C's work and ours left behind, or the loss of the caches."""
        n_past = self._context.n_past  # starts a lost process again
        if self._context.epoch != self._epoch:
            self._epoch = self._context.epoch
            self._forget()
        n = min(len(self._tokens), len(self._seen), n_past)
        del self._tokens[n:]
        del self._seen[n:]
        if n_past > n:
            self._context.truncate(n)
