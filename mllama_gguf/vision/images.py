"""The images of one model: their states are found in memory or on disk, or computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from weakref import WeakSet

from ..backend.base import Context
from ..backend.types import HParams
from ..cache.disk import ImageCache
from ..cache.keys import Keys
from ..checks import Whole, checked
from ..errors import Aborted, ImageError, RequestError
from ..handles import OneProcess
from ..waiting import POLL_SECONDS
from .embedding import EmbeddingStore, Encoding, ImageEmbedding, ImageInput, LimitedImage
from .preprocess import TiledImage, preprocess_image

# One four-tile image of the 11B model takes 105 MB.
STORE_BYTES = 256 * 1024 * 1024


class Images(OneProcess):
    """Finds or computes states for everyone who uses a model. Safe from several threads, which compute at the
    same time, each with a context of its own. An image that two threads ask for is computed by one of them.

    Parameters of several methods:

    context: where to compute
    stop:    asked now and then; True: stop with Aborted
    fresh:   compute although the states are known, and keep no image_kv, because somebody wants to see the
             computation
    """

    def __init__(
        self, hparams: HParams, name: str, keys: Keys, disk: ImageCache | None, max_tiles: int | None = None
    ) -> None:
        """name: of the model, for errors; disk: where results are kept; None: in memory only; max_tiles: most
        tiles of an image that has no limit of its own; None: as many as the model knows."""
        self._hparams = hparams
        self._max_tiles = max_tiles
        self._name = name
        self._keys = keys
        self._disk = disk
        self._store = EmbeddingStore(STORE_BYTES, disk)
        self._lock = threading.Lock()  # of what follows
        self._own: WeakSet[ImageEmbedding] = WeakSet()  # made here, so that their keys name their content
        self._running: dict[str, _Running] = {}  # by key

    def check_vision(self) -> None:
        """Raise RequestError for a model without a vision encoder."""
        if not self._hparams.has_vision:
            raise RequestError(f"{self._name} is a text model without vision encoder; give mmproj_path")

    def prepare(self, image: ImageInput, max_tiles: int | None = None) -> TiledImage | ImageEmbedding:
        """Decode and check an image, without the costly part.

        max_tiles: most tiles that it may have; None: as the model's setting says

        Raises ImageError, RequestError.
        """
        h = self._hparams
        self.check_vision()
        most = checked("max_tiles", Whole(1), max_tiles, or_none=True)
        if isinstance(image, LimitedImage):
            most = min(most or image.max_tiles, image.max_tiles)
            image = image.image
        if not isinstance(image, (TiledImage, ImageEmbedding)):
            tiled = preprocess_image(
                image,
                tile_size=h.image_size,
                max_tiles=most or self._max_tiles or h.max_tiles,
                model_tiles=h.max_tiles,
            )
            return tiled.for_model(h.max_tiles)
        if isinstance(image, ImageEmbedding):
            wanted = (h.n_positions, h.n_embd)
            if image.states.shape[1:] != wanted or image.n_tiles > h.max_tiles:
                raise ImageError(
                    f"ImageEmbedding of another model: states {list(image.states.shape)}; this model's are "
                    f"[1 to {h.max_tiles}, {h.n_positions}, {h.n_embd}]"
                )
        elif image.tile_size != h.image_size or image.n_tiles > h.max_tiles:
            raise ImageError(
                f"TiledImage of {image.n_tiles} tiles of {image.tile_size} pixels; this model takes "
                f"at most {h.max_tiles} of {h.image_size}"
            )
        if most is not None and image.n_tiles > most:
            raise ImageError(
                f"{type(image).__name__} of {image.n_tiles} tiles, but max_tiles is {most}; give the "
                "image itself, which is then tiled again"
            )
        return image.for_model(h.max_tiles) if isinstance(image, TiledImage) else image

    def embed(
        self,
        image: TiledImage | ImageEmbedding,
        context: Context,
        stop: Callable[[], bool],
        *,
        fresh: bool = False,
    ) -> ImageEmbedding:
        """The states of a prepared image, found or computed. Raises BackendError, Aborted."""
        if isinstance(image, ImageEmbedding):
            return image
        key = self._keys.states(image, stop)
        if fresh:
            return self._compute(image, key, context)
        with self._alone(key, stop):
            known = self._store.get(key)
            if known is None:
                return self._compute(image, key, context)
            self._add_own(known)
            return known

    def encode(
        self,
        image: TiledImage | ImageEmbedding,
        context: Context,
        stop: Callable[[], bool],
        *,
        fresh: bool = False,
    ) -> Encoding:
        """A prepared image for a session. Its states are not computed if its image_kv is on disk."""
        key = image.key if isinstance(image, ImageEmbedding) else self._keys.states(image, stop)
        image_kv_key = "" if fresh or not self._is_own(image) else self._image_kv_key(key, stop)
        if self._disk is not None and image_kv_key and self._disk.has_kv(image_kv_key):
            self._disk.touch_states(key)
            # It may be damaged, or removed meanwhile.
            return Encoding(key, image.n_tiles, lambda: self.embed(image, context, stop).states, image_kv_key)
        states = self.embed(image, context, stop, fresh=fresh).states
        return Encoding(key, image.n_tiles, lambda: states, image_kv_key)

    def needs_states(self, image: TiledImage, stop: Callable[[], bool]) -> bool:
        """Whether an answer about the image takes its states: not if its image_kv is on disk."""
        key = self._image_kv_key(self._keys.states(image, stop), stop)
        return self._disk is None or not self._disk.has_kv(key)

    def key(self, image: TiledImage | ImageEmbedding, stop: Callable[[], bool]) -> str:
        """What names the states of a prepared image, see `ImageEmbedding`. Raises Aborted."""
        return image.key if isinstance(image, ImageEmbedding) else self._keys.states(image, stop)

    def known(self, key: str) -> ImageEmbedding | None:
        """The states of that key, in memory or on disk; None if they are gone."""
        found = self._store.get(key)
        if found is not None:
            self._add_own(found)
        return found

    def source(
        self, image: TiledImage | ImageEmbedding, stop: Callable[[], bool]
    ) -> Literal["memory", "disk", "encoded"]:
        """Where the states of a prepared image would come from, or its image_kv in their place."""
        key = self.key(image, stop)
        if isinstance(image, ImageEmbedding) or key in self._store:
            return "memory"
        if self._disk is None:
            return "encoded"
        found = self._disk.has_states(key) or self._disk.has_kv(self._image_kv_key(key, stop))
        return "disk" if found else "encoded"

    def clear(self) -> None:
        """Forget the states in memory."""
        self._store.clear()

    def _image_kv_key(self, states_key: str, stop: Callable[[], bool]) -> str:
        return "" if self._disk is None else self._keys.image_kv(states_key, stop)

    def _compute(self, image: TiledImage, key: str, context: Context) -> ImageEmbedding:
        states = context.encode(image.pixels[: image.n_tiles], image.aspect_ratio_id)
        embedding = ImageEmbedding(states, image.aspect_ratio_id, key)
        self._store.add(embedding)
        self._add_own(embedding)
        return embedding

    def _add_own(self, embedding: ImageEmbedding) -> None:
        with self._lock:
            self._own.add(embedding)

    def _is_own(self, image: TiledImage | ImageEmbedding) -> bool:
        """Whether the key of its states names their content. Of others' embeddings it may mean something else
        tomorrow."""
        with self._lock:
            return not isinstance(image, ImageEmbedding) or image in self._own

    @contextmanager
    def _alone(self, key: str, stop: Callable[[], bool]) -> Iterator[None]:
        """The only thread that finds or computes the states of that key."""
        ours = _Running(threading.get_ident(), threading.Event())
        try:
            while True:
                with self._lock:
                    running = self._running.setdefault(key, ours)
                if running.thread == ours.thread:  # a callback of the computation may ask for the same image
                    break
                while not running.ended.wait(POLL_SECONDS):
                    if stop():
                        raise Aborted("encoding an image was stopped")
            yield
        finally:
            with self._lock:
                if self._running.get(key) is ours:
                    del self._running[key]
            ours.ended.set()


@dataclass(frozen=True)
class _Running:
    """A computation of states: its thread, and the event that is set when it has ended."""

    thread: int
    ended: threading.Event
