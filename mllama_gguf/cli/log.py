"""What the package logs, as lines for a person on stderr."""

from __future__ import annotations

import logging

import click

from .terminal import echo
from .verbose import is_verbose


class _OnStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage()
        echo(f"Warning: {words}" if record.levelno >= logging.WARNING else words, err=True)


def show_native_warnings() -> None:
    """Show on stderr what libmllama itself warns of: devices that cannot be used, and the like."""
    show_log("mllama_gguf.native.warnings")


def show_log(name: str, level: int = logging.WARNING) -> None:
    """Show on stderr what a part of the package logs from this level on. With --verbose the whole log is
    shown already."""
    logger = logging.getLogger(name)
    shown = is_verbose(click.get_current_context())
    if not shown and not any(isinstance(h, _OnStderr) for h in logger.handlers):
        logger.addHandler(_OnStderr(level))
        if level < logging.WARNING:  # the level that loggers have by themselves
            logger.setLevel(level)
