"""Fewer tiles than the model knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import TinyFiles, noisy_image
from preprocess_cases import GOLDEN, golden_hash, make_image

from mllama_gguf import ImageError, Mllama, RequestError, preprocess_image
from mllama_gguf.cli.main import cli
from mllama_gguf.vision.preprocess import supported_grids

Files = Callable[[str], TinyFiles]
FEWER = [case for case in GOLDEN["cases"] if case["max_tiles"] in (1, 2, 3)]
WIDE = noisy_image(1, 40, 160)  # four tiles in a row


@pytest.fixture(scope="module")
def model(tiny_files: Files) -> Iterator[Mllama]:
    with Mllama(tiny_files("gqa").one, n_ctx=256, n_threads=1, image_cache=False) as opened:
        yield opened


@pytest.mark.parametrize("case", FEWER, ids=lambda c: f"{c['size'][0]}x{c['size'][1]}-{c['max_tiles']}")
def test_the_pixels_are_those_of_the_reference(case: dict[str, Any]) -> None:
    """Of its processor for so many tiles; but the grid has the number that a model of four gives it."""
    image = make_image(case["mode"], *case["size"])
    sizes = {"tile_size": case["tile_size"], "max_tiles": case["max_tiles"]}
    tiled = preprocess_image(image, **sizes, model_tiles=4)
    assert tiled.sha256 == golden_hash(case)
    assert tiled.n_tiles == case["n_tiles"] <= case["max_tiles"]
    grid = supported_grids(case["max_tiles"])[case["aspect_ratio_id"] - 1]
    assert supported_grids(4)[tiled.aspect_ratio_id - 1] == grid == (tiled.rows, tiled.columns)


def test_the_golden_file_has_other_numbers_too() -> None:
    """Else the test above could not tell."""
    numbers = {
        (
            case["aspect_ratio_id"],
            preprocess_image(
                make_image(case["mode"], *case["size"]), tile_size=8, max_tiles=2, model_tiles=4
            ).aspect_ratio_id,
        )
        for case in FEWER
        if case["max_tiles"] == 2
    }
    assert (3, 5) in numbers


def test_room_for_all_tiles() -> None:
    one = preprocess_image(WIDE, tile_size=16, max_tiles=2, model_tiles=4)
    assert one.pixels.shape == (2, 3, 16, 16)
    four = one.for_model(4)
    assert four.pixels.shape == (4, 3, 16, 16)
    assert (four.pixels[:2] == one.pixels).all() and not four.pixels[2:].any()
    assert (four.n_tiles, four.aspect_ratio_id) == (one.n_tiles, one.aspect_ratio_id) == (2, 2)
    assert four.for_model(4) is four
    assert not four.pixels.flags.writeable
    assert preprocess_image(WIDE, tile_size=16, max_tiles=9, model_tiles=4).n_tiles == 4


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 4])
def test_states_of_fewer_tiles(model: Mllama, max_tiles: int) -> None:
    h = model.hparams
    embedding = model.encode_image(WIDE, max_tiles=max_tiles)
    assert embedding.n_tiles == max_tiles
    tiled = preprocess_image(WIDE, tile_size=h.image_size, max_tiles=max_tiles)  # as of a smaller model
    again = model.encode_image(tiled)
    assert again.aspect_ratio_id == embedding.aspect_ratio_id
    assert (again.states == embedding.states).all()
    assert again.key == embedding.key
    with model.image_encoder() as encoder:
        assert (encoder.encode(WIDE, max_tiles=max_tiles).states == embedding.states).all()


def test_keys_tell_them_apart(model: Mllama) -> None:
    keys = {model.encode_image(WIDE, max_tiles=n).key for n in (1, 2, 3, 4)}
    assert len(keys) == 4
    assert model.encode_image(WIDE).key in keys
    square = noisy_image(2, 20, 20)  # one tile in any case: computed once
    assert len({model.encode_image(square, max_tiles=n).key for n in (1, 4, None)}) == 1


@pytest.mark.parametrize("image_cache", [True, False])
def test_captions(tiny_files: Files, tmp_path: Path, image_cache: bool) -> None:
    cache = tmp_path if image_cache else False
    options: dict[str, Any] = {"max_tokens": 6, "grammar": "root ::= [a-z ] root", "logprobs": True}

    def told(model: Mllama, **more: Any) -> list[float]:
        reply = model.reply(image=WIDE, **options, **more)
        reply.read()
        return [one.logprob for one in reply.logprobs]

    with Mllama(tiny_files("gqa").one, n_ctx=256, image_cache=cache) as model:
        four, one = told(model), told(model, max_tiles=1)
        assert four != one
        assert told(model, max_tiles=4) == pytest.approx(four, abs=1e-4)
        assert told(model, max_tiles=1) == pytest.approx(one, abs=1e-4)
        assert told(model, max_tiles=99) == pytest.approx(four, abs=1e-4)
    with Mllama(tiny_files("gqa").one, n_ctx=256, image_cache=cache, max_tiles=1) as model:
        assert model.max_tiles == 1
        assert told(model) == pytest.approx(one, abs=1e-4)
        assert told(model, max_tiles=4) == pytest.approx(four, abs=1e-4)  # a call goes before the setting
        assert model.encode_image(WIDE).n_tiles == 1


def test_details_of_image_parts(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    prepare = model._shared.images.prepare

    def watched(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        seen.append(prepared.n_tiles)
        return prepared

    monkeypatch.setattr(model._shared.images, "prepare", watched)

    def tiles(*details: str | None, **options: Any) -> list[int]:
        seen.clear()
        parts: list[Any] = [
            {"type": "image_url", "image_url": {"url": WIDE, "detail": detail}} for detail in details
        ]
        model.create_chat_completion([{"role": "user", "content": parts}], max_tokens=1, **options)
        return list(seen)

    assert tiles("low", "high", "auto", None, "original") == [1, 4, 4, 4, 4]
    assert tiles("low", "high", None, max_tiles=2) == [1, 2, 2]
    assert tiles("high", max_tiles=np.int64(3)) == [3]


def test_what_is_cut_already(model: Mllama) -> None:
    h = model.hparams
    tiled = preprocess_image(WIDE, tile_size=h.image_size, max_tiles=4)
    embedding = model.encode_image(tiled)
    for image, name in ((tiled, "TiledImage"), (embedding, "ImageEmbedding")):
        for use in (model.caption, model.encode_image):
            with pytest.raises(ImageError, match=f"{name} of 4 tiles, but max_tiles is 1"):
                use(image, max_tiles=1)  # type: ignore[operator]
        assert model.encode_image(image, max_tiles=4).n_tiles == 4
    more = preprocess_image(noisy_image(1, 20, 400), tile_size=h.image_size, max_tiles=6)
    assert more.n_tiles > h.max_tiles
    with pytest.raises(ImageError, match="this model takes at most 4 of"):
        model.encode_image(more)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_numbers_that_cannot_be(model: Mllama, tiny_files: Files, value: Any) -> None:
    for use in (
        lambda: model.caption(WIDE, max_tiles=value),
        lambda: model.encode_image(WIDE, max_tiles=value),
        lambda: Mllama(tiny_files("gqa").one, max_tiles=value),
        lambda: preprocess_image(WIDE, model_tiles=value),
    ):
        with pytest.raises(RequestError, match="_tiles must be a whole number"):
            use()


class TestCommands:
    @pytest.fixture
    def wide(self, tmp_path: Path) -> Path:
        from PIL import Image

        Image.fromarray(WIDE).save(tmp_path / "wide.png")
        return tmp_path / "wide.png"

    def run(self, *arguments: object) -> str:
        result = CliRunner().invoke(cli, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_plan(self, tiny_files: Files) -> None:
        path = tiny_files("gqa").one
        plans = {n: json.loads(self.run("plan", path, "--json", "--max-tiles", n)) for n in (1, 2, 4)}
        assert [plan["n_tiles"] for plan in plans.values()] == [[1], [2], [4]]
        cross = [plan["settings"][0]["devices"][0]["cross_kv"] for plan in plans.values()]
        assert cross[0] < cross[1] < cross[2]
        assert json.loads(self.run("plan", path, "--json"))["n_tiles"] == [4]

    def test_preprocess(self, wide: Path) -> None:
        for n, grid in ((1, (1, 1)), (2, (1, 2)), (4, (1, 4))):
            shown = json.loads(self.run("preprocess", wide, "--json", "--tile-size", 28, "--max-tiles", n))
            assert (shown["rows"], shown["columns"]) == grid
            assert shown["aspect_ratio_id"] == supported_grids(4).index(grid) + 1

    def test_caption_and_batch(self, wide: Path, tiny_files: Files, tmp_path: Path) -> None:
        options = ["-m", tiny_files("gqa").one, "--max-tokens", 12, "--no-cache"]
        captions = {n: self.run("caption", wide, *options, "--max-tiles", n).strip() for n in (1, 4)}
        assert captions[1] != captions[4]
        for n, caption in captions.items():
            out = tmp_path / f"{n}.jsonl"
            self.run("caption", wide, *options, "--max-tiles", n, "--out", out)
            assert json.loads(out.read_text("utf-8").splitlines()[-1])["caption"].strip() == caption
