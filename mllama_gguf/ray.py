"""Captions on a Ray cluster: a class for Ray Data, of which every actor opens the model once.

    ds = ray.data.read_binary_files("photos", include_paths=True)
    ds = ds.map_batches(
        MllamaCaptioner,
        fn_constructor_kwargs={"image_column": "bytes"},
        batch_size=4,
        num_cpus=4,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    ds.select_columns(["path", "caption", "error"]).write_json("captions")

`read_images` works too; images of bytes keep their EXIF orientation, though, and one that cannot be decoded
is an error in its row and not the end of the job. The weights are mapped into memory: the actors of one
machine share them. Ray starts a new actor in place of one that died, and gives it the rows that have no
result yet.

This module does not import Ray: only the extra `ray` brings it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .batch.captions import CaptionOptions, caption_image
from .cpus import usable_cpus
from .errors import BackendError, ImageError, MllamaError
from .model import Mllama
from .store.resolve import resolve
from .words import one_line

logger = logging.getLogger(__name__)


class MllamaCaptioner:
    """Captions a column of images, batch by batch."""

    def __init__(
        self,
        model: str | os.PathLike[str] = "demo",
        mmproj: str | os.PathLike[str] | None = None,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        error_column: str = "error",
        options: Mapping[str, Any] | None = None,
        **model_options: Any,
    ) -> None:
        """Open the model.

        model, mmproj: of `Mllama.from_pretrained`; every machine must have the files
        image_column:  images: paths, bytes of image files, or uint8 arrays [height, width, 1, 3 or 4 or
                       nothing]
        caption_column: gets the captions; "" where there is none
        error_column:  gets "" or what went wrong with the image, one line
        options:       of `CaptionOptions`: prompt, max_tokens, schema and so on
        model_options: of `Mllama`: n_gpu_layers, n_threads and so on. n_threads is the CPUs that Ray gave the
                       actor (num_cpus), if nothing is said.

        Raises ModelError, RequestError, BackendError.
        """
        self._columns = (image_column, caption_column, error_column)
        self._options = CaptionOptions(**(options or {}))
        files = resolve(model, mmproj)
        self._paths = (files.text, files.mmproj)
        # A job sees each image once: kept on disk, they would only push out those that are asked about.
        self._settings = {
            "n_threads": ray_threads(),
            "image_cache": False,
            "defaults": files.defaults,
            **files.parameters,
        }
        self._settings.update(model_options)
        self._model: Mllama | None = self._open()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with captions and errors."""
        images, captions, errors = self._columns
        results = [self._caption(image) for image in batch[images]]
        return {
            **batch,
            captions: np.array([caption for caption, _ in results], dtype=object),
            errors: np.array([error for _, error in results], dtype=object),
        }

    def _open(self) -> Mllama:
        return Mllama(*self._paths, **self._settings)

    def _caption(self, image: Any) -> tuple[str, str]:
        """(caption, "") or ("", what went wrong)."""
        try:
            if self._model is None:
                self._model = self._open()  # a lost device may be there again
            return caption_image(self._model, _source(image), self._options).text, ""
        except BackendError as e:
            self._close()
            return "", _in_words(e)
        except (MllamaError, MemoryError) as e:
            return "", _in_words(e)

    def _close(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            model.close()


def ray_threads() -> int | None:
    """CPU threads for an actor: what Ray gave it, as it says in OMP_NUM_THREADS; None: not on Ray, or a whole
    machine."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(given), usable_cpus()) if given.isdecimal() and int(given) > 0 else None


def _source(image: Any) -> Any:
    """A row's value as `Mllama` takes images."""
    if image is None:
        raise ImageError("no image: the row is empty")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        from PIL import Image

        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 4):
            return Image.fromarray(np.ascontiguousarray(image))
    return image


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 2000)}"
