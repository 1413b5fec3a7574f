"""`mllama convert`: a Hugging Face checkpoint to GGUF."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from ..errors import MllamaError
from ..words import show_size
from .options import setting_option
from .progress import transfer_bar
from .terminal import echo

VISION_TYPES = ("f32", "f16", "bf16")
TYPES = (*VISION_TYPES, "q4_k_m", "q5_k_m", "q6_k", "q8_0", "q4_0")


@click.command(
    "convert",
    epilog="\b\nExamples:\n"
    "  mllama convert Llama-3.2-11B-Vision-Instruct -o llama.gguf\n"
    "  mllama convert Llama-3.2-11B-Vision-Instruct -o llama.gguf --mmproj vision.gguf --vision-type f16\n"
    "  mllama convert Llama-3.2-11B-Vision-Instruct -o llama.gguf --type q4_k_m\n"
    "  mllama convert my-finetune -o all.gguf --single-file --type f16",
)
@click.argument("hf_dir", metavar="HF_DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    metavar="TEXT.gguf",
    required=True,
    type=click.Path(dir_okay=False),
    help="The file to write: the text model, or the whole model with --single-file.",
)
@click.option(
    "--mmproj",
    metavar="MMPROJ.gguf",
    type=click.Path(dir_okay=False),
    help="The file for the vision encoder and projector.  [default: TEXT-mmproj.gguf]",
)
@click.option("--single-file", is_flag=True, help="Write text and vision into one file.")
@click.option(
    "--type",
    "text_type",
    type=click.Choice(TYPES),
    default="bf16",
    show_default=True,
    help="Type of the text matrices. Norms, biases and gates are always f32.",
)
@click.option(
    "--vision-type",
    type=click.Choice(VISION_TYPES),
    help="Type of the vision matrices.  [default: as --type, bf16 for a quantized type]",
)
@setting_option("n_threads", default="all usable CPUs")
@click.option("--overwrite", is_flag=True, help="Replace the outputs if they are GGUF files.")
def convert_command(
    hf_dir: Path,
    out: str,
    mmproj: str | None,
    single_file: bool,
    text_type: str,
    vision_type: str | None,
    n_threads: int | None,
    overwrite: bool,
) -> None:
    """Convert the Hugging Face checkpoint in HF_DIR (Llama 3.2 Vision) to GGUF.

    HF_DIR holds config.json, tokenizer.json and model.safetensors, whole or in shards. The tensors are copied
    piece by piece, so any size fits in little memory. bf16 is what the published checkpoints hold, so nothing
    is lost; the quantized types are those of `mllama quantize`. A file that exists is not replaced without
    --overwrite, and only if it is a GGUF file.
    """
    if mmproj is not None and single_file:
        raise click.UsageError("--mmproj and --single-file exclude each other")

    from ..convert.huggingface import convert

    try:
        with transfer_bar() as bar:
            files = convert(
                hf_dir,
                out,
                mmproj=mmproj,
                single_file=single_file,
                type=text_type,
                vision_type=vision_type,  # type: ignore[arg-type]  # one of VISION_TYPES
                n_threads=n_threads,
                overwrite=overwrite,
                progress=bar and partial(bar, "convert"),
                warn=lambda words: echo(f"Note: {words}", err=True),
            )
    except MllamaError as e:
        raise click.ClickException(str(e)) from e
    for file in files:
        echo(f"{file}  {show_size(file.stat().st_size)}")
