"""Options that several commands have. Those of a model are made from `settings`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ..checks import Switch, checked
from ..errors import RequestError
from ..reading import read_text
from ..settings import DEFAULTS, DESCRIPTIONS, Description
from ..words import one_line, os_reason, show_name
from .verbose import verbose_option

F = TypeVar("F", bound=Callable[..., Any])


def comma_list(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """An option's callback: NAME,NAME to a list."""
    return None if value is None else [word.strip() for word in value.split(",") if word.strip()]


def given(name: str) -> bool:
    """Whether the user gave an option of the running command, on the command line or in the environment."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


@dataclass(frozen=True)
class ModelChoice:
    """The model that the options name.

    settings: those that the user gave, by the names of `Settings`
    inputs:   the files that were read for them
    """

    name: str
    mmproj: str | None
    verify: bool
    settings: Mapping[str, Any]
    inputs: tuple[str, ...] = ()


def model_options(command: F) -> F:
    """The options that say which model to open and how: all of `settings_options`."""
    return settings_options()(command)


def many_models_options(command: F) -> F:
    """The same for a command that takes -m several times; it also takes `models`, all that -m names."""
    return settings_options(several=True)(command)


no_cache_option = click.option(
    "--no-cache", is_flag=True, help="Do not use the image cache on disk (`mllama cache`)."
)
no_tuned_option = click.option(
    "--no-tuned", is_flag=True, help="Ignore the settings that `mllama tune` found for this model."
)


def settings_options(*, without: Collection[str] = (), several: bool = False) -> Callable[[F], F]:
    """The options of a model and of its settings; the command takes them as `choice`, a ModelChoice.

    without: names of settings that mean nothing to the command
    several: see `many_models_options`
    """
    offered = {name: about for name, about in DESCRIPTIONS.items() if about.option and name not in without}

    def decorate(command: Callable[..., Any]) -> Any:
        @wraps(command)
        def run(*, model: Any, mmproj: str | None, verify: bool, **values: Any) -> Any:
            settings = {name: values[name] for name in offered if given(name)}
            files = {
                name: settings[name]
                for name, about in offered.items()
                if name in settings and about.option and about.option.holds
            }
            for name, path in files.items():
                option = offered[name].option
                assert option is not None
                settings[name] = read_file(path, option.holds)
            others = {name: value for name, value in values.items() if name not in offered}
            if several:
                others["models"] = model
                model = next(iter(model), "")
            choice = ModelChoice(model, mmproj, verify, settings, tuple(files.values()))
            return command(choice=choice, **others)

        wrapped: Any = run
        options = (
            _MODELS if several else _MODEL,
            _MMPROJ,
            *(_option(name, about) for name, about in offered.items()),
            click.option("--verify", is_flag=True, help="Check the files' sha256 before they are used."),
            verbose_option,
        )
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


_NAMES = (
    "GGUF file of the text model or of the whole model; demo; ollama:NAME[:TAG]; hf:OWNER/REPO/FILE; "
    "or a name in models.lock."
)
_MODEL = click.option(
    "-m",
    "--model",
    metavar="NAME|PATH",
    default="demo",
    envvar="MLLAMA_MODEL",
    show_default=True,
    show_envvar=True,
    help=_NAMES,
)
_MODELS = click.option(
    "-m",
    "--model",
    metavar="[AS=]NAME|PATH",
    multiple=True,
    help=f"{_NAMES} AS: the name that requests use.  [default: all models on this machine]",
)
_MMPROJ = click.option(
    "--mmproj",
    metavar="NAME|PATH",
    envvar="MLLAMA_MMPROJ",
    show_envvar=True,
    help="GGUF file of the vision encoder, or hf:OWNER/REPO/FILE, if the model has none.",
)


def setting_option(name: str, help: str = "", default: str = "") -> Callable[[F], F]:
    """The option of one setting, for a command that opens no model; the command takes it by the setting's
    name, None if it is not given. help, default: words in place of the setting's."""
    return _option(name, DESCRIPTIONS[name], help, default)


def read_file(path: str, what: str) -> str:
    """The text of a file that an option names. Raises RequestError."""
    try:
        return read_text(path)
    except OSError as e:
        raise RequestError(f"{show_name(path)}: the {what} cannot be read: {os_reason(e)}") from e
    except UnicodeDecodeError as e:
        raise RequestError(f"{show_name(path)}: the {what} is not UTF-8") from e


def _option(name: str, about: Description, help: str = "", shown: str = "") -> Callable[[F], F]:
    """The option of a setting."""
    option, default = about.option, DEFAULTS[name]
    assert option is not None
    if not shown:
        shown = about.none if default is None else about.check.show(default)
    help = help or about.help
    words = f"{help}  [default: {shown}]" if shown else help
    if option.holds:
        return click.option(*option.names, name, metavar=option.metavar, type=click.Path(), help=words)
    if not option.metavar:
        if "/" in option.names[0]:
            return click.option(*option.names, name, default=None, help=about.help)
        # A flag alone can only say the other value.
        return click.option(*option.names, name, flag_value=not default, default=None, help=about.help)

    def read(ctx: click.Context, param: click.Parameter, given_words: str | None) -> Any:
        if given_words is None:
            return None
        try:
            value = about.check.parse(given_words)
        except ValueError:
            wanted = "on or off" if isinstance(about.check, Switch) else about.check.words
            raise click.BadParameter(f"must be {wanted}, not {one_line(repr(given_words))}") from None
        try:
            return checked("value", about.check, value)
        except RequestError as e:
            raise click.BadParameter(re.sub("^value:? ", "", str(e))) from None

    return click.option(*option.names, name, metavar=option.metavar, callback=read, help=words)
