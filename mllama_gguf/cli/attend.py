"""`mllama attend`: where each word of a reply looked."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from ..files import Kind, check_output
from ..settings import DEFAULT_PROMPT
from .opening import open_chosen
from .options import ModelChoice, model_options
from .replies import allow_truncated_option, max_pixels_option
from .terminal import echo, echo_json, table_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..inspect.attend import Attention, Look

PROGRAM = "mllama attend"
MAP = Kind.png_by(f"map of `{PROGRAM}`", PROGRAM)


@click.command(
    "attend",
    epilog="\b\nExamples:\n"
    "  mllama attend photo.jpg -o map.png\n"
    "  mllama attend photo.jpg -p 'What is on the table?' --word cup -o cup.png\n"
    "  mllama attend photo.jpg --layer 13 --json",
)
@click.argument("image", metavar="IMAGE")
@click.option("-p", "--prompt", default=DEFAULT_PROMPT, show_default=True, help="Ask this about the image.")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="FILE.png",
    help="Draw the words over the image into this file.",
)
@click.option("--word", metavar="WORD", help="Use only this word of the reply, in upper or lower case.")
@click.option(
    "--layer",
    type=click.IntRange(0),
    metavar="N",
    help="Use only the cross-attention layer with this number.  [default: the mean of all]",
)
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest reply."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with the weights of each word.")
@click.option("--overwrite", is_flag=True, help="Replace a map of an earlier run.")
@max_pixels_option
@allow_truncated_option
@model_options
def attend_command(
    image: str,
    prompt: str,
    output: str | None,
    word: str | None,
    layer: int | None,
    max_tokens: int,
    as_json: bool,
    overwrite: bool,
    max_pixels: int | None,
    allow_truncated: bool,
    choice: ModelChoice,
) -> None:
    """Ask about IMAGE, and show for each word of the reply where its cross-attention looked.

    Prints a line for each word: its share of every tile, and the pixel of the image where it looked most. The
    weights are the mean over all heads and over the layers. They tell what the model read from the image, not
    why it chose the word.
    """
    from PIL.PngImagePlugin import PngInfo

    from ..inspect.attend import as_dict, attend, layers_of
    from ..inspect.attend_drawing import draw
    from ..vision.loading import load_image
    from ..vision.preprocess import preprocess_image
    from .preprocess import write_output

    inputs = [image, choice.name, *([choice.mmproj] if choice.mmproj else [])]
    if output is not None:
        check_output(output, MAP, inputs=inputs, overwrite=overwrite)
    whole = load_image(image, max_pixels=max_pixels, allow_truncated=allow_truncated)
    with open_chosen(choice) as model:
        shape = model.hparams
        layers_of(shape, layer)
        tiled = preprocess_image(
            whole,
            tile_size=shape.image_size,
            max_tiles=model.max_tiles,
            model_tiles=shape.max_tiles,
            max_pixels=max_pixels,
        ).for_model(shape.max_tiles)
        found = attend(model, tiled, prompt, layer=layer, max_tokens=max_tokens, temperature=0.0)
    words = found.words if word is None else found.find(word)
    if output is not None:
        about = PngInfo()
        about.add_text("Software", PROGRAM)
        drawing = draw(found, whole, words, prompt)
        write_output(output, partial(drawing.save, format="PNG", pnginfo=about), overwrite, MAP)
    if as_json:
        echo_json(as_dict(found, words))
    else:
        _print(found, words)


def _print(found: Attention, words: Sequence[Look]) -> None:
    from ..inspect.attend import as_dict

    echo(found.text)
    width = min(max((len(look.text) for look in words), default=0), table_width(40) // 2)
    for look in as_dict(found, words)["words"]:
        tiles = " ".join(f"{share:6.1%}" for share in look["tiles"])
        x, y = look["peak"]
        echo(f"  {look['word']:{width}}  tiles {tiles}  most at {x:.0f}, {y:.0f}")
