"""Which of the known layouts a model's files are in, told from keys and tensor names alone."""

from __future__ import annotations

from typing import Literal

from .gguf_file import GGUFFile
from .info import CONVERTER_KEY

Layout = Literal["canonical", "A", "B", "text only", "unknown"]


def layout_of(text: GGUFFile, mmproj: GGUFFile | None = None) -> Layout:
    """The layout of a model in one file or two.

    canonical: what `mllama convert` writes; A: the two files of Ollama until 0.6 and of the hub; B: Ollama's
    one file since 0.7
    """
    vision = mmproj if mmproj is not None and mmproj.has_vision else text
    if not vision.has_vision:
        return "text only"
    if CONVERTER_KEY in vision.keys:
        return "canonical"
    if any(tensor.name.startswith("v.blk.") and ".ln1." in tensor.name for tensor in vision.tensors):
        return "A"
    return "B" if vision is text else "unknown"
