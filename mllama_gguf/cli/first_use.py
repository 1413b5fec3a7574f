"""Who has not chosen a model gets the demo model; a line at the terminal tells how to get a real one."""

from __future__ import annotations

import sys

from ..errors import MllamaError
from .options import ModelChoice, given
from .terminal import echo, is_live


def tell_of_real_models(choice: ModelChoice) -> None:
    """One line on a terminal's stderr, if the demo model answers because no other was asked for."""
    if choice.name != "demo" or given("model") or not is_live(sys.stderr):
        return
    name = _in_store()
    here = f"-m {name}, which is on this machine" if name else "-m ollama:NAME, if Ollama has one"
    echo(
        "This is the demo model, which knows only simple drawings. "
        f"A real one: {here}; `mllama pull llama3.2-vision-11b`; or `mllama convert`, from a checkpoint.",
        err=True,
    )


def _in_store() -> str | None:
    """The first model of Ollama's stores that can be used."""
    from ..store import ollama

    try:
        return next((str(model.ref) for model in ollama.list_models() if model.family == "mllama"), None)
    except (MllamaError, OSError):
        return None
