"""What a shell offers when Tab is pressed: commands, options, names of models and devices, choices, files.

The scripts of `mllama completion` start this with _MLLAMA_COMPLETE=SHELL. It answers with lines of a kind, a
value and words of help, with tabs between: `word`; `open`, to which more may be added; `files` and `folders`,
which the shell knows best. Nothing here imports numpy or opens libmllama: a Tab takes a tenth of a second.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import click
from click.shell_completion import CompletionItem, ShellComplete

from ..checks import Choice, Switch, Whole
from ..errors import MllamaError
from ..settings import DESCRIPTIONS
from .main import COMMANDS, cli

VARIABLE = "_MLLAMA_COMPLETE"
_FILES = re.compile(r"IMAGE|FILE|PATH|\.gguf|^IN$|\.npy")  # in a metavar
_FOLDERS = re.compile(r"DIR")
_MODELS = re.compile(r"NAME\||^\[MODEL\]$|^IN$|^FILE\.\.\.$")
_LOCKED = ("pull", "lock")  # commands for models that are not here
_DEVICES = ("vision_device", "devices")

Offered = Iterator[CompletionItem]


def complete(words: Sequence[str]) -> int:
    """Print what the words, of which the last one is not finished, may become. Returns the exit code."""
    shell, breaks = os.environ[VARIABLE], ""
    if shell == "bash":
        breaks = os.environ.get("_MLLAMA_BREAKS", "")
        words = split(words[0] if words else "")[1:]
    *before, word = words or [""]
    for item in offered(before, word):
        value = str(item.value)
        if shell == "bash" and ":" in breaks and ":" in word:
            value = value[word.rindex(":") + 1 :]  # bash's word begins there
        elif shell == "fish" and item.type not in ("files", "folders") and re.match("-.*=", word):
            value = word.partition("=")[0] + f"={value}"
        words_of_help = " ".join((item.help or "").split())
        sys.stdout.write(f"{item.type}\t{value}\t{words_of_help}\n")
    sys.stdout.flush()
    return 0


def split(line: str) -> list[str]:
    """The words of a line of bash as far as it goes; the last one is the one at the cursor, perhaps empty."""
    for end in ("", "'", '"', "\\"):  # what closes an open quotation
        with suppress(ValueError):
            words = shlex.split(line + end)
            begins_new = not end and line[-1:].isspace() and not line[:-1].endswith("\\")
            return [*words, ""] if begins_new or not words else words
    return [line]


def offered(before: Sequence[str], word: str) -> list[CompletionItem]:
    """What the word may become after those before it. Of an option with its value, --x=word, the values are
    without the option."""
    name = next((one for one in before if one in COMMANDS), None)
    command = cli.get_command(click.Context(cli), name) if name is not None else None
    parameters = command.params if command is not None else []
    types = [parameter.type for parameter in parameters]
    try:
        for parameter in parameters:
            if not isinstance(parameter.type, (click.Choice, click.types.BoolParamType)):
                parameter.type = _Values(name or "")
        found = ShellComplete(cli, {}, "mllama", VARIABLE).get_completions(list(before), word)
    finally:
        for parameter, kind in zip(parameters, types, strict=True):
            parameter.type = kind
    for item in found:
        item.type = {"plain": "word", "file": "files", "dir": "folders"}.get(item.type, item.type)
    return found


class _Values(click.ParamType):  # type: ignore[type-arg]
    """Any value; offers those that are known for the parameter."""

    name = "text"

    def __init__(self, command: str) -> None:
        self._command = command

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        begun, _, last = incomplete.rpartition(",") if "," in (param.metavar or "") else ("", "", incomplete)
        found = [item for item in self._known(param, last) if str(item.value).startswith(last)]
        if begun:
            return [CompletionItem(f"{begun},{item.value}", help=item.help) for item in found]
        metavar = param.metavar or ""
        # What has a colon is a name and no file.
        if ":" not in incomplete and (_FILES.search(metavar) or "PATH" in metavar):
            found.append(CompletionItem("", type="file"))
        elif _FOLDERS.search(metavar):
            found.append(CompletionItem("", type="dir"))
        return found

    def _known(self, param: click.Parameter, begun: str) -> Offered:
        about = DESCRIPTIONS.get(str(param.name))
        metavar = param.metavar or ""
        if param.name in _DEVICES or metavar == "NAME,...":
            yield from map(CompletionItem, known_devices(param.name != "devices"))
        elif self._command in _LOCKED and isinstance(param, click.Argument):
            yield from _named(locked_names)
        elif _MODELS.search(metavar) and param.name != "mmproj":
            yield from _named(lambda: model_names(begun))
        elif about is not None and isinstance(about.check, Choice):
            yield from map(CompletionItem, about.check.choices)
        elif about is not None and isinstance(about.check, Switch):
            yield from map(CompletionItem, ("on", "off"))
        elif about is not None and isinstance(about.check, Whole) and about.check.word:
            yield CompletionItem(about.check.word)


def _named(names: Callable[[], Iterator[tuple[str, str]]]) -> Offered:
    """As many as can be found: a store that cannot be read has none."""
    with suppress(MllamaError, OSError):
        for name, words in names():
            yield CompletionItem(name, help=words)


def model_names(begun: str) -> Iterator[tuple[str, str]]:
    """Names of models on this machine that -m takes, and where they are."""
    from ..store import ollama
    from ..store.lockfile import usable_locked_models
    from ..store.resolve import locked_paths

    for model in ollama.list_models():
        if model.family == "mllama":
            yield str(model.ref).removesuffix(":latest"), "Ollama's store"
    for name, locked in usable_locked_models().items():
        here = locked.source == "bundled" or not locked.source.startswith("hf:")
        if (here or _hub_may_have(locked.source)) and locked_paths(locked) is not None:
            yield name, "bundled" if locked.source == "bundled" else "downloaded"
    if begun.startswith("hf:"):  # huggingface_hub takes long to import
        from ..store import hub

        yield from ((str(ref), "Hugging Face hub's cache") for ref, _ in hub.scan())


def _hub_may_have(source: str) -> bool:
    """Whether the hub's cache has a folder for hf:OWNER/NAME. It saves the import of huggingface_hub."""
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    folder = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    owner_and_name = source.removeprefix("hf:").partition("@")[0].split("/")[:2]
    return os.path.isdir(os.path.join(folder, "--".join(("models", *owner_and_name))))


def locked_names() -> Iterator[tuple[str, str]]:
    """Names of the published models, which can be fetched."""
    from ..store.lockfile import usable_locked_models

    yield from ((name, model.title) for name, model in usable_locked_models().items())


def known_devices(with_words: bool) -> list[str]:
    """Names of devices, as `mllama devices` last saw them: starting devices takes too long for a Tab."""
    from .seen_devices import seen

    special = ("auto", "cpu") if with_words else ()
    return [*special, *(name for name in seen() if name.lower() not in special)]
