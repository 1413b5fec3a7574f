"""The model that the options name: found, checked, with its tuned settings, opened."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ..settings import Settings, in_options, offload_settings
from .options import ModelChoice
from .progress import PhaseBar, transfer_bar
from .terminal import echo
from .verbose import is_verbose

if TYPE_CHECKING:
    from ..model import Mllama
    from ..store.resolve import ModelFiles


def find_files(choice: ModelChoice) -> ModelFiles:
    """The files of the chosen model, checked by their sha256 if --verify says so."""
    from ..store.resolve import resolve

    files = resolve(choice.name, choice.mmproj)
    if choice.verify:
        from ..store.verify import require_verified

        with transfer_bar() as progress:
            require_verified(files, progress)
    return files


def settings_of(choice: ModelChoice, files: ModelFiles) -> Settings:
    """The settings that the user gave, and for the others what the model needs."""
    return Settings.checked({**files.parameters, **choice.settings})


def with_tuned(choice: ModelChoice) -> ModelChoice:
    """The choice with what `mllama tune` found for this model where the user gave nothing; says so on
    stderr."""
    from ..store.resolve import resolve
    from ..tune.saved import key_of, read_tuned

    warn = logging.StreamHandler(sys.stderr)
    warn.setFormatter(logging.Formatter("Warning: %(message)s"))
    log = logging.getLogger("mllama_gguf.tune.saved")
    log.addHandler(warn)
    try:
        tuned = read_tuned(
            lambda: key_of(resolve(choice.name, choice.mmproj).paths, offload_settings(choice.settings))
        )
    except OSError:
        return choice  # opening says it better
    finally:
        log.removeHandler(warn)
    used = {name: value for name, value in tuned.items() if name not in choice.settings}
    if used:
        words = f"Tuned settings: {in_options(used)} (of mllama tune; --no-tuned ignores them)"
        echo(words, err=True)
    return replace(choice, settings={**used, **choice.settings})


@contextmanager
def open_chosen(
    choice: ModelChoice, *, bar: bool | PhaseBar = True, image_cache: bool = False
) -> Iterator[Mllama]:
    """The chosen model.

    bar:         a progress bar on a terminal: True, False, or the caller's own
    image_cache: keep encoded images on disk
    """
    from ..model import Mllama

    show_log("mllama_gguf.loaded")
    show_log("mllama_gguf.backend.opening", logging.INFO)
    files = find_files(choice)
    settings = settings_of(choice, files).replace(image_cache=image_cache)
    for note in files.defaults.notes:
        echo(f"Warning: {note}", err=True)
    if words := files.defaults.in_words():
        echo(f"{files.name} brings: {words} (options of the command line replace them)", err=True)
    if image_cache:
        show_log("mllama_gguf.cache.disk")
    defaults = replace(files.defaults, notes=())  # they are shown
    own = PhaseBar() if bar is True else bar or nullcontext()
    with (
        own as progress,
        Mllama(
            files.text, files.mmproj, defaults=defaults, progress=progress, **settings.as_dict()
        ) as opened,
    ):
        yield opened


class _OnStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage()
        echo(f"Warning: {words}" if record.levelno >= logging.WARNING else words, err=True)


def show_log(name: str, level: int = logging.WARNING) -> None:
    """Show on stderr what a part of the package logs from this level on. With --verbose the whole log is
    shown already."""
    logger = logging.getLogger(name)
    shown = is_verbose(click.get_current_context())
    if not shown and not any(isinstance(h, _OnStderr) for h in logger.handlers):
        logger.addHandler(_OnStderr(level))
        if level < logging.WARNING:  # the level that loggers have by themselves
            logger.setLevel(level)
