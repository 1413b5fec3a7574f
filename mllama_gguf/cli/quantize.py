"""`mllama quantize`: a smaller copy of a model."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import click

from ..words import show_size
from .options import setting_option
from .progress import transfer_bar
from .terminal import echo, echo_json
from .verbose import verbose_option

TYPES = ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "q4_0", "bf16", "f16")


@click.command(
    "quantize",
    epilog="\b\nExamples:\n"
    "  mllama quantize text-bf16.gguf text-q4_k_m.gguf --type q4_k_m\n"
    "  mllama quantize all.gguf smaller.gguf --type q8_0 --json | jq .size\n"
    "  mllama quantize ollama:llama3.2-vision smaller.gguf --type q4_0 --allow-requantize --overwrite",
)
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT.gguf", type=click.Path(dir_okay=False))
@click.option(
    "--type",
    "target",
    type=click.Choice(TYPES),
    required=True,
    help="Type of the text matrices; q4_k_m and q5_k_m give more bits to the tensors that need them.",
)
@setting_option("n_threads", default="all usable CPUs")
@click.option(
    "--allow-requantize", is_flag=True, help="Accept a model that is quantized already; it loses more."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.gguf if it is a GGUF file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@verbose_option
def quantize_command(
    source: str,
    out: str,
    target: str,
    n_threads: int | None,
    allow_requantize: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a copy of the model IN with the matrices of its text quantized.

    IN is a GGUF file, or a model's name as for -m: then its text file is quantized. Which tensor gets which
    type is as in llama.cpp. The vision encoder, norms and gates are copied unchanged, because quantized
    vision gives wrong captions. All metadata is kept. A file that exists is not replaced without --overwrite,
    and only if it is a GGUF file.
    """
    from ..convert.quantize import quantize
    from ..store.resolve import resolve

    files = resolve(source)
    with transfer_bar() as bar:
        done = quantize(
            files.text,
            out,
            target,
            progress=bar and partial(bar, "quantize"),
            n_threads=n_threads,
            allow_requantize=allow_requantize,
            overwrite=overwrite,
            warn=lambda words: echo(f"Note: {words}", err=True),
        )
    if as_json:
        echo_json({**asdict(done), "path": str(done.path)})
        return
    types = ", ".join(f"{n} {kind}" for kind, n in sorted(done.types.items()))
    sizes = f"{show_size(done.size)} (before: {show_size(done.size_before)})"
    echo(f"{done.path}  {sizes}; tensors: {types}")
