"""`mllama cache`: what was computed of pictures, on disk."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..errors import MllamaError
from ..words import show_size
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

    `mllama caption` keeps exact results of an image there: the encoder's output, the keys and values of
    cross-attention (the filling), and those of the tokens before the image (the prefix). Another question
    about the same image then computes only the question.
    MLLAMA_IMAGE_CACHE sets the directory, MLLAMA_IMAGE_CACHE_SIZE the size (default 4 GB; 0: no cache).
    The cache has a folder of its own in that directory. It never removes a file of another program.
    """
    from ..cache.disk import ImageCache

    cache = ImageCache()
    try:
        info = cache.clear() if action == "clear" else cache.info()
    except OSError as e:
        words = f"{e.filename or cache.directory}: the image cache cannot be cleared: {e.strerror or e}"
        raise MllamaError(words) from e
    if as_json:
        facts = asdict(info) | {"directory": str(info.directory)}
        echo_json(facts if action == "info" else facts | {"cleared": True})
    else:
        counts = {"picture": info.n_states, "filling": info.n_fillings, "prefix": info.n_prefixes}
        plural = {"picture": "pictures", "filling": "fillings", "prefix": "prefixes"}
        numbers = [f"{n} {name if n == 1 else plural[name]}" for name, n in counts.items()]
        images = f"{', '.join(numbers)}, {show_size(info.n_bytes)}"
        if action == "clear":
            echo(f"{info.directory}: removed {images}")
        else:
            echo(f"{info.directory}: {images} of at most {show_size(info.max_bytes)}")
