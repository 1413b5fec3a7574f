"""The drawing of tiles: pixels stand where `position` says, and what is no image is hatched."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import noisy_image

from mllama_gguf.vision import drawing
from mllama_gguf.vision.drawing import LINE, PAPER, TileDrawing
from mllama_gguf.vision.preprocess import TiledImage, preprocess_image

SIZES = [(40, 40), (300, 100), (90, 400), (97, 203), (1, 500), (250, 240)]


def colour(words: str) -> list[int]:
    return list(bytes.fromhex(words[1:]))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_tiles(size: tuple[int, int]) -> None:
    tiled = preprocess_image(noisy_image(1, *size), tile_size=80)
    drawn = TileDrawing(tiled)
    image = np.asarray(drawn.image)
    assert (image[0, 0] == colour(PAPER)).all() and (image[-1, -1] == colour(PAPER)).all()
    for index in range(tiled.n_tiles):
        row, column = divmod(index, tiled.columns)
        x, y = drawn.position(row, column)
        tile = np.asarray(tiled.tile_picture(index))
        width = min(max(tiled.resized_size[0] - column * 80, 0), 80)
        height = min(max(tiled.resized_size[1] - row * 80, 0), 80)
        shown = image[y : y + 80, x : x + 80]
        np.testing.assert_array_equal(shown[:height, :width], tile[:height, :width])
        outside = np.ones((80, 80), bool)
        outside[:height, :width] = False
        assert not tile[outside].any()
        assert outside.sum() < 200 or 0.02 < shown[outside].any(-1).mean() < 0.5
        for edge in (image[y - 1, x : x + 80], image[y + 80, x : x + 80], image[y : y + 80, x + 80]):
            assert (edge == colour(LINE)).all()
    # No two tiles overlap, and the words above stand between frames.
    places = [drawn.position(*divmod(index, tiled.columns)) for index in range(tiled.n_tiles)]
    for a in range(len(places)):
        for b in range(a):
            assert max(abs(p - q) for p, q in zip(places[a], places[b], strict=True)) >= 80 + 4


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
