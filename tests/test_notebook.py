"""Objects as notebooks show them, and the notebook of examples/: its cells run as they are.

The cells run in this process, and what is last in a cell is shown, as IPython does it: a kernel and its
clients are a dozen packages, and would run the same lines.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import noisy_image
from PIL import Image

from mllama_gguf import ImageEmbedding, Mllama, Reply, TiledImage, preprocess_image

NOTEBOOK = Path(__file__).parents[1] / "examples" / "look.ipynb"
HOSTILE = "</div><script>alert(1)</script>\"'\x1b[31m &amp; \udcff"


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = notebook_cells()
    shown: list[Any] = []
    names: dict[str, Any] = {"__name__": "__main__", "display": shown.append}
    monkeypatch.chdir(NOTEBOOK.parent)
    for number, source in enumerate(cells):
        tree = ast.parse(source, f"cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
            shown += [] if value is None else [value]
    assert "a red apple to the left of a black cat" in shown
    assert capsys.readouterr().out == "a red apple to the left of a black cat"
    kinds = [type(value) for value in shown]
    assert {TiledImage, ImageEmbedding, Reply, Image.Image, dict} <= set(kinds)
    for value in shown:
        if hasattr(value, "_repr_html_"):
            assert well_formed(value._repr_html_())


def notebook_cells() -> list[str]:
    """The code of the notebook, which is of format 4.5 and holds no outputs."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[a-zA-Z0-9-_]{1,64}", one) for one in ids)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(cell["cell_type"] in ("code", "markdown") for cell in notebook["cells"])
    return ["".join(cell["source"]) for cell in code]


class Tags(HTMLParser):
    """Which elements there are, and which of them are open at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "img"), tag
        assert {name for name, _ in attrs} <= {"style", "src", "alt", "width", "height"}
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def well_formed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    assert all(one.startswith("data:image/jpeg;base64,") for one in tags.images)
    return tags


def pixels(address: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))), np.int16)


def test_tiles_and_embeddings() -> None:
    array = np.zeros((40, 160, 3), np.uint8)
    array[:, 80:] = (0, 0, 250)
    tiled = preprocess_image(array, tile_size=80)
    tags = well_formed(tiled._repr_html_())
    assert "image 160 x 40" in tags.text and "1 x 2 of 80 x 80" in tags.text
    black, blue = map(pixels, tags.images)
    assert black.max() < 30 and blue[:20, :, 2].min() > 200 and blue[60:].max() < 40

    states = np.ones((2, 10, 4), np.float32)
    states[1, 5] = 9  # the patch in row 1, column 1 of the second tile
    tags = well_formed(ImageEmbedding(states, 3, key=HOSTILE)._repr_html_())
    assert "2 x 10 x 4 (tiles, positions, values)" in tags.text and "</div><scri" in tags.text
    first, second = map(pixels, tags.images)
    assert first.max() < 30 and second[50:70, 50:70].min() > 200 and second[:35].max() < 60
    assert well_formed(ImageEmbedding(np.ones((1, 8, 2), np.float32), 1)._repr_html_()).images == []
    assert well_formed(ImageEmbedding(np.ones((1, 1, 2), np.float32), 1)._repr_html_()).images == []


def test_a_reply_is_shown_as_far_as_it_was_read() -> None:
    with Mllama.from_pretrained("demo", image_cache=False) as model:
        reply = model.reply(image=noisy_image(1), prompt=HOSTILE, temperature=0.0)
        tags = well_formed(reply._repr_html_())
        assert "nothing yet" in tags.text and not reply.stats.completion_tokens  # nothing was computed
        text = next(reply)
        assert text in well_formed(reply._repr_html_()).text
        text += reply.read()
        tags = well_formed(reply._repr_html_())
        assert text in tags.text and f"ended by {reply.finish_reason}" in tags.text
    from mllama_gguf.decode.writer import Stats

    made = Reply(iter([HOSTILE]), Stats(), reply._cancelled)
    made.read()
    assert "</div><script>alert(1)</script>\"'\\x1b[31m &amp; \\udcff" in well_formed(made._repr_html_()).text
