"""The image in the clipboard, where the system gives one."""

from __future__ import annotations

import io
import os

from ..errors import ImageError
from ..words import one_line


def image_in_clipboard() -> bytes:
    """The file of the image in the clipboard, or that image as PNG. Raises ImageError.

    Pillow asks macOS itself, and on Linux wl-paste (Wayland) or xclip (X11).
    """
    from PIL import Image, ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError, ValueError) as e:
        way_out = "on Linux install wl-clipboard or xclip"
        raise ImageError(f"the clipboard cannot be read: {one_line(e)}; {way_out}") from e
    if isinstance(found, list) and found:  # names of files
        with open(os.fspath(found[0]), "rb") as file:
            return file.read()
    if not isinstance(found, Image.Image):
        raise ImageError("there is no image in the clipboard")
    png = io.BytesIO()
    found.save(png, "png")
    return png.getvalue()
