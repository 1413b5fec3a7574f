"""The model that the options name: found, checked, with its tuned settings, opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from ..settings import Settings, in_options, offload_settings
from .options import ModelChoice
from .progress import PhaseBar, transfer_bar
from .terminal import echo

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
    from .log import show_log

    show_log("mllama_gguf.tune.saved")
    tuned = read_tuned(
        lambda: key_of(resolve(choice.name, choice.mmproj).paths, offload_settings(choice.settings))
    )
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
    import logging

    from ..model import Mllama
    from .log import show_log, show_native_warnings

    show_native_warnings()
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
