#!/usr/bin/env python3
"""Write what the documentation takes from the code: the commands and options, and the table of settings.

python scripts/make_reference.py            # write docs/command-line.md and docs/settings.md
python scripts/make_reference.py --check    # fail if they are not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import click

from mllama_gguf.cli.main import COMMANDS, cli
from mllama_gguf.settings import DESCRIPTIONS, markdown_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARK = "<!-- The rest is made by scripts/make_reference.py. -->\n"
# Options that several commands share, described once.
SHARED = {"help", "verbose"}
MODEL = {"model", "mmproj", "verify"} | {name for name, about in DESCRIPTIONS.items() if about.option}


def cell(words: str) -> str:
    """Words for a cell of a table; a bar does not end it."""
    return " ".join(words.split()).replace("|", "\\|")


def row(context: click.Context, option: click.Option) -> str:
    record = option.get_help_record(context)
    assert record is not None
    names, words = record
    return f"| `{cell(names)}` | {cell(words).replace('[', '(').replace(']', ')')} |"


def text_of(command: click.Command) -> str:
    """The command's help in paragraphs; its references to options become code."""
    return inspect.cleandoc(command.help or "").replace("\b\n", "").replace("\f", "").strip()


def reference() -> str:
    parts = []
    shared: dict[str, str] = {}
    with click.Context(cli, info_name="mllama") as outer:
        for name in sorted(COMMANDS):
            command = cli.get_command(outer, name)
            assert command is not None
            with click.Context(command, info_name=name, parent=outer) as context:
                usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
                options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
                opens = sum(one.name in MODEL for one in options) > 8  # else it has some names by chance
                own = [one for one in options if one.name not in SHARED and not (opens and one.name in MODEL)]
                if opens:
                    these = {str(o.name): row(context, o) for o in options if o.name in MODEL}
                    # What another command says in other words is told here too.
                    own += [o for o in options if these.get(n := str(o.name)) != shared.get(n, these.get(n))]
                    shared = {**these, **shared}
                lines = [f"### {name}", "", f"`{usage}`", "", text_of(command), ""]
                if own:
                    lines += ["| option | |", "| --- | --- |", *(row(context, one) for one in own), ""]
                if opens:
                    left_out = sorted(MODEL - {str(one.name) for one in options})
                    words = ", ".join(f"`--{one.replace('_', '-')}`" for one in left_out)
                    lines += [
                        f"And the [options of a model](#options-of-a-model){words and f', without {words}'}.",
                        "",
                    ]
                parts.append("\n".join(lines))
    parts.append("## Options of a model\n\n| option | |\n| --- | --- |\n" + "\n".join(shared.values()) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    commands, settings = DOCS / "command-line.md", DOCS / "settings.md"
    head, mark, _ = commands.read_text("utf-8").partition(MARK)
    assert mark, f"{commands}: the line {MARK!r} is missing"
    before, bar, _ = settings.read_text("utf-8").partition("| command line |")
    assert bar, f"{settings}: the table is missing"
    stale = []
    for path, text in ((commands, f"{head}{MARK}\n{reference()}"), (settings, before + markdown_table())):
        text = text.rstrip("\n") + "\n"
        if path.read_text("utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, "utf-8")
    if check and stale:
        sys.exit(
            f"docs/{', docs/'.join(stale)}: not what the code says; run python scripts/make_reference.py"
        )


if __name__ == "__main__":
    main()
