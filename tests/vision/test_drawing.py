"""The drawing of tiles: pixels stand where `position` says, and what is not an image is hatched."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import noisy_image

from mllama_gguf.vision import drawing
from mllama_gguf.vision.drawing import LINE, PAPER, TileDrawing, readable
from mllama_gguf.vision.preprocess import TiledImage, preprocess_image

SIZES = [(40, 40), (300, 100), (90, 400), (97, 203), (1, 500), (250, 240)]


def colour(words: str) -> list[int]:
    return list(bytes.fromhex(words[1:]))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_tiles(size: tuple[int, int]) -> None:
    tiled = preprocess_image(noisy_image(1, *size), tile_size=80)
    drawn = TileDrawing(tiled)
    image = np.asarray(drawn.image)
    zoom, side = drawn.zoom, drawn.side
    assert zoom == 3 and side == 240  # small tiles are enlarged: each pixel is a square
    assert (image[0, 0] == colour(PAPER)).all() and (image[-1, -1] == colour(PAPER)).all()
    for index in range(tiled.n_tiles):
        row, column = divmod(index, tiled.columns)
        x, y = drawn.position(row, column)
        tile = np.asarray(tiled.tile_picture(index))
        width = min(max(tiled.resized_size[0] - column * 80, 0), 80)
        height = min(max(tiled.resized_size[1] - row * 80, 0), 80)
        for inner in range(zoom):
            shown = image[y + inner : y + side : zoom, x + inner : x + side : zoom]
            np.testing.assert_array_equal(shown[:height, :width], tile[:height, :width])
        shown = image[y : y + side, x : x + side]
        outside = np.ones((side, side), bool)
        outside[: height * zoom, : width * zoom] = False
        assert not tile[outside[::zoom, ::zoom]].any()
        assert outside.sum() < 200 or 0.02 < shown[outside].any(-1).mean() < 0.5
        for edge in (
            image[y - 1, x : x + side],
            image[y + side, x : x + side],
            image[y : y + side, x + side],
        ):
            assert (edge == colour(LINE)).all()
    # No two tiles overlap, and the words above stand between frames.
    places = [drawn.position(*divmod(index, tiled.columns)) for index in range(tiled.n_tiles)]
    for a in range(len(places)):
        for b in range(a):
            assert max(abs(p - q) for p, q in zip(places[a], places[b], strict=True)) >= side + 4


def test_large_tiles_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LARGEST", 100)
    tiled = preprocess_image(noisy_image(2, 150, 300), tile_size=101)
    drawn = TileDrawing(tiled)
    assert drawn.step == 3 and drawn.side == 34 and tiled.columns == 2
    x, y = drawn.position(0, 1)
    shown = np.asarray(drawn.image.crop((x, y, x + 34, y + 34)), float)
    assert np.abs(shown.mean((0, 1)) - np.asarray(tiled.tile_picture(1), float).mean((0, 1))).max() < 3


def test_words_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of a pixel, and Pillow without FreeType."""
    for side in (1, 7):
        tiled: TiledImage = preprocess_image(noisy_image(3, 5, 3), tile_size=side, max_tiles=1)
        assert TileDrawing(tiled).image.width > 150

    def missing(size: float | None = None) -> object:
        if size is not None:
            raise ImportError("no FreeType")
        return plain

    plain = drawing.ImageFont.load_default_imagefont()
    monkeypatch.setattr(drawing.ImageFont, "load_default", missing)
    assert TileDrawing(preprocess_image(noisy_image(4), tile_size=80)).image.width > 80


def test_every_text_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own font has ASCII alone. Others are the system's; what no font has is written in ASCII."""
    assert readable("plain", 19)[0] == "plain"
    text = "\u201cCaf\u00e9\u201d, na\u00efve \u2014 \u00bd \u732b e\u0301"
    for name in ("none.ttf", *drawing.SYSTEM_FONTS):
        monkeypatch.setattr(drawing, "SYSTEM_FONTS", (name,))
        words, letters = readable(text, 19)
        box = bytes(letters.getmask("\uffff"))
        for c in set(words) - {" ", "\u0301"}:
            assert bytes(letters.getmask(c)) != box
    monkeypatch.setattr(drawing, "SYSTEM_FONTS", ())
    assert readable(text, 19)[0] == '"Cafe", naive - 1/2 \\u732b e'
