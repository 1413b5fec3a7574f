"""An image on the terminal, if that can show one: kitty's protocol or sixel."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress

from .talk import Attached

WIDTH, HEIGHT = 36, 16  # most cells


def preview() -> Callable[[Attached], None] | None:
    """What shows an image; None where the terminal cannot, or where the package for it is missing.

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

        with suppress(Exception):  # an image less
            # "auto" keeps the proportions; without it the height would be that of the file.
            drawn = Image(load_image(io.BytesIO(image.data)), width=width_of(image.size), height="auto")
            Console().print(drawn)

    return show


def width_of(size: tuple[int, int]) -> int:
    """Cells for the width of an image of this size in pixels, so that it has room. Cells are about twice as
    high as wide."""
    room = max(1, min(WIDTH, shutil.get_terminal_size().columns - 2))
    return max(1, min(room, round(2 * HEIGHT * size[0] / size[1])))
