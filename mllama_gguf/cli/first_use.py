"""Without a chosen model the demo model answers. A line tells how to get a real one, and a chat offers those
that this machine has."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ..errors import MllamaError
from ..words import show_size
from .options import ModelChoice, given
from .terminal import echo

if TYPE_CHECKING:
    from ..inspect.inventory import Found

_LONGEST = 100  # characters of a command line that is repeated whole


def is_demo_by_default(choice: ModelChoice) -> bool:
    """Whether the demo model is used because no other was asked for, on the command line or in the
    environment."""
    return choice.name == "demo" and not given("model")


def tell_of_real_models(choice: ModelChoice) -> None:
    """One line on stderr, if the demo model answers because no other was asked for.

    It is printed without a terminal too, for people who read a log or run a container. stdout has only
    captions. `-m demo` and MLLAMA_MODEL=demo say that the demo model is meant.
    """
    if not is_demo_by_default(choice):
        return
    pull = "`mllama pull llama3.2-vision-11b`"
    convert = "`mllama convert HF_DIR -o FILE` (from a checkpoint)"
    names = [found.name for found in real_models()]
    if names:
        ways = f"the one on this machine: `{_again(names[0])}`; others: {pull}, {convert}"
    else:
        ways = f"{pull}; {convert}; or -m ollama:NAME, if Ollama has one"
    echo(f"This is the demo model, which knows only simple drawings. A real one: {ways}", err=True)


def real_models() -> list[Found]:
    """The models on this machine, but the demo model, that can be used; those of Ollama's store first."""

    from ..inspect.inventory import inventory
    from ..store.lockfile import without_warning

    try:
        with without_warning():  # a broken lock file is not the subject here
            found = inventory()
    except (MllamaError, OSError):
        return []
    return [one for one in by_use(found) if one.place != "bundled" and not one.problem]


def by_use(models: Iterable[Found], chosen: str | None = None) -> list[Found]:
    """Models in the order in which they are offered: the one of $MLLAMA_MODEL, those of Ollama's store,
    others, the demo model, and last what cannot be used."""

    def rank(found: Found) -> int:
        if found.problem:
            return 4
        if chosen and found.name in (chosen, f"{chosen}:latest"):
            return 0
        return {"ollama": 1, "bundled": 3}.get(found.place, 2)

    return sorted(models, key=rank)


def offer_real_models(choice: ModelChoice) -> ModelChoice:
    """At a terminal: ask which model to use, if no model was chosen and this machine has real ones. Return
    alone takes the first. Raises KeyboardInterrupt when no answer comes."""
    models = real_models() if is_demo_by_default(choice) else []
    if not models:
        return choice
    echo("Which model?")
    for number, found in enumerate(models, 1):
        fits = "" if found.fits else ", more than the available memory"
        echo(f"  {number}  {found.name}  needs {show_size(found.memory or 0)}{fits}")
    echo(f"  {len(models) + 1}  demo  knows only simple drawings")
    while True:
        try:
            words = input("Number [1]: ").strip() or "1"
        except EOFError:
            raise KeyboardInterrupt from None
        if words.isdecimal() and 1 <= int(words) <= len(models) + 1:
            names = [*(found.name for found in models), "demo"]
            return replace(choice, name=names[int(words) - 1])
        echo(f"A number from 1 to {len(models) + 1}, please.")


def _again(model: str) -> str:
    """The running command line with another model."""

    args = click.get_current_context().obj or ()
    words = shlex.join(["mllama", *args, "-m", model])
    if not args or len(words) > _LONGEST or "--" in args:
        return f"mllama {click.get_current_context().info_name} ... -m {model}"
    return words
