"""A drawing of where the words of a reply looked."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from ..vision.drawing import DIM, INK, LINE, PAPER, Font, font, readable
from ..words import printable
from .attend import Attention, Look

MARGIN, GAP, TEXT = 24, 18, 19  # pixels
PANEL, ONE = 300, 860  # longer side of an image among others, and of one alone
COLUMNS, MOST = 5, 60  # panels in a row, panels in all
# Colours of weights from none to the most of a word.
STOPS = ((255, 247, 236), (253, 212, 158), (252, 141, 89), (215, 48, 31), (110, 0, 12))


def draw(attention: Attention, image: Image.Image, words: Sequence[Look], prompt: str = "") -> Image.Image:
    """A panel for each word: the image in pale grey, under the colour of the weights; beside them the text.

    image: upright RGB, from which `attention.image` was made
    words: of the attention; those after the first 60 are only counted
    """
    shown = list(words[:MOST])
    side = ONE if len(shown) == 1 else PANEL
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS)
    panels = [(look, overlay(attention, look, small)) for look in shown]
    wide = max(size[0], 110)  # a word needs room too
    columns = min(COLUMNS, len(panels) + 1) if len(panels) > 1 else 1
    width = max(2 * MARGIN + columns * (wide + GAP) - GAP, 560)
    lines: list[tuple[str, str, int, Font]] = []
    for text, colour, pixels in ((prompt, DIM, TEXT), (attention.text, INK, TEXT + 5)):
        text, letters = readable(printable(text), pixels)
        lines += [(line, colour, pixels, letters) for line in wrap(text, letters, width - 2 * MARGIN)]
    if len(words) > len(shown):
        lines.append((f"{len(words) - len(shown)} more words are not shown", DIM, TEXT, font(TEXT)))
    top = MARGIN + sum(round(pixels * 1.5) for _, _, pixels, _ in lines) + GAP
    below = round(TEXT * 2.8)  # of a panel
    cells = len(panels) + (columns > 1)  # the image itself stands first
    n_rows = -(-cells // columns)
    height = top + n_rows * (size[1] + below + GAP) + 40 + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    y = MARGIN
    for line, colour, pixels, letters in lines:
        pen.text((MARGIN, y), line, fill=colour, font=letters)
        y += round(pixels * 1.5)
    first = [(None, small)] if columns > 1 else []
    for number, (look, panel) in enumerate((*first, *panels)):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (wide + GAP), top + row * (size[1] + below + GAP)
        page.paste(panel, (x, y))
        pen.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=LINE if look is None else DIM)
        if look is not None:
            most = f"most: {attention.inside(look.weights).max():.1%} in one patch"
            text, letters = readable(printable(look.text[:1000], keep=""), TEXT)
            pen.text((x, y + size[1] + 5), fit(text, letters, wide), fill=INK, font=letters)
            pen.text((x, y + size[1] + 8 + TEXT), fit(most, font(12), wide), fill=DIM, font=font(12))
    _legend(pen, height - MARGIN - 30, attention)
    return page


def overlay(attention: Attention, look: Look, image: Image.Image) -> Image.Image:
    """The image in pale grey under the colours of a word's weights."""
    weights = attention.map(look.weights, image.size)
    share = weights / max(float(weights.max()), 1e-12)
    grey = np.asarray(ImageOps.grayscale(image), np.float32)[..., None] * 0.72 + 66
    strength = np.sqrt(np.clip(share, 0, 1))[..., None] * 0.86
    mixed = grey * (1 - strength) + colours(share) * strength
    return Image.fromarray(np.rint(np.clip(mixed, 0, 255)).astype(np.uint8))


def colours(share: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """RGB of shares from 0 to 1, in an array with one dimension more."""
    places = np.linspace(0, 1, len(STOPS))
    return np.stack([np.interp(share, places, [stop[i] for stop in STOPS]) for i in range(3)], -1)


def wrap(text: str, letters: Font, width: int) -> list[str]:
    """A text in lines that are at most so wide, in pixels; long words are cut."""
    lines: list[str] = []
    for part in printable(text).split("\n"):
        line = ""
        for word in part.split():
            wanted = f"{line} {word}".strip()
            if line and letters.getlength(wanted) > width:
                lines.append(line)
                wanted = word
            line = fit(wanted, letters, width)
        lines += [line] if line else []
    return lines


def fit(text: str, letters: Font, width: int) -> str:
    """The text, or as much of it as has room."""
    text = text[:1000]  # more never has room, and takes long to measure
    if letters.getlength(text) <= width:
        return text
    n = bisect_left(range(len(text)), True, key=lambda n: letters.getlength(f"{text[: n + 1]}...") > width)
    return f"{text[:n]}..."


def _legend(pen: ImageDraw.ImageDraw, y: int, attention: Attention) -> None:
    """A bar from no weight to the most of a word, and what the weights are."""
    for x in range(160):
        colour = tuple(int(value) for value in np.rint(colours(np.array(x / 159))))
        pen.line((MARGIN + 46 + x, y, MARGIN + 46 + x, y + 14), fill=colour)
    pen.text((MARGIN, y), "none", fill=DIM, font=font(14))
    n = len(attention.layers)
    layers = f"layer {attention.layers[0]}" if n == 1 else f"mean of {n} layers"
    pen.text(
        (MARGIN + 214, y), f"most; each word has its own scale; {layers}, all heads", fill=DIM, font=font(14)
    )
