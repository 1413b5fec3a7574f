"""`mllama caption`: what is in an image, or in thousands (batch.py beside it)."""

from __future__ import annotations

import io
import re
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from ..errors import ImageError, TimeLimitError
from ..words import os_reason, show_size
from .batch_options import BatchSettings, batch_options
from .first_use import tell_of_real_models
from .opening import open_chosen, with_tuned
from .options import ModelChoice, model_options, no_cache_option, no_tuned_option
from .replies import ReplyChoice, reply_options
from .terminal import echo, echo_json, name_on

if TYPE_CHECKING:
    from ..decode.writer import Stats
    from ..vision.loading import ImageSource

_LONGEST_PATH = 4096  # bytes, Linux's PATH_MAX
_MOST_BYTES = 1 << 30  # of an image on standard input
_BASE64 = re.compile(rb"\s*(data:|[\w+/-]{64})", re.IGNORECASE)  # how such an image begins
_DESCRIPTOR = re.compile(r"/dev/fd/\d+|/proc/self/fd/\d+|/dev/stdin")


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
@reply_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each image, one a line.")
@no_cache_option
@batch_options
@no_tuned_option
@model_options
def caption_command(
    images: tuple[str, ...],
    asked: ReplyChoice,
    as_json: bool,
    no_cache: bool,
    batch: BatchSettings,
    no_tuned: bool,
    choice: ModelChoice,
) -> int:
    """Describe each IMAGE: a file, a data URI, or - for standard input.

    The text appears while it is written. An image that cannot be read is reported and skipped; the exit code
    is then 1.

    For thousands of images use --out or --sidecar. An IMAGE may then also be a folder, a pattern, a list of
    paths (.txt, one a line), or - for such a list on standard input. After an interruption run the same
    command again: it continues. Images that fail are noted in errors.jsonl beside the output, and the exit
    code is 3.
    """
    from ..batch.captions import begin_caption, within

    if not no_tuned:
        choice = with_tuned(choice)
    options = asked.caption_options(batch.prefix, batch.suffix)
    if batch.wanted:
        from .batch import run_batch

        return run_batch(images, batch, options, as_json, choice, (*asked.inputs, *choice.inputs))
    if images.count("-") > 1:
        raise click.UsageError("standard input (-) holds one image")

    start = time.perf_counter()
    failed = done = False
    # A batch (above) sees each image once; keeping them would only push out those that are asked about.
    with open_chosen(choice, image_cache=not no_cache) as model:
        load_seconds = time.perf_counter() - start
        for image in images:
            name = _name(image)
            try:
                reply = begin_caption(model, _source(image), options)
                if len(images) > 1 and not as_json:
                    echo(f"{name_on(sys.stdout, name)}: ", nl=False)
                text = options.begin
                if text and not as_json:
                    echo(text, nl=False)
                with within(reply, options.time_limit):
                    for piece in reply:
                        text += piece
                        if not as_json:
                            echo(piece, nl=False)
            except (ImageError, TimeLimitError) as e:
                shown = name_on(sys.stderr, name)
                if isinstance(e, TimeLimitError) and not as_json:
                    echo()
                echo(f"Error: {e}" if isinstance(e, ImageError) else f"Error: {shown}: {e}", err=True)
                failed = True
                continue
            done = True
            if as_json:
                echo_json(_as_dict(name, text, reply.stats, load_seconds))
            else:
                echo()
            # Plain text of -n tokens is what was asked for; half a JSON document is not.
            if reply.finish_reason == "length" and options.response_format is not None:
                n = reply.stats.completion_tokens
                echo(f"{name_on(sys.stderr, name)}: cut off after {n} tokens (see -n)", err=True)
    if done and not as_json:  # a program reads the JSON
        tell_of_real_models(choice)
    return int(failed)


def _name(image: str) -> str:
    """What an image is called: its path, whole; of data only the beginning."""
    is_data = image[:5].lower() == "data:" or len(image) > _LONGEST_PATH
    return f"{image[:60]}..." if is_data and len(image) > 60 else image


def _source(image: str) -> ImageSource:
    """What to decode. Raises ImageError for standard input that holds no image."""
    if image != "-" and not _DESCRIPTOR.fullmatch(image):
        return image
    name = "standard input" if image == "-" else image
    try:
        # A descriptor that the shell opened, as <(...) does: whoever writes to it is there already.
        with nullcontext(sys.stdin.buffer) if image == "-" else open(image, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as e:
        raise ImageError(f"{name}: cannot be read: {os_reason(e)}") from e
    if not data:
        raise ImageError(f"{name}: is empty; an image is expected")
    if len(data) > _MOST_BYTES:
        raise ImageError(f"{name}: has more than {show_size(_MOST_BYTES)}; give the file")
    if _BASE64.match(data):
        return data.decode("ascii", "replace")
    if _is_list(data):
        raise ImageError(
            f"{name}: an image is expected, this is text; a list of images needs --out or --sidecar"
        )
    source = io.BytesIO(data)
    source.name = name  # for errors
    return source


def _is_list(data: bytes) -> bool:
    """Whether this is text that is not a document either: a list of paths, most likely."""
    head = data[:4096].split(b"\n")[0].strip()
    if head[:1] in (b"<", b"{", b"%") or not head:
        return False
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return (
        text.isprintable() and bool(re.search(r"[./\\]", text)) and not re.fullmatch(r"[\w+/=-]{64,}", text)
    )


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
