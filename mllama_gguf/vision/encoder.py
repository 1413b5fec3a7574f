"""The vision encoder of an open `Mllama`, for another thread: a context of its own over the same weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from ..backend.callbacks import Callbacks
from ..backend.local import NativeContext, NativeModel
from ..errors import Aborted
from ..handles import OneProcess
from .embedding import ImageEmbedding, Picture
from .preprocess import TiledImage


class ImageEncoder(OneProcess):
    """Encodes pictures in one thread while the `Mllama` that made it answers in another.

        with model.image_encoder() as encoder:
            embedding = encoder.encode("apple.png")  # in a thread, say
            model.caption(embedding)

    Its embeddings are, to the bit, those of `Mllama.encode_image`, and are found and kept in the same places.
    Beside the weights, which it shares, it takes the memory of an encoding while it runs. Threads that use it
    at once wait for each other.
    """

    def __init__(
        self,
        model: NativeModel,
        abort: Callable[[], bool],
        *,
        n_threads: int,
        flash_attn: bool,
        embed: Callable[[Picture, NativeContext], ImageEmbedding],
        needs: Callable[[TiledImage], bool],
    ) -> None:
        """For `Mllama.image_encoder`.

        embed: finds or computes what a picture is in a context
        needs: see `needs`
        """
        self.n_threads = n_threads
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._embed = embed
        self._needs = needs
        self._model = model  # which must outlive the context
        callbacks = Callbacks(model.native, abort=lambda: self._stopped.is_set() or abort())
        # A cache of tokens cannot be left out, but be as small as can be.
        self._context = NativeContext(
            model, callbacks, n_ctx=1, n_batch=1, n_threads=n_threads, flash_attn=flash_attn
        )

    def encode(self, image: Picture) -> ImageEmbedding:
        """As `Mllama.encode_image`, without its progress. Raises what that raises; Aborted after `stop`
        too."""
        self.check_process()
        with self._lock:
            if self.stopped:
                raise Aborted("this image encoder was stopped")
            return self._embed(image, self._context)

    def needs(self, image: TiledImage) -> bool:
        """Whether an answer about the picture takes its states: not if what the text model makes of them is
        on disk."""
        self.check_process()
        return self._needs(image)

    @property
    def stopped(self) -> bool:
        """Whether it encodes no more."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Encode no more. What runs ends with Aborted within a fraction of a second; this does not wait."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, wait for what runs, and free the context. Closing twice is fine."""
        self.stop()
        if self.is_inherited:
            return
        with self._lock:
            self._context.close()

    def __enter__(self) -> ImageEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
