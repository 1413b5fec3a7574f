"""The options of a batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import click

from ..batch.choices import EXISTING, REDO, Existing, Redo
from ..settings import MAX_PARALLEL
from .options import F

# Options that only a batch obeys, beside --encode-ahead.
_ONLY_HERE = (
    "recursive", "prefix", "suffix", "overwrite", "existing", "redo", "any_settings", "limit", "parallel"
)  # fmt: skip


@dataclass(frozen=True)
class BatchSettings:
    """The values of `batch_options`."""

    out: str | None
    sidecar: str | None
    recursive: bool
    prefix: str
    suffix: str
    overwrite: bool
    existing: Existing | None
    separator: str
    redo: tuple[Redo, ...]
    any_settings: bool
    sidecar_full_name: bool
    limit: int | None
    encode_ahead: bool | None
    parallel: int | None

    @property
    def how(self) -> Existing:
        """What happens to captions that exist."""
        return self.existing or ("overwrite" if self.overwrite else "skip")

    @property
    def wanted(self) -> bool:
        """Whether this is a batch. Raises UsageError for an option that this kind of run does not use."""
        if self.out is not None and self.sidecar is not None:
            raise click.UsageError("--out and --sidecar exclude each other")
        if self.overwrite and self.existing not in (None, "overwrite"):
            raise click.UsageError(f"--overwrite and --existing {self.existing} exclude each other")
        if self.redo and self.how != "skip":
            raise click.UsageError("--redo works only with --existing skip")
        if self.separator != "\n" and self.existing is None:
            raise click.UsageError("--separator needs --existing append or prepend")
        if self.sidecar_full_name and self.sidecar is None:
            raise click.UsageError("--sidecar-full-name needs --sidecar")
        if self.out is not None or self.sidecar is not None:
            return True
        for name in _ONLY_HERE:
            if getattr(self, name):
                raise click.UsageError(f"--{name.replace('_', '-')} needs --out or --sidecar")
        if self.encode_ahead is not None:
            raise click.UsageError("--encode-ahead needs --out or --sidecar")
        return False


def batch_options(command: F) -> F:
    """The options of a batch; the command takes them as `batch`, a BatchSettings."""

    @wraps(command)
    def run(**values: Any) -> Any:
        named = {field.name: values.pop(field.name) for field in fields(BatchSettings)}
        return command(batch=BatchSettings(**named), **values)

    wrapped: Any = run
    for option in reversed(
        (
            click.option("--out", metavar="FILE", help="Write the captions to FILE.jsonl or FILE.csv."),
            click.option(
                "--sidecar",
                metavar=".txt",
                help="Write each caption beside its image, with this suffix. .xmp: as an XMP sidecar.",
            ),
            click.option("--recursive", is_flag=True, help="Search subfolders too."),
            click.option("--prefix", default="", metavar="TEXT", help="Text to put before every caption."),
            click.option("--suffix", default="", metavar="TEXT", help="Text to put after every caption."),
            click.option(
                "--existing",
                type=click.Choice(EXISTING),
                help="Skip or overwrite existing captions, or add to them.  [default: skip]",
            ),
            click.option("--overwrite", is_flag=True, help="The same as --existing overwrite."),
            click.option(
                "--separator",
                metavar="TEXT",
                default="\n",
                help="Text between an old caption and the added one.  [default: a line end]",
            ),
            click.option(
                "--redo",
                type=click.Choice(REDO),
                multiple=True,
                help="Write captions again that were cut off (length) or are empty. Images that failed are "
                "always tried again.",
            ),
            click.option(
                "--any-settings",
                is_flag=True,
                help="Continue even if the existing captions were made with another prompt, model or form.",
            ),
            click.option(
                "--sidecar-full-name",
                is_flag=True,
                help="Name caption files after the whole name: a.jpg.txt in place of a.txt.",
            ),
            click.option(
                "--limit", metavar="N", type=click.IntRange(min=1), help="Caption only the first N images."
            ),
            click.option(
                "--encode-ahead/--no-encode-ahead",
                default=None,
                help="Encode the next images while a caption is written.  [default: if a CPU is free]",
            ),
            click.option(
                "--parallel",
                metavar="N",
                type=click.IntRange(1, MAX_PARALLEL),
                help="Caption up to N images together, which reads the weights once for all.  [default: 1]",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]
