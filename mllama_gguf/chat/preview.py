"""A picture on the terminal, if that can show one: kitty's protocol or sixel."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from .talk import Attached

WIDTH = 36  # cells


def preview() -> Callable[[Attached], None] | None:
    """What shows a picture; None where the terminal cannot, or where the package for it is missing.

    Asks the terminal, so it must be called before anything reads from it.
    """
    if not sys.stdout.isatty() or not sys.stdin.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return None
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    try:
        from textual_image.renderable import Image, SixelImage, TGPImage
    except Exception:  # not installed, or a terminal that it does not understand
        return None
    if Image not in (SixelImage, TGPImage):
        return None

    def show(image: Attached) -> None:
        from rich.console import Console

        from ..vision.loading import load_image

        with suppress(Exception):  # a picture less
            Console().print(Image(load_image(io.BytesIO(image.data)), width=WIDTH))

    return show
