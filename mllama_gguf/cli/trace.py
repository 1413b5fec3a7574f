"""`mllama trace`: intermediate tensors by name."""

from __future__ import annotations

import re
from math import isfinite
from typing import TYPE_CHECKING

import click

from ..files import Kind, cannot_write, check_folder, check_output
from ..settings import DEFAULT_PROMPT
from .opening import open_chosen
from .options import ModelChoice, model_options
from .terminal import echo, echo_json

if TYPE_CHECKING:
    from ..inspect.trace import TracedTensor

FIRST_VALUES = 5


@click.command(
    "trace",
    epilog="\b\nExamples:\n"
    "  mllama trace photo.jpg --tensors 'v.*'\n"
    "  mllama trace photo.jpg --tensors '*ffn_out*' --out tensors/\n"
    "  mllama trace photo.jpg --json > trace.jsonl",
)
@click.argument("image", metavar="IMAGE")
@click.option(
    "--tensors", metavar="GLOB", default="*", show_default=True, help="Names to show, as in a shell."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Write every tensor as DIR/NAME.NUMBER.npy, float32, for NumPy. DIR is made if missing.",
)
@click.option("-p", "--prompt", default=DEFAULT_PROMPT, show_default=True, help="Ask this about the image.")
@click.option("--overwrite", is_flag=True, help="Replace files of an earlier trace in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each tensor, one a line.")
@model_options
def trace_command(
    image: str,
    tensors: str,
    out: str | None,
    prompt: str,
    overwrite: bool,
    as_json: bool,
    choice: ModelChoice,
) -> None:
    """Encode IMAGE, run the prompt, and show each intermediate tensor: name, shape, first values, sha256.

    Shapes are as in NumPy, slowest dimension first. The number after a name counts how often the name came
    before: the text graph runs once for each batch of tokens. Use diff to compare two traces. A file that
    exists is not replaced without --overwrite.

    If the results are not finite (NaN or infinity), the error names the first such tensor, and the exit code
    is 1. In JSON such a number is null.
    """
    from ..inspect.trace import trace
    from .preprocess import npy_shape, save_npy, write_output

    kind = Kind("NumPy file of `mllama trace`", lambda file: len(npy_shape(file)) >= 0)
    inputs = [image, choice.name, *([choice.mmproj] if choice.mmproj else []), *choice.inputs]
    folder = None if out is None else check_folder(out)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise cannot_write(folder, e) from e
    n_shown = 0

    def show(tensor: TracedTensor) -> None:
        nonlocal n_shown
        n_shown += 1
        first = [float(value) for value in tensor.values.ravel()[:FIRST_VALUES]]
        if as_json:
            facts = {"name": tensor.name, "number": tensor.number, "shape": list(tensor.values.shape)}
            numbers = [value if isfinite(value) else None for value in first]  # JSON has no others
            echo_json({**facts, "first_values": numbers, "sha256": tensor.sha256})
        else:
            shape = "x".join(map(str, tensor.values.shape))
            columns = " ".join(f"{value:10.6f}" for value in first)
            echo(f"{tensor.name}.{tensor.number}  {shape}  {columns}  {tensor.sha256[:16]}")
        if folder is not None:
            stem = re.sub(r"[^\w.-]", "_", tensor.name)
            path = folder / f"{stem}.{tensor.number}.npy"
            check_output(path, kind, inputs=inputs, overwrite=overwrite)
            write_output(path, lambda file: save_npy(file, tensor.values), overwrite, kind)

    with open_chosen(choice) as model:
        trace(model, image, show, prompt=prompt, pattern=tensors)
    if not n_shown:
        raise click.ClickException(f"no tensor is called {tensors!r}; run without --tensors to see the names")
