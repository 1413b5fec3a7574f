"""Llama 3.2 Vision ("mllama") from GGUF files: pictures and text in, text out.

    from mllama_gguf import Mllama

    with Mllama.from_pretrained("demo") as model:
        print(model.caption("apple.png"))

Importing the package is cheap: numpy, Pillow and llama_cpp are imported when something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    Aborted,
    BackendError,
    BusyError,
    ContextFullError,
    DownloadError,
    ImageError,
    MllamaError,
    ModelError,
    OutOfMemoryError,
    RequestError,
)

if TYPE_CHECKING:
    from .model import Mllama
    from .vision.embedding import ImageEmbedding
    from .vision.preprocess import TiledImage, preprocess_image

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "BackendError",
    "BusyError",
    "ContextFullError",
    "DownloadError",
    "ImageEmbedding",
    "ImageError",
    "Mllama",
    "MllamaError",
    "ModelError",
    "OutOfMemoryError",
    "RequestError",
    "TiledImage",
    "__version__",
    "preprocess_image",
]

_LAZY = {
    "ImageEmbedding": "vision.embedding",
    "Mllama": "model",
    "TiledImage": "vision.preprocess",
    "preprocess_image": "vision.preprocess",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
