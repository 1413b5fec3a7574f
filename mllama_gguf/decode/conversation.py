"""A conversation: the caches of one context, who may use them, and the replies that are written with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from ..backend.base import Context
from ..backend.callbacks import Callbacks, Progress
from ..backend.library import load
from ..backend.types import Floats, Memory, Tap
from ..checks import whole_numbers
from ..cpus import check_threads
from ..errors import Aborted, BusyError, MllamaError, RequestError
from ..handles import OneProcess
from ..store.defaults import Defaults
from ..vision.embedding import Encoding, ImageEmbedding, ImageInput
from ..vision.preprocess import TiledImage
from ..words import brief
from .answers import Answers
from .openai import Messages
from .options import PromptOptions, ReplyOptions
from .reply import Reply
from .scheduler import Scheduler
from .sequence import SequenceContext
from .session import Session
from .shared import Shared
from .slots import Slots
from .writer import Writer


@dataclass
class _Prompt:
    """A prompt of one reply, or of several.

    logits: that follow it, float32 [vocab_size], once they are computed
    turn:   of the conversation in which the caches hold the prompt and a reply to it
    """

    tokens: Sequence[int]
    images: Sequence[TiledImage | ImageEmbedding]
    logits: Floats | None = None
    turn: int = -1


class Conversation(OneProcess, Answers):
    """One conversation with a model that several may share.

        with LoadedModel("text.gguf", "mmproj.gguf") as model:
            with model.conversation() as one, model.conversation() as two:
                print(one.caption("apple.png"), two.caption("pear.png"))

    It has caches of its own. One thread uses it at a time; a second thread gets BusyError immediately.
    """

    def __init__(
        self,
        shared: Shared,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        progress: Progress | None = None,
        abort: Callable[[], bool] | None = None,
        noun: str = "conversation",
        scheduler: Scheduler | None = None,
    ) -> None:
        """For `LoadedModel.conversation`, which says what these are. noun: what errors call it. scheduler:
        what it computes with, together with others; None: a context of its own."""
        if n_threads is not None:
            check_threads(n_threads)
        self._shared = shared
        self._noun = noun
        self._n_threads = n_threads or shared.backend.n_threads
        self._is_shared = scheduler is not None
        self._abort = abort
        self._lock = threading.Lock()
        # Counts what changed the conversation; an open reply sees by it that it lost the caches.
        self._turn = 0
        self._closed = False
        self._taps = 0  # open ones
        self._cancelled: threading.Event | None = None  # of the reply that computes now
        callbacks = self._callbacks = Callbacks(load(), progress, self._should_stop)
        self.context: Context
        if scheduler is None:
            self.context = shared.backend.open_context(callbacks, n_ctx=n_ctx, n_threads=n_threads)
            slots = Slots(self.context, callbacks, shared.disk)
        else:
            stop = callbacks.on_abort
            self.context = SequenceContext(scheduler, n_ctx or shared.backend.n_ctx, stop)
            slots = scheduler.slots
        self.session = Session(self.context, callbacks, slots, shared.disk, self._prefix_key)

    # ---- facts ---------------------------------------------------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Most tokens."""
        return self.session.n_ctx

    def memory(self) -> Memory:
        """Bytes of the caches and compute buffers, now. The weights are those of all conversations."""
        with self.exclusive(changes=False):
            return self.context.memory()

    # ---- images --------------------------------------------------------------------------------------------

    def encode_image(self, image: ImageInput, *, max_tiles: int | None = None) -> ImageEmbedding:
        """Run the vision encoder on an image. An image whose states are in memory or in the image cache is
        not computed again; one that another thread computes now is waited for.

        max_tiles: most tiles of the image; None: as the setting says

        Raises ImageError, RequestError for a model without a vision encoder, Aborted.
        """
        with self.exclusive(changes=False):
            images = self._shared.images
            return images.embed(
                images.prepare(image, max_tiles), self.context, self._callbacks.on_abort, fresh=self._taps > 0
            )

    def prepare_image(
        self, image: ImageInput, *, max_tiles: int | None = None
    ) -> TiledImage | ImageEmbedding:
        """Decode and cut an image, without the costly part. max_tiles: as in `encode_image`. Raises
        ImageError, RequestError."""
        return self._shared.images.prepare(image, max_tiles)

    def image_key(self, image: ImageInput) -> str:
        """What names an image's states, 64 hexadecimal digits; see `known_image`. Raises ImageError,
        RequestError, Aborted."""
        images = self._shared.images
        return images.key(images.prepare(image), self._callbacks.on_abort)

    def known_image(self, key: str) -> ImageEmbedding | None:
        """The image of a key, if its states are in memory or on disk."""
        return self._shared.images.known(key)

    def image_source(self, image: TiledImage | ImageEmbedding) -> Literal["memory", "disk", "encoded"]:
        """Where the states of a prepared image would come from."""
        return self._shared.images.source(image, self._callbacks.on_abort)

    def encode(self, image: TiledImage | ImageEmbedding) -> Encoding:
        """A prepared image for the session."""
        return self._shared.images.encode(image, self.context, self._callbacks.on_abort, fresh=self._taps > 0)

    # ---- replies -------------------------------------------------------------------------------------------

    @property
    def _model_name(self) -> str:
        return self._shared.model_name

    @property
    def _defaults(self) -> Defaults:
        return self._shared.defaults

    def _begin_replies(self, messages: Messages, options: ReplyOptions, n: int) -> list[Reply]:
        return self.replies_to(*self.prompt(messages, options.prompt), options, n)

    def prompt(
        self, messages: Messages, options: PromptOptions | None = None
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """The tokens of messages, and the images that their image tokens stand for. Raises RequestError."""
        self.check_open()
        options = options or PromptOptions()
        prompt = self._shared.template.render(
            messages,
            tools=options.tools.told,
            variables=options.variables,
            continue_final=options.continue_final,
        )
        tokens = self._tokenize_prompt(prompt.pieces)
        if tokens.count(self.context.hparams.image_token_id) != len(prompt.images):
            raise RequestError("the chat template does not give every image one image token")
        return tokens, tuple(map(options.limited, prompt.images, prompt.details))

    def reply_to(self, tokens: Sequence[int], images: Sequence[ImageInput], options: ReplyOptions) -> Reply:
        """The reply to a prompt.

        tokens: with one image token for each of `images`, in order

        Raises ImageError, RequestError, ContextFullError, BusyError.
        """
        return self.replies_to(tokens, images, options, 1)[0]

    def replies_to(
        self, tokens: Sequence[int], images: Sequence[ImageInput], options: ReplyOptions, n: int
    ) -> list[Reply]:
        """Several replies to a prompt, as `replies` and `reply_to`."""
        self.check_open()
        shared, hparams = self._shared, self.context.hparams
        wrong = [token for token in tokens if not 0 <= token < hparams.n_token_embd]
        if wrong:
            raise RequestError(f"token {brief(wrong[0])} is not in the vocabulary")
        if list(tokens).count(hparams.image_token_id) != len(images):
            raise RequestError(f"the prompt does not have one image token for each of {len(images)} images")
        with self.exclusive(changes=False):
            self.session.check_fits(len(tokens))
            prompt = _Prompt(tokens, [shared.images.prepare(image) for image in images])
            replies = []
            for i in range(n):
                writer = Writer(
                    shared.vocab, hparams.vocab_size, shared.vocab.stop_ids, tokens, options.choice(i)
                )
                cancelled = threading.Event()
                pieces = self._write(prompt, writer, cancelled)
                replies.append(Reply(pieces, writer.stats, cancelled, writer.logprobs))
            return replies

    def _tokenize_prompt(self, pieces: Sequence[str]) -> list[int]:
        vocab = self._shared.vocab
        bos = vocab.text(vocab.bos)
        tokens: list[int] = []
        for piece in pieces:
            # Templates usually write the bos token themselves.
            add_bos = not tokens and not (bos and piece.startswith(bos))
            tokens += vocab.tokenize(piece, add_bos=add_bos, abort=self._should_stop)
        return tokens

    def _write(self, prompt: _Prompt, writer: Writer, cancelled: threading.Event) -> Iterator[str]:
        """The pieces of a reply to a prompt. The conversation is free while its reader has a piece."""
        stats, session, clock = writer.stats, self.session, time.perf_counter
        with self.exclusive() as turn, self._cancelled_by(cancelled):
            n_tokens = len(prompt.tokens)
            if prompt.logits is not None and prompt.turn == turn - 1 and session.rewind(n_tokens):
                row, stats.cached_tokens = prompt.logits, n_tokens
            else:
                start = clock()
                encodings = [self.encode(image) for image in prompt.images]
                encoded = clock()
                stats.seconds["encode"] = encoded - start
                logits, stats.cached_tokens = session.feed(prompt.tokens, encodings)
                stats.seconds["prompt"] = clock() - encoded
                row = prompt.logits = logits[-1]
            prompt.turn = turn
        token, shown = -1, False
        while stats.finish_reason is None:
            with self.exclusive(changes=False, turn=turn), self._cancelled_by(cancelled):
                if shown:
                    session.save()
                start = clock()
                if token >= 0:  # not before its piece is out
                    row = session.step(token)
                token, piece = writer.take(row, is_full=session.n_past >= session.n_ctx)
                stats.seconds["decode"] += clock() - start
            if piece:
                yield piece
                shown = True

    def logits(self, token_ids: Sequence[int], images: Sequence[ImageInput] = ()) -> Floats:
        """The logits at every position of a prompt, from an empty cache: float32 [n_tokens, vocab_size].

        token_ids: with one image token for each of `images`, in order

        The caches hold the prompt afterwards. Raises ImageError, RequestError, ContextFullError, Aborted.
        """
        tokens = whole_numbers("token_ids", token_ids)
        if not isinstance(images, (list, tuple)):
            raise RequestError(f"images must be a list of images, not {brief(images)}")
        wrong = [token for token in tokens if not 0 <= token < self.context.hparams.n_token_embd]
        if wrong:
            raise RequestError(f"token {brief(wrong[0])} is not in the vocabulary")
        with self.exclusive():
            encodings = [self.encode(self._shared.images.prepare(image)) for image in images]
            rows, _ = self.session.feed(tokens, encodings, logits="all")
            return rows

    # ---- its own life --------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Clear the conversation. States of images stay, for other conversations too."""
        with self.exclusive():
            self.session.clear()

    def tap(self, callback: Tap) -> AbstractContextManager[None]:
        """Look at intermediate tensors inside a with block; see `Context.tap`. For finding mistakes. Images
        are encoded there even if their states are known."""
        self.check_open()
        if not callable(callback):
            raise RequestError(f"callback must be a function, not {brief(callback)}")

        @contextmanager
        def tapped() -> Iterator[None]:
            self._taps += 1
            try:
                with self.context.tap(callback):
                    yield
            finally:
                self._taps -= 1

        return tapped()

    def close(self) -> None:
        """Free its caches; the model stays. Closing twice is fine. Raises BusyError while another thread
        computes. In a forked process nothing is freed."""
        if self._closed or self.is_inherited:
            self._closed = True
            return
        with self.exclusive():
            self.save()
            self.free()

    def save(self) -> None:
        """Keep on disk what is still to be kept. The caller has sole use."""
        with suppress(MllamaError):  # it is closed already, or a device was lost
            self.session.save()

    def free(self) -> None:
        """Free the caches. The caller has sole use."""
        self._closed = True
        self.session.leave()
        self.context.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Conversation({self._shared.file_name!r}{', closed' if self._closed else ''})"

    def check_open(self) -> None:
        """Raise MllamaError if it is closed, or another process's."""
        self.check_process()
        if self._closed:
            raise MllamaError(f"{self._shared.file_name}: this {self._noun} is closed")

    @contextmanager
    def exclusive(self, *, changes: bool = True, turn: int | None = None) -> Iterator[int]:
        """Sole use of the caches.

        changes: the conversation in the caches becomes another one
        turn:    the conversation that must still be the one in the caches

        Gives the turn that it is now. Raises BusyError, MllamaError.
        """
        with self.locked():
            self.check_open()
            if turn is not None and turn != self._turn:
                raise MllamaError(
                    f"this reply cannot continue: its {self._noun} was used for something else meanwhile"
                )
            self._turn += changes
            yield self._turn

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other threads out, whether it is closed or not. Raises BusyError if one is in,
        MllamaError in a forked process."""
        self.check_process()
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                f"this {self._noun} is in use, by another thread or a callback; open one for each thread"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _cancelled_by(self, event: threading.Event) -> Iterator[None]:
        """What is computed inside the block stops with Aborted once the event is set."""
        if event.is_set():
            raise Aborted("this reply was cancelled")
        self._cancelled = event
        try:
            yield
        finally:
            self._cancelled = None

    def _should_stop(self) -> bool:
        if self._cancelled is not None and self._cancelled.is_set():
            return True
        return self._abort is not None and bool(self._abort())

    def _prefix_key(self, tokens: Sequence[int]) -> str:
        if self._shared.disk is None or self._taps:
            return ""
        # With others, sums are taken in another order: that is another prefix.
        n_threads = -self._n_threads if self._is_shared else self._n_threads
        return self._shared.keys.prefix_kv(tokens, n_threads)
