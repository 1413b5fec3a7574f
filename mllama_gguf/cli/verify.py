"""`mllama verify`: whether a model's files are what they should be."""

from __future__ import annotations

import click

from .log import show_log
from .progress import transfer_bar
from .terminal import echo
from .verbose import verbose_option


@click.command("verify", epilog="\b\nExamples:\n  mllama verify demo\n  mllama verify ollama:llama3.2-vision")
@click.argument("name", metavar="NAME|FILE")
@verbose_option
def verify_command(name: str) -> int:
    """Hash the files of a model and compare them with its manifest, its name in a store, or models.lock.

    The exit code is 1 if a file differs, or if its sha256 is not known.
    """
    from ..store.resolve import resolve
    from ..store.verify import verify

    show_log("mllama_gguf.store.lockfile")
    with transfer_bar() as progress:
        results = verify(resolve(name), progress)
    for result in results:
        if result.ok:
            words = f"ok  sha256:{result.actual}"
        elif result.expected is None:
            words = f"unknown  sha256:{result.actual}"
        else:
            words = f"MISMATCH  sha256:{result.actual}, must be {result.expected}"
        echo(f"{result.path}: {words}")
    return int(not all(result.ok for result in results))
