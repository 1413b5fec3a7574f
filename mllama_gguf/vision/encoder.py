"""The vision encoder of an open `Mllama`, for another thread: a context of its own over the same weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from ..backend.callbacks import Callbacks
from ..backend.library import load
from ..backend.opening import Backend
from ..errors import Aborted, BusyError
from ..handles import OneProcess
from .embedding import ImageEmbedding, ImageInput
from .images import Images
from .preprocess import TiledImage


class ImageEncoder(OneProcess):
    """Encodes images in one thread while the `Mllama` that made it answers in another.

        with model.image_encoder() as encoder:
            embedding = encoder.encode("apple.png")  # in a thread, say
            model.caption(embedding)

    Its embeddings are, to the bit, those of `Mllama.encode_image`, and are found and kept in the same places.
    Beside the weights, which it shares, it takes the memory of an encoding while it runs. Threads that use it
    at the same time wait for each other.
    """

    def __init__(
        self,
        backend: Backend,
        images: Images,
        abort: Callable[[], bool],
        *,
        n_threads: int,
    ) -> None:
        """For `Mllama.image_encoder`. Raises BackendError."""
        self.n_threads = n_threads
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._encodes_in = 0  # the thread
        self._images = images
        self._is_enough: Callable[[], bool] = lambda: False  # of the image that is encoded now
        callbacks = self._callbacks = Callbacks(
            load(), abort=lambda: self._stopped.is_set() or self._is_enough() or abort()
        )
        # A cache of tokens cannot be left out, but be as small as can be.
        self._context = backend.open_encoder(callbacks, n_threads)

    def encode(
        self, image: ImageInput, stop: Callable[[], bool] = lambda: False, *, max_tiles: int | None = None
    ) -> ImageEmbedding:
        """As `Mllama.encode_image`, without its progress.

        stop:      asked now and then; True: stop this image with Aborted
        max_tiles: most tiles of the image; None: as the setting says

        Raises what `Mllama.encode_image` raises; Aborted after `stop` or `close` too; BusyError in its own
        callbacks.
        """
        self.check_process()
        self._check_callback()
        with self._lock:
            if self.stopped:
                raise Aborted("this image encoder was stopped")
            prepared = self._images.prepare(image, max_tiles)
            self._is_enough = stop
            try:
                self._encodes_in = threading.get_ident()
                return self._images.embed(prepared, self._context, self._callbacks.on_abort)
            finally:
                self._encodes_in = 0
                self._is_enough = lambda: False

    def _check_callback(self) -> None:
        """Raise BusyError in a callback of what this thread encodes: it would wait for itself."""
        if self._encodes_in == threading.get_ident():
            raise BusyError("this image encoder is encoding; a callback cannot use or close it")

    def needs(self, image: TiledImage) -> bool:
        """Whether an answer about the image takes its states: not if its image_kv is on disk."""
        self.check_process()
        return self._images.needs_states(image, self._callbacks.on_abort)

    @property
    def stopped(self) -> bool:
        """Whether it was stopped."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Encode no more. What runs ends with Aborted within a fraction of a second; this does not wait."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, wait for what runs, and free the context. Closing twice is fine. Raises BusyError in a
        callback of what runs."""
        if self.is_inherited:
            self.stop()
            return
        self._check_callback()
        self.stop()
        with self._lock:
            self._context.close()

    def __enter__(self) -> ImageEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
