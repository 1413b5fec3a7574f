"""`mllama convert`: a Hugging Face checkpoint to GGUF."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import MllamaError

TYPES = click.Choice(("f32", "f16", "bf16"))


@click.command(
    "convert",
    epilog="\b\nExamples:\n"
    "  mllama convert Llama-3.2-11B-Vision-Instruct -o llama.gguf\n"
    "  mllama convert Llama-3.2-11B-Vision-Instruct -o llama.gguf --mmproj vision.gguf --vision-type f16\n"
    "  mllama convert my-finetune -o all.gguf --single-file --type f16",
)
@click.argument("hf_dir", metavar="HF_DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    metavar="TEXT.gguf",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write: the text model, or the whole model with --single-file.",
)
@click.option(
    "--mmproj",
    metavar="MMPROJ.gguf",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file for the vision encoder and projector.  [default: TEXT-mmproj.gguf]",
)
@click.option("--single-file", is_flag=True, help="Write text and vision into one file.")
@click.option(
    "--type",
    "text_type",
    type=TYPES,
    default="bf16",
    show_default=True,
    help="Type of the text matrices. Norms, biases and gates are always f32.",
)
@click.option("--vision-type", type=TYPES, help="Type of the vision matrices.  [default: as --type]")
def convert_command(
    hf_dir: Path, out: Path, mmproj: Path | None, single_file: bool, text_type: str, vision_type: str | None
) -> None:
    """Convert the Hugging Face checkpoint in HF_DIR (Llama 3.2 Vision) to GGUF.

    HF_DIR holds config.json, tokenizer.json and model.safetensors, whole or in shards. The tensors are copied
    piece by piece, so any size fits in little memory. bf16 is what the published checkpoints hold, so nothing
    is lost.
    """
    if mmproj is not None and single_file:
        raise click.UsageError("--mmproj and --single-file exclude each other")

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from .convert import convert

    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            files = convert(
                hf_dir,
                out,
                mmproj=mmproj,
                single_file=single_file,
                type=text_type,  # type: ignore[arg-type]  # one of TYPES
                vision_type=vision_type,  # type: ignore[arg-type]
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except MllamaError as e:
        raise click.ClickException(str(e)) from e
    for file in files:
        click.echo(f"{file}  {_size(file.stat().st_size)}")


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"
