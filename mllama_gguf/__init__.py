"""Llama 3.2 Vision ("mllama") from GGUF files: images and text in, text out.

    from mllama_gguf import Mllama

    with Mllama.from_pretrained("demo") as model:
        print(model.caption("apple.png"))

The names in `__all__` and the module `mllama_gguf.ray` are public. All else is internal and may change.
Importing the package is cheap: numpy, Pillow and llama_cpp are imported when something needs them.
"""

from __future__ import annotations

from importlib import import_module

from . import errors as _errors
from .errors import *  # noqa: F403

TYPE_CHECKING = False  # typing takes longer to import than all of this
if TYPE_CHECKING:
    import typing

    from .backend.types import Device as Device
    from .backend.types import HParams as HParams
    from .decode.conversation import Conversation as Conversation
    from .decode.reply import Reply as Reply
    from .decode.writer import Stats as Stats
    from .loaded import LoadedModel as LoadedModel
    from .model import Mllama as Mllama
    from .vision.embedding import ImageEmbedding as ImageEmbedding
    from .vision.preprocess import TiledImage as TiledImage
    from .vision.preprocess import preprocess_image as preprocess_image

__version__ = "0.1.0"

# Public names that are imported when they are first asked for, and their modules.
_LAZY = {
    "Conversation": "decode.conversation",
    "Device": "backend.types",
    "HParams": "backend.types",
    "ImageEmbedding": "vision.embedding",
    "LoadedModel": "loaded",
    "Mllama": "model",
    "Reply": "decode.reply",
    "Stats": "decode.writer",
    "TiledImage": "vision.preprocess",
    "preprocess_image": "vision.preprocess",
}

__all__ = sorted(["__version__", *_LAZY, *(name for name in vars(_errors) if not name.startswith("_"))])


def __getattr__(name: str) -> typing.Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
