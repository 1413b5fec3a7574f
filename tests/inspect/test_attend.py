"""Where words looked: the weights against what the model computes, and their way back to the image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TinyFiles, noisy_image
from PIL import Image
from reference import Reference

from mllama_gguf import Mllama
from mllama_gguf.backend.types import Floats
from mllama_gguf.cli.main import run
from mllama_gguf.errors import RequestError
from mllama_gguf.inspect.attend import Attention, Look, _words, attend, weights_of
from mllama_gguf.inspect.attend_drawing import draw, fit, wrap
from mllama_gguf.store.resolve import resolve
from mllama_gguf.vision.drawing import font
from mllama_gguf.vision.preprocess import TiledImage, preprocess_image

EXAMPLES = Path(__file__).parents[2] / "examples"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def demo() -> Iterator[Mllama]:
    with Mllama(resolve("demo").paths[0], image_cache=False) as model:
        yield model


def tiled_for(model: Mllama, image: Any, max_tiles: int | None = None) -> TiledImage:
    h = model.hparams
    tiled = preprocess_image(
        image, tile_size=h.image_size, max_tiles=max_tiles or h.max_tiles, model_tiles=h.max_tiles
    )
    return tiled.for_model(h.max_tiles)


@pytest.mark.parametrize("arch", ["square", "gqa"])
def test_weights_times_values_are_the_output(tiny_files: Callable[[str], TinyFiles], arch: str) -> None:
    """What is computed from the taps of q and k, times the tapped v, times W_o, is the tapped output."""
    files = tiny_files(arch)
    weights = Reference(files.one).weights
    seen: dict[str, list[Floats]] = {}

    def on_tensor(name: str, values: Floats | None) -> bool:
        if values is not None:
            seen.setdefault(name, []).append(values.copy())
        return "cross_" in name or "attn_out" in name

    with Mllama(files.one, type_k="f32", type_v="f32", image_cache=False) as model:
        h = model.hparams
        tiled = tiled_for(model, noisy_image(1, 3 * h.image_size, 2 * h.image_size))
        assert tiled.n_tiles > 1
        tokens = [h.image_token_id, 5, 6, 7]
        with model.tap(on_tensor):
            model.logits(tokens, [tiled])
        for il in h.cross_layers:
            (q,) = seen[f"blk.{il}.cross_q"]
            keys, values = seen[f"blk.{il}.cross_k"], seen[f"blk.{il}.cross_v"]
            assert len(keys) == tiled.n_tiles
            found = weights_of(q, keys, h)
            assert found.shape == (len(tokens), h.n_head, tiled.n_tiles * h.n_positions)
            np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
            v = np.concatenate(values).reshape(-1, h.n_head_kv, h.head_dim)
            v = v.repeat(h.n_head // h.n_head_kv, axis=1)
            out = np.einsum("nhr,rhd->nhd", found, v).reshape(len(tokens), -1)
            out = out @ weights[f"blk.{il}.cross_attn_o_proj.weight"].T
            (expected,) = seen[f"blk.{il}.attn_out"]
            assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()


def test_each_token_has_the_weights_of_its_own_position(demo: Mllama) -> None:
    """The rows of a reply, against those of one run over the prompt and the reply."""
    tiled = tiled_for(demo, EXAMPLES / "apple-and-cat.png")
    found = attend(demo, tiled, layer=demo.hparams.cross_layers[-1], temperature=0.0)
    assert found.text == "a red apple to the left of a black cat"
    assert [look.text for look in found.words] == found.text.split()
    conversation = demo._conversation
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiled}, {"type": "text", "text": "Describe this image."}],
        }
    ]
    tokens, _ = conversation.prompt(messages)
    written = demo.tokenize(found.text, add_bos=False)
    demo.reset()
    seen: dict[str, list[Floats]] = {"k": [], "q": []}

    def on_tensor(name: str, values: Floats | None) -> bool:
        if values is not None:
            seen[name[-1]].append(values.copy())
        return name in {f"blk.{found.layers[0]}.cross_{kind}" for kind in "qk"}

    with demo.tap(on_tensor):
        demo.logits([*tokens, *written], [tiled])
    q = np.concatenate([one.reshape(-1, seen["q"][0].shape[-1]) for one in seen["q"]])
    rows = weights_of(q, seen["k"], demo.hparams).mean(1)[-len(written) - 1 : -1]
    again = list(_words([demo.detokenize([token]).encode() for token in written], [
        row.reshape(tiled.n_tiles, -1) for row in rows
    ]))  # fmt: skip
    for look, other in zip(found.words, again, strict=True):
        np.testing.assert_allclose(look.weights, other.weights, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("apple-and-cat", {"apple": (0, 0.5, 0, 1), "cat": (0.5, 1, 0, 1)}),
        ("wide", {"car": (0, 0.5, 0, 1), "heart": (0.5, 1, 0, 1)}),
        ("tall", {"balloon": (0, 1, 0, 0.5), "star": (0, 1, 0.5, 1)}),
    ],
)
def test_words_look_at_their_objects(
    demo: Mllama, name: str, places: dict[str, tuple[float, float, float, float]]
) -> None:
    """Left, right, upper or lower half of the image: where the object is."""
    found = attend(demo, tiled_for(demo, EXAMPLES / f"{name}.png"), temperature=0.0)
    width, height = found.image.image_size
    for word, (left, right, top, bottom) in places.items():
        (look,) = found.find(f"{word.upper()}!")
        np.testing.assert_allclose(look.weights.sum(), 1, rtol=1e-5)
        shown = found.map(look.weights)
        assert shown.shape == (height, width)
        half = shown[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
        assert half.sum() > 0.7 * shown.sum()
        x, y = found.peak(look.weights)
        assert left * width <= x <= right * width and top * height <= y <= bottom * height


def patches_of(tiled: TiledImage) -> Floats:
    """How much of each patch is image, float32 [tiles, patches]."""
    across, down = (
        np.clip((length - np.arange(0, whole, 16)) / 16, 0, 1)
        for length, whole in zip(tiled.resized_size, tiled.canvas_size, strict=True)
    )
    share = np.outer(down, across).reshape(tiled.rows, 5, tiled.columns, 5)
    return share.transpose(0, 2, 1, 3).reshape(tiled.n_tiles, 25).astype(np.float32)


SIZES = [(80, 80), (640, 400), (400, 640), (1000, 90), (90, 1000), (7, 5), (123, 457), (300, 300)]


@pytest.mark.parametrize("size", SIZES)
def test_the_way_back_to_the_image(size: tuple[int, int]) -> None:
    """A weight planted on the patch that shows a pixel comes back to that pixel, and no padding is shown."""
    tiled = preprocess_image(noisy_image(1, size[1], size[0]), tile_size=80)
    found = Attention(tiled, "", (), (1,))
    width, height = size
    for at in ((0.04, 0.04), (0.96, 0.04), (0.5, 0.5), (0.04, 0.96), (0.7, 0.3)):
        x, y = int(at[0] * width), int(at[1] * height)
        cx, cy = (x + 0.5) * tiled.resized_size[0] / width, (y + 0.5) * tiled.resized_size[1] / height
        tile = int(cy // 80) * tiled.columns + int(cx // 80)
        patch = int(cy % 80 // 16) * 5 + int(cx % 80 // 16)
        weights = np.zeros((tiled.n_tiles, 26), np.float32)
        weights[tile, 1 + patch] = 1
        shown = found.map(weights)
        assert shown.shape == (height, width)
        assert shown[y, x] >= 0.24 * shown.max() > 0
        # Nothing further away than the patch and its neighbours' middles.
        reach = [16 * whole / now for whole, now in zip(size, tiled.resized_size, strict=True)]
        ys, xs = np.nonzero(shown > 1e-6)
        assert np.abs(xs - x).max() <= 1.5 * reach[0] + 1 and np.abs(ys - y).max() <= 1.5 * reach[1] + 1
        px, py = found.peak(weights)
        assert abs(px - x) <= reach[0] / 2 + 1 and abs(py - y) <= reach[1] / 2 + 1
    weights = np.zeros((tiled.n_tiles, 26), np.float32)
    weights[:, 0] = 1 / tiled.n_tiles
    assert not found.map(weights).any() and not found.inside(weights).any()
    # Patches of the padding alone leave no trace at the edge of the image.
    weights = np.ones((tiled.n_tiles, 26), np.float32)
    weights[:, 1:][patches_of(tiled) > 0] = 0
    assert found.map(weights).max() < 1e-6
    weights = np.full((tiled.n_tiles, 26), 1.0, np.float32)
    area = np.prod(tiled.resized_size) / 256
    assert found.inside(weights).sum() == pytest.approx(area, rel=1e-4)
    np.testing.assert_allclose(found.map(weights), 1, rtol=1e-5)


def test_words_of_tokens() -> None:
    tokens = [
        "a",
        " red",
        " app",
        "le",
        ",",
        " \u732b".encode()[:2].decode("latin-1"),
        "",
        "  ",
        "so",
        "\n",
        "x",
    ]
    data = [token.encode() for token in tokens]
    data[5:6] = [" \u732b".encode()[:2], " \u732b".encode()[2:]]
    weights = [np.full((1, 2), number, np.float32) for number in range(len(data))]
    found = [(look.text, float(look.weights[0, 0])) for look in _words(data, weights)]
    assert found == [("a", 0), ("red", 1), ("apple,", 3), ("\u732b", 5.5), ("so", 9), ("x", 11)]
    attention = Attention(preprocess_image(noisy_image(1), tile_size=80), "a red apple,", (), (1,))
    with pytest.raises(RequestError, match="the reply has no word 'pear'; it is 'a red apple,'"):
        attention.find("pear")
    word = Look("\u00c9t\u00e9.", np.ones((1, 26), np.float32))
    assert replace(attention, words=(word,)).find("\u00e9T\u00c9") == (word,)
    assert replace(attention, words=(Look("...", word.weights),)).find("...")


def test_drawings(tmp_path: Path) -> None:
    """Any number of words, of any shape and text."""
    for size, n in (((40, 700), 1), ((900, 30), 3), ((50, 50), 62), ((1, 1), 2), ((30, 20), 0)):
        image = Image.fromarray(noisy_image(1, size[1], size[0]))
        tiled = preprocess_image(image, tile_size=80)
        weights = np.zeros((tiled.n_tiles, 26), np.float32)
        weights[0, 1] = 1
        words = tuple(Look("w\u732b\x1b[31m" * 30, weights) for _ in range(n))
        drawn = draw(Attention(tiled, "some text\nin lines " * 20, words, (1, 3)), image, words, "x" * 3000)
        assert drawn.width >= 560 and drawn.height > 100
    assert wrap("a b\x1b c", font(19), 10_000) == ["a b\\x1b c"]
    assert fit("x" * 100, font(19), 50).endswith("...")
    assert wrap("", font(19), 50) == []


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    image = str(EXAMPLES / "apple-and-cat.png")
    assert run(["attend", image, "-o", "map.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"].endswith("black cat") and found["layers"] == [1, 3] and found["grid"] == [2, 2]
    for word in found["words"]:
        assert len(word["tiles"]) == len(word["class_tokens"]) == 4
        assert sum(word["tiles"]) + sum(word["class_tokens"]) == pytest.approx(1, abs=1e-4)
        assert 0 <= word["padding"] < 1
    with Image.open("map.png") as whole:
        assert whole.info["Software"] == "mllama attend"
    assert run(["attend", image, "-o", "map.png", "--word", "cat", "--layer", "3", "--overwrite"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[1].split()[0] == "cat"
    with Image.open("map.png") as one:
        assert one.width > 800 > whole.height - 200
    for more, words in (
        (["--word", "dog"], "the reply has no word 'dog'"),
        (["--layer", "2"], "layer 2 has no cross-attention; these have: 1, 3"),
        (["-o", "map.png"], "it exists; --overwrite replaces it"),
    ):
        assert run(["attend", image, *more]) == 1
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_a_model_that_sees_nothing(
    tiny_files: Callable[[str], TinyFiles], tmp_path: Path, capsys: Captured
) -> None:
    assert run(["attend", str(EXAMPLES / "apple.png"), "-m", str(tiny_files("gqa").text)]) == 1
    assert "no vision encoder" in capsys.readouterr().err
