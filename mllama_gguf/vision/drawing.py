"""Drawings for people: the tiles of an image on their grid."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .preprocess import TiledImage

PAPER, INK, DIM, LINE = "#fbf9f6", "#221e1a", "#675e55", "#b3472e"
LARGEST = 4480  # pixels of a side; more are reduced
ROOM = 240  # pixels that the words above a tile need; smaller tiles are enlarged
MARGIN, GAP = 12, 6  # pixels
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def font(size: int) -> Font:
    """Pillow's own font, in pixels; of one size if Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):
        return ImageFont.load_default()


# Of the system, for what Pillow's own font has not: all but ASCII. Where one of them is, Pillow finds it.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "PingFang.ttc", "Arial.ttf"),
)


def readable(text: str, size: int) -> tuple[str, Font]:
    """A text and a font that has its characters. What no font has loses its accents, or becomes an escape:
    there is never an empty box."""
    own = font(size)
    if text.isascii():
        return text, own
    characters = sorted({c for c in text if not c.isspace()})
    least, best = [c for c in characters if not c.isascii()], own
    for name in SYSTEM_FONTS:
        found = _system_font(name, size) if least else None
        if found is not None:
            missing = [c for c in characters if not _has(name, size, c)]
            if len(missing) < len(least):
                least, best = missing, found
    return text.translate({ord(c): _plain(c) for c in least}), best


@lru_cache(64)
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except (ImportError, OSError):
        return None


@lru_cache(4096)
def _has(name: str, size: int, c: str) -> bool:
    """Whether a font of the system has a character: its box for missing ones looks the same each time."""
    letters = _system_font(name, size)
    assert letters is not None
    drawn, box = letters.getmask(c), letters.getmask("\uffff")
    return drawn.size != box.size or bytes(drawn) != bytes(box)


_SIGNS = {
    "\u2013": "-",
    "\u2014": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2022": "*",
}


def _plain(c: str) -> str:
    """A character in ASCII: without its accents, or as an escape."""
    parts = unicodedata.normalize("NFKD", _SIGNS.get(c, c)).replace("\u2044", "/")
    plain = "".join(part for part in parts if not unicodedata.combining(part))
    return plain if plain.isascii() else ascii(c)[1:-1]


class TileDrawing:
    """The tiles of an image apart from each other, each in a frame and with a line of words above it.

    image: RGB. The pixels of a tile are as the encoder gets them, before normalisation; black parts that are
           no part of the image are hatched
    step:  pixels of a tile that are one of the drawing, in either direction
    zoom:  pixels of the drawing that are one of a small tile
    """

    def __init__(self, tiled: TiledImage) -> None:
        self._tiled = tiled
        self.step = -(-max(tiled.canvas_size) // LARGEST)
        most = LARGEST // max(tiled.canvas_size)
        self.zoom = max(1, min(-(-ROOM // tiled.tile_size), most)) if self.step == 1 else 1
        self.side = -(-tiled.tile_size // self.step) * self.zoom
        size = max(12, self.side // 28)
        self._font, self._row = font(size), 2 * size
        (width, height), (new_width, new_height) = tiled.image_size, tiled.resized_size
        words = (
            f"{width} x {height} pixels, resized to {new_width} x {new_height}",
            f"{tiled.rows} x {tiled.columns} tiles (rows x columns) of {tiled.tile_size} x {tiled.tile_size}"
            f", aspect_ratio_id {tiled.aspect_ratio_id}",
        )
        self._top = MARGIN + len(words) * self._row
        wide = max(round(self._font.getlength(line)) for line in words)
        right = self.position(0, tiled.columns)[0] - GAP
        bottom = self.position(tiled.rows, 0)[1] - self._row
        self.image = Image.new("RGB", (max(right, MARGIN + wide) + MARGIN, bottom + MARGIN), PAPER)
        self._draw = ImageDraw.Draw(self.image)
        for number, line in enumerate(words):
            colour = INK if number == 0 else DIM
            self._draw.text((MARGIN, MARGIN + number * self._row), line, fill=colour, font=self._font)
        for index in range(tiled.n_tiles):
            self._draw_tile(index)

    def position(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of the first pixel of a tile."""
        x = MARGIN + column * (self.side + GAP)
        y = self._top + self._row + row * (self.side + self._row)
        return x, y

    def _draw_tile(self, index: int) -> None:
        tiled, side = self._tiled, self.side
        row, column = divmod(index, tiled.columns)
        x, y = self.position(row, column)
        tile = tiled.tile_picture(index)
        if self.side != tiled.tile_size:
            tile = tile.resize((side, side), Image.Resampling.BOX)  # enlarged: each pixel a square
        used = [
            min(max(whole - place * tiled.tile_size, 0), tiled.tile_size)
            for whole, place in zip(tiled.resized_size, (column, row), strict=True)
        ]
        self._hatch(tile, used)
        self.image.paste(tile, (x, y))
        self._draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=LINE, width=2)
        place = f"tile {index}: row {row}, column {column}"
        choices = [place, f"tile {index}", str(index), ""]
        if used != [tiled.tile_size] * 2:
            choices.insert(0, f"{place}, {used[0]} x {used[1]} used")
        words = next(one for one in choices if self._font.getlength(one) <= side)
        self._draw.text((x, y - 4), words, fill=DIM, font=self._font, anchor=self._anchor())

    def _anchor(self) -> str | None:
        """Words stand on the line that is drawn above a tile; a bitmap font knows no such place."""
        return "ls" if isinstance(self._font, ImageFont.FreeTypeFont) else None

    def _hatch(self, tile: Image.Image, used: list[int]) -> None:
        """Lines over the part of a tile that is not part of the image."""
        width, height = (-(-length * self.zoom // self.step) for length in used)
        if width >= self.side and height >= self.side:
            return
        lines = Image.new("1", tile.size)
        draw = ImageDraw.Draw(lines)
        for x in range(-self.side, self.side, 14):
            draw.line((x, self.side, x + self.side, 0), fill=1, width=1)
        if width and height:
            draw.rectangle((0, 0, width - 1, height - 1), fill=0)
        tile.paste("#5a5048", (0, 0), lines)
