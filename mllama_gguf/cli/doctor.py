"""`mllama doctor`: what this installation can do, and what is wrong with it."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from .terminal import echo, echo_coloured, echo_json
from .verbose import verbose_option

MARKS = {"ok": "\u2713", "note": "!", "problem": "\u2717"}
PLAIN_MARKS = {"ok": "+", "note": "!", "problem": "x"}
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command("doctor", epilog="\b\nExamples:\n  mllama doctor\n  mllama doctor --json > report.jsonl")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each finding, one a line.")
@verbose_option
def doctor_command(as_json: bool) -> int:
    """Check this installation: versions, processor, devices, memory, disk, models.

    Each device computes a known answer, in its own process. If something does not work, the exit code is 1.
    You can paste the output into a bug report: your name, the machine's name, your home directory and your
    keys are not in it.
    """
    from .. import __version__
    from ..inspect.doctor import examine
    from ..inspect.private import private_log

    marks = MARKS if can_show("".join(MARKS.values())) else PLAIN_MARKS
    is_well = True
    with private_log():
        for finding in examine(__version__):
            is_well = is_well and finding.mark != "problem"
            if as_json:
                echo_json(asdict(finding))
                continue
            echo_coloured(marks[finding.mark], COLOURS[finding.mark], nl=False)
            echo(f" {finding.name}: {finding.words}")
            if finding.advice:
                echo(f"    {finding.advice}")
    return 0 if is_well else 1


def can_show(characters: str) -> bool:
    """Whether standard output's encoding has these characters."""
    try:
        characters.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
