"""`mllama preprocess`: what the vision encoder gets of an image, to compare by eye and by hash."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import numpy.typing as npt
from PIL.PngImagePlugin import PngInfo

from ..errors import MllamaError, ModelError
from ..files import Kind, cannot_write, check_folder, check_output, replacing
from ..vision.drawing import TileDrawing
from ..vision.preprocess import MAX_TILES, TILE_SIZE, TiledImage, preprocess_image
from ..words import brief, printable
from .options import setting_option
from .replies import allow_truncated_option, max_pixels_option
from .terminal import echo, echo_json

FIRST_VALUES = 10
MOST_TILE_SIZE, MOST_TILES = 4096, 64  # beyond any model, within memory
PROGRAM = "mllama preprocess"
TILE = Kind.png_by(f"tile of `{PROGRAM}`", PROGRAM)
PIXELS = Kind("NumPy file of pixels", lambda file: npy_shape(file)[1:2] == (3,))


@click.command(
    "preprocess",
    epilog="\b\nExamples:\n"
    "  mllama preprocess cat.jpg\n"
    "  mllama preprocess --json *.png | jq .sha256\n"
    "  mllama preprocess cat.jpg -m mmproj.gguf --out cat.npy --png tiles/",
)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each image, one a line.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    metavar="FILE.npy",
    help="Write the pixels, float32 [tiles, 3, size, size], for NumPy. One image only.",
)
@click.option(
    "--png",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Write every tile as DIR/NAME_row_column.png, and a drawing of all with their sizes as "
    "DIR/NAME_grid.png. The folder is made if it is missing.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE.npy and PNGs of an earlier run.")
@click.option(
    "--tile-size",
    type=click.IntRange(1, MOST_TILE_SIZE),
    help=f"Side of a tile in pixels.  [default: the model's, or {TILE_SIZE}]",
)
@setting_option("max_tiles", default=f"the model's, or {MAX_TILES}")
@click.option(
    "-m",
    "--model",
    metavar="NAME|PATH",
    help="Take the size and number of tiles from a model: the GGUF file that holds the vision encoder, or a "
    "bundled model's name.",
)
@max_pixels_option
@allow_truncated_option
def preprocess_command(
    images: tuple[str, ...],
    as_json: bool,
    out: str | None,
    png: str | None,
    overwrite: bool,
    tile_size: int | None,
    max_tiles: int | None,
    model: str | None,
    max_pixels: int | None,
    allow_truncated: bool,
) -> None:
    """Show the input of the vision encoder for each IMAGE (a file or a data URI).

    It prints the sizes, the tile grid, the first ten values of each used tile (red channel, top row, from
    left to right) and the sha256 of all pixels (float32, with the unused tiles). A file that exists is not
    replaced without --overwrite.
    """
    if out is not None and len(images) > 1:
        raise click.UsageError("--out takes one image; run the command once for each")
    try:
        limits = {"max_pixels": max_pixels, "allow_truncated": allow_truncated}
        _run(images, as_json, out, png, overwrite, tile_size, max_tiles, model, limits)
    except MllamaError as e:
        raise click.ClickException(str(e)) from e


def _run(
    images: Sequence[str],
    as_json: bool,
    out: str | None,
    png: str | None,
    overwrite: bool,
    tile_size: int | None,
    max_tiles: int | None,
    model: str | None,
    limits: Mapping[str, Any],
) -> None:
    inputs = [*images, *([model] if model else [])]
    if out is not None:
        check_output(out, PIXELS, inputs=inputs, overwrite=overwrite)
    folder = None if png is None else check_folder(png)
    sizes = _sizes_of(model) if model else (TILE_SIZE, MAX_TILES)
    used_names: set[str] = set()
    for index, image in enumerate(images):
        tiled = preprocess_image(
            image,
            tile_size=tile_size or sizes[0],
            max_tiles=max_tiles or sizes[1],
            model_tiles=sizes[1] if model else max(sizes[1], max_tiles or 0),
            **limits,
        )
        if out is not None:
            write_output(out, partial(save_npy, values=tiled.pixels), overwrite, PIXELS)
        if folder is not None:
            _write_tiles(folder, _unused_stem(image, used_names), tiled, inputs, overwrite)
        shown = _shortened(image)
        if as_json:
            echo_json(_as_dict(shown, tiled))
        else:
            if index:
                echo()
            _print(shown, tiled)


def _sizes_of(model: str) -> tuple[int, int]:
    """(tile size, most tiles) of a model. Raises ModelError."""
    from ..gguf.reader import read_gguf
    from ..store.resolve import resolve

    file = read_gguf(resolve(model).paths[-1])
    found = [file.keys.get(f"mllama.vision.{key}") for key in ("image_size", "max_num_tiles")]
    if found == [None, None]:
        raise ModelError(f"{file.path}: holds no vision encoder of an mllama model; give its mmproj file")
    tile_size, max_tiles = found
    if not (isinstance(tile_size, int) and isinstance(max_tiles, int)) or not (
        1 <= tile_size <= MOST_TILE_SIZE and 1 <= max_tiles <= MOST_TILES
    ):
        raise ModelError(
            f"{file.path}: unusable image_size {brief(tile_size)} or max_num_tiles {brief(max_tiles)}"
        )
    return tile_size, max_tiles


def npy_shape(file: BinaryIO) -> tuple[int, ...]:
    """The shape of the float32 array in a file of NumPy. Raises ValueError for another file."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.float32:
        raise ValueError("another type")
    return shape


def save_npy(file: BinaryIO, values: npt.NDArray[np.float32]) -> None:
    """Write an array as NumPy does. `numpy.save` itself does not say that a disk is full."""
    values = np.ascontiguousarray(values)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
    file.write(values.data)


def write_output(path: str | Path, write: Callable[[BinaryIO], object], overwrite: bool, kind: Kind) -> None:
    """Call `write` with a file that becomes `path` only when it is complete. overwrite, kind: as in
    `check_output`. Raises MllamaError."""
    try:
        with replacing(path, overwrite=overwrite, kind=kind) as file:
            write(file)
    except OSError as e:
        raise cannot_write(path, e) from e


def _write_tiles(folder: Path, stem: str, tiled: TiledImage, inputs: Sequence[str], overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise cannot_write(folder, e) from e
    places = [divmod(index, tiled.columns) for index in range(tiled.n_tiles)]
    paths = [folder / f"{stem}_{row}_{column}.png" for row, column in places]
    drawing = folder / f"{stem}_grid.png"
    for path in (*paths, drawing):
        check_output(path, TILE, inputs=inputs, overwrite=overwrite)
    about = PngInfo()
    about.add_text("Software", PROGRAM)
    for index, path in enumerate(paths):
        tile = tiled.tile_picture(index)
        write_output(path, partial(tile.save, format="PNG", pnginfo=about), overwrite, TILE)
    whole = TileDrawing(tiled).image
    write_output(drawing, partial(whole.save, format="PNG", pnginfo=about), overwrite, TILE)


def _unused_stem(image: str, used: set[str]) -> str:
    """A file name for the tiles of `image` that no earlier image of this run has."""
    stem = "image" if image[:5].lower() == "data:" else Path(image).stem or "image"
    name, n = stem, 1
    while name in used:
        n += 1
        name = f"{stem}-{n}"
    used.add(name)
    return name


def _shortened(image: str) -> str:
    return image if image[:5].lower() != "data:" or len(image) <= 60 else f"{image[:57]}..."


def _first_values(tiled: TiledImage) -> list[list[float]]:
    return [[float(v) for v in tile.ravel()[:FIRST_VALUES]] for tile in tiled.pixels[: tiled.n_tiles]]


def _as_dict(name: str, tiled: TiledImage) -> dict[str, Any]:
    return {
        "image": name,
        "image_size": list(tiled.image_size),
        "resized_size": list(tiled.resized_size),
        "canvas_size": list(tiled.canvas_size),
        "rows": tiled.rows,
        "columns": tiled.columns,
        "n_tiles": tiled.n_tiles,
        "aspect_ratio_id": tiled.aspect_ratio_id,
        "tile_size": tiled.tile_size,
        "max_tiles": tiled.max_tiles,
        "shape": list(tiled.pixels.shape),
        "first_values": _first_values(tiled),
        "sha256": tiled.sha256,
    }


def _print(name: str, tiled: TiledImage) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def size(pair: tuple[int, int]) -> str:
        return f"{pair[0]} x {pair[1]}"

    facts = {
        "image": name,
        "image size": f"{size(tiled.image_size)} (width x height)",
        "resized to": size(tiled.resized_size),
        "canvas": size(tiled.canvas_size),
        "grid": f"{tiled.rows} x {tiled.columns} (rows x columns) of {tiled.tile_size} x {tiled.tile_size}",
        "aspect_ratio_id": str(tiled.aspect_ratio_id),
    }
    for index, values in enumerate(_first_values(tiled)):
        row, column = divmod(index, tiled.columns)
        facts[f"tile {index} ({row},{column})"] = " ".join(f"{v:9.6f}" for v in values)
    facts["sha256"] = tiled.sha256

    console = Console(highlight=False)
    if not console.is_terminal:  # another program reads it: nothing wrapped, nothing padded
        for title, words in facts.items():
            echo(f"{title:15}  {words}")
        return
    table = Table.grid(padding=(0, 2))
    for title, words in facts.items():
        table.add_row(Text(title), Text(printable(words), overflow="fold"))
    console.print(table)
