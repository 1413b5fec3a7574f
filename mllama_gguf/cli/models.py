"""`mllama models`: what this machine has."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..words import show_size
from .first_use import by_use
from .log import show_log
from .terminal import echo, echo_json
from .verbose import verbose_option

if TYPE_CHECKING:
    from ..inspect.inventory import Found


@click.command("models", epilog="\b\nExamples:\n  mllama models\n  mllama models --json")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each model, one a line.")
@verbose_option
def models_command(as_json: bool) -> None:
    """List the models that -m can open by name: in Ollama's store, downloaded, in the Hugging Face hub's
    cache, bundled. The model that MLLAMA_MODEL names comes first. Models of other architectures are left out.

    Memory: the need of weights and caches (4096 tokens, one image) on the CPU, compared with the memory that
    is available now.
    """
    from ..inspect.inventory import closed_stores, inventory

    show_log("mllama_gguf.store.lockfile")
    for found in by_use(inventory(), os.environ.get("MLLAMA_MODEL")):
        if as_json:
            echo_json({**asdict(found), "files": [str(path) for path in found.files]})
        else:
            echo("  ".join((f"{found.name:24}", f"{found.place:10}", *_facts(found))))
    for store in closed_stores():
        echo(f"{store}: this user may not read it (permission denied)", err=True)


def _facts(found: Found) -> list[str]:
    facts = [f"{show_size(found.size):>9}"] if found.files else []
    if found.layout:
        facts.append(f"layout {found.layout}")
    if found.problem:
        return [*facts, f"cannot be used: {found.problem}"]
    verdict = "fits in memory" if found.fits else "more than the available memory"
    return [*facts, f"needs {show_size(found.memory or 0)}: {verdict}"]
