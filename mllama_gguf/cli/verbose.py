"""The option --verbose."""

from __future__ import annotations

import sys

import click

VERBOSE = "mllama_gguf.verbose"  # a key of click's meta


def is_verbose(context: click.Context) -> bool:
    """Whether the command line asks for the log and for tracebacks."""
    return bool(context.meta.get(VERBOSE))


def _be_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value and not ctx.resilient_parsing:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("mllama_gguf").setLevel(logging.DEBUG)
        ctx.meta[VERBOSE] = True
    return value


verbose_option = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_be_verbose,
    help="Log to stderr; show tracebacks.",
)
