"""`mllama cache`: what was computed of images, on disk."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..errors import MllamaError
from ..words import os_reason, show_size
from .terminal import echo, echo_json
from .verbose import verbose_option


@click.command(
    "cache", epilog="\b\nExamples:\n  mllama cache\n  mllama cache info --json\n  mllama cache clear"
)
@click.argument("action", metavar="[info|clear]", type=click.Choice(["info", "clear"]), default="info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@verbose_option
def cache_command(action: str, as_json: bool) -> None:
    """Show what is in the image cache, or clear it.

    Exact results of an image are kept there: the encoder's output (states), the keys and values of
    cross-attention (image_kv), and those of the tokens before the image (prefix_kv). Another question about
    the same image then computes only the question.
    MLLAMA_IMAGE_CACHE sets the directory, MLLAMA_IMAGE_CACHE_SIZE the size (default 4 GB; 0: no cache).
    The cache has a folder of its own in that directory. It never removes a file of another program.
    """
    from ..cache.disk import ImageCache

    cache = ImageCache()
    try:
        info = cache.clear() if action == "clear" else cache.info()
    except OSError as e:
        words = f"{e.filename or cache.directory}: the image cache cannot be cleared: {os_reason(e)}"
        raise MllamaError(words) from e
    if as_json:
        facts = asdict(info) | {"directory": str(info.directory)}
        echo_json(facts if action == "info" else facts | {"cleared": True})
    else:
        n = info.n_states
        others = f"{info.n_image_kv} image_kv, {info.n_prefix_kv} prefix_kv"
        images = f"{n} image{'' if n == 1 else 's'} (states), {others}, {show_size(info.n_bytes)}"
        if action == "clear":
            echo(f"{info.directory}: removed {images}")
        else:
            echo(f"{info.directory}: {images} of at most {show_size(info.max_bytes)}")
