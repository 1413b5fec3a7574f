"""`mllama caption`: what is in a picture, or in thousands (cli_batch.py)."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import ImageError, RequestError
from ..reading import read_text
from ..settings import DEFAULT_PROMPT
from ..words import os_reason, show_name
from .batch import BatchSettings, batch_options, run_batch
from .opening import open_chosen, with_tuned
from .options import ModelChoice, model_options
from .terminal import echo

if TYPE_CHECKING:
    from ..decode.writer import Stats


@click.command(
    "caption",
    epilog="\b\nExamples:\n"
    "  mllama caption photo.jpg\n"
    "  mllama caption photo.jpg -p 'What colour is the car?' -n 50\n"
    "  mllama caption *.jpg --json > captions.jsonl\n"
    "  mllama caption photo.jpg -m text.gguf --mmproj mmproj.gguf -ngl -1\n"
    "  curl -s https://example.com/photo.jpg | mllama caption -\n"
    "  mllama caption photos --recursive --out captions.jsonl\n"
    "  mllama caption photos --sidecar .txt --prefix 'a photo of '\n"
    "  find photos -name '*.jpg' | mllama caption - --out captions.csv --json-schema schema.json",
)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-p", "--prompt", help=f"Question about the image.  [default: {DEFAULT_PROMPT}]")
@click.option("--prompt-file", metavar="FILE", type=click.Path(), help="Read the prompt from FILE.")
@click.option("--system", metavar="TEXT", help="System message.  [default: what the model says; '': none]")
@click.option(
    "--chat-template",
    metavar="FILE",
    type=click.Path(),
    help="Use the Jinja template in FILE in place of the model's.",
)
@click.option(
    "--json-schema",
    metavar="FILE",
    type=click.Path(),
    help="Write captions as JSON of the schema in FILE.",
)
@click.option("--regex", metavar="REGEX", help="Every caption is text that REGEX matches (as Python's re).")
@click.option(
    "--grammar",
    metavar="FILE",
    type=click.Path(),
    help="Every caption follows the grammar in FILE: GBNF or *.lark.",
)
@click.option(
    "-n",
    "--max-tokens",
    metavar="MAX",
    type=click.IntRange(min=1),
    help="Stop a reply after MAX tokens.  [default: 256, or what the model says]",
)
@click.option(
    "--temp",
    "temperature",
    metavar="T",
    type=click.FloatRange(min=0),
    help="Temperature. 0: always the likeliest token; higher: more variety.  [default: 0, or what the model "
    "says]",
)
@click.option("--seed", metavar="S", type=int, help="Random seed (with --temp above 0).")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each image, one a line.")
@click.option("--no-cache", is_flag=True, help="Do not use the image cache on disk (`mllama cache`).")
@batch_options
@click.option("--no-tuned", is_flag=True, help="Ignore the settings that `mllama tune` found for this model.")
@model_options
def caption_command(
    images: tuple[str, ...],
    prompt: str | None,
    prompt_file: str | None,
    system: str | None,
    chat_template: str | None,
    json_schema: str | None,
    regex: str | None,
    grammar: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
    no_cache: bool,
    out: str | None,
    sidecar: str | None,
    recursive: bool,
    prefix: str,
    suffix: str,
    overwrite: bool,
    limit: int | None,
    encode_ahead: bool | None,
    no_tuned: bool,
    choice: ModelChoice,
) -> int:
    """Describe each IMAGE: a file, a data URI, or - for standard input.

    The text appears while it is written. An image that cannot be read is reported and skipped; the exit code
    is then 1.

    With --out or --sidecar for thousands: an IMAGE may also be a folder, a pattern, a list (.txt, a path a
    line) or - for a list on standard input. Killed at any moment, the same command goes on where it was.
    Pictures that fail are noted in errors.jsonl beside the output, and the exit code is 3.
    """
    from ..batch.captions import CaptionOptions, begin_caption, load_grammar, load_schema

    if not no_tuned:
        choice = with_tuned(choice)
    prompt = _prompt(prompt, prompt_file)
    if chat_template is not None:
        template = _read(chat_template, "chat template")
        choice = replace(choice, settings={**choice.settings, "chat_template": template})
    if sum(form is not None for form in (json_schema, regex, grammar)) > 1:
        raise click.UsageError("--json-schema, --regex and --grammar exclude each other")
    schema = None if json_schema is None else load_schema(json_schema)
    form = None if regex is None else {"type": "regex", "regex": regex}
    form = form if grammar is None else load_grammar(grammar)
    batch = BatchSettings(out, sidecar, recursive, prefix, suffix, overwrite, limit, encode_ahead)
    is_batch = batch.wanted
    options = CaptionOptions(
        prompt, max_tokens, temperature, seed, schema, prefix, suffix, form, system=system
    )
    if is_batch:
        inputs = [path for path in (prompt_file, chat_template, json_schema, grammar) if path]
        return run_batch(images, batch, options, as_json, choice, inputs)

    start = time.perf_counter()
    failed = False
    # A batch (above) sees each picture once; keeping them would only push out those that are asked about.
    with open_chosen(choice, image_cache=not no_cache) as model:
        load_seconds = time.perf_counter() - start
        for image in images:
            name = image if len(image) <= 200 else f"{image[:60]}..."  # data URIs
            source = sys.stdin.buffer.read() if image == "-" else image
            try:
                reply = begin_caption(model, source, options)
            except ImageError as e:
                echo(f"Error: {e}", err=True)
                failed = True
                continue
            if len(images) > 1 and not as_json:
                echo(f"{name}: ", nl=False)
            text = ""
            for piece in reply:
                text += piece
                if not as_json:
                    echo(piece, nl=False)
                    sys.stdout.flush()
            echo(json.dumps(_as_dict(name, text, reply.stats, load_seconds)) if as_json else "")
            # Plain text of -n tokens is what was asked for; half a JSON document is not.
            if reply.finish_reason == "length" and options.response_format is not None:
                n = reply.stats.completion_tokens
                echo(f"{name}: cut off after {n} tokens (see -n)", err=True)
    return int(failed)


def _prompt(prompt: str | None, path: str | None) -> str:
    if prompt is not None and path is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    if path is None:
        return DEFAULT_PROMPT if prompt is None else prompt
    return _read(path, "prompt").rstrip("\n")


def _read(path: str, what: str) -> str:
    """The text of a file. Raises RequestError."""
    try:
        return read_text(path)
    except OSError as e:
        raise RequestError(f"{show_name(path)}: the {what} cannot be read: {os_reason(e)}") from e
    except UnicodeDecodeError as e:
        raise RequestError(f"{show_name(path)}: the {what} is not UTF-8") from e


def _as_dict(image: str, text: str, stats: Stats, load_seconds: float) -> dict[str, Any]:
    def rounded(values: dict[str, float | None]) -> dict[str, float | None]:
        return {name: None if value is None else round(value, 4) for name, value in values.items()}

    return {
        "image": image,
        "caption": text,
        "finish_reason": stats.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "completion_tokens": stats.completion_tokens,
        "seconds": rounded({"load": load_seconds, **stats.seconds}),
        "tokens_per_second": rounded(stats.tokens_per_second),
    }
