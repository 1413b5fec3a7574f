"""Several images of a batch captioned together: conversations in threads, which read the weights once for
all of them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from ..decode.conversation import Conversation
from ..model import Mllama
from ..vision.embedding import ImageEmbedding
from ..vision.preprocess import TiledImage
from .captions import Caption, CaptionOptions, caption_image


@dataclass(frozen=True)
class Made:
    """A caption. begun, ended: when, as `time.perf_counter` counts."""

    caption: Caption
    begun: float
    ended: float


def make(
    model: Mllama,
    image: TiledImage | ImageEmbedding,
    options: CaptionOptions,
    spent: float,
    talk: Conversation | None = None,
) -> Made:
    """The caption of a prepared image, by a conversation, or by the model's own. Raises what
    `caption_image` raises."""
    caption = caption_image(model, image, options, spent=spent, talk=talk)
    ended = time.perf_counter()
    return Made(caption, ended - sum(caption.seconds.values()), ended)  # making ready comes before


class Together:
    """Captions up to n images at the same time."""

    def __init__(self, model: Mllama, options: CaptionOptions, n: int) -> None:
        """Raises BackendError."""
        self._model = model
        self._options = options
        self._stop = threading.Event()
        abort = model._abort

        def should_stop() -> bool:
            return self._stop.is_set() or (abort is not None and bool(abort()))

        scheduler = model.scheduler()
        self._talks: SimpleQueue[Conversation] = SimpleQueue()
        for _ in range(n):
            self._talks.put(model.conversation(scheduler=scheduler, abort=should_stop))
        self._pool = ThreadPoolExecutor(n, "mllama-caption")

    def begin(self, image: TiledImage | ImageEmbedding, spent: float) -> Future[Made]:
        """Caption a prepared image. spent: seconds of its time limit that are gone already."""
        return self._pool.submit(self._make, image, spent)

    def _make(self, image: TiledImage | ImageEmbedding, spent: float) -> Made:
        talk = self._talks.get()
        try:
            return make(self._model, image, self._options, spent, talk)
        finally:
            self._talks.put(talk)

    def close(self) -> None:
        """Stop what runs, and wait for it. The conversations are closed with the model."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
