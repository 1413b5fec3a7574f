#!/usr/bin/env python3
"""Write the manual pages, contrib/man/*.1, from the help of the commands.

python scripts/make_manual.py            # write them
python scripts/make_manual.py --check    # fail if they are not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

import click

from mllama_gguf import __version__
from mllama_gguf.cli.main import COMMANDS, cli

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "contrib" / "man"
SITE = "docs/command-line.md"
DATE = "2026-11-27"  # of the pages; a new release has a new one


def plain(words: str) -> str:
    """Words as roff prints them: its own characters escaped, and no line that it would obey."""
    words = words.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    words = words.replace("^", "\\(ha").replace("~", "\\(ti")
    return re.sub(r"^\.", r"\\&.", words, flags=re.M)


def sentence(words: str) -> str:
    """A paragraph: one line each sentence, as roff wants it, with names of options and commands in bold."""
    lines = re.sub(r"(?<=[a-z0-9)][.:?]) (?=[A-Z])", "\n", " ".join(words.split()))
    text = plain(lines).replace("\\(ga", "`")
    return re.sub(r"`([^`\n]+)`", r"\\fB\1\\fR", text).replace("`", "\\(ga")


def paragraphs(text: str) -> str:
    parts = [part for part in inspect.cleandoc(text.replace("\f", "")).split("\n\n") if part.strip()]
    return "\n.PP\n".join(sentence(part.removeprefix("\b\n")) for part in parts)


def section(title: str, body: str) -> str:
    return f".SH {title}\n{body.strip()}\n" if body.strip() else ""


def options(command: click.Command, context: click.Context) -> str:
    items = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            names = re.sub(r"(?<![\w-])(--?[\w-]+)", r"\\fB\1\\fR", plain(record[0]).replace("\\-", "-"))
            items.append(f".TP\n{names.replace('-', chr(92) + '-')}\n{sentence(record[1])}")
    return "\n".join(items)


def examples(command: click.Command) -> str:
    lines = (command.epilog or "").splitlines()[2:]
    return ".nf\n" + "\n".join(plain(line.strip()) for line in lines) + "\n.fi" if lines else ""


def tables(title: str) -> str:
    """The rows of a table of docs/command-line.md, as items."""
    text = (ROOT / SITE).read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    items = []
    for name, words in re.findall(r"^\| (.*?) \| (.*) \|$", text, re.M)[2:]:
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", words)
        items.append(f".TP\n\\fB{plain(name.replace('`', ''))}\\fR\n{sentence(words)}")
    return "\n".join(items)


def head(name: str, words: str) -> str:
    title = name.upper().replace("-", "\\-")
    return f'.TH {title} 1 "{DATE}" "mllama_gguf {__version__}" "User Commands"\n' + section(
        "NAME", f"{plain(name)} \\- {plain(words[0].lower() + words[1:].rstrip('.'))}"
    )


def page(name: str, command: click.Command, outer: click.Context) -> str:
    with click.Context(command, info_name=name, parent=outer) as context:
        usage = " ".join(command.collect_usage_pieces(context))
        return "".join(
            (
                head(f"mllama-{name}", COMMANDS[name][1]),
                section("SYNOPSIS", f"\\fBmllama {plain(name)}\\fR {plain(usage)}"),
                section("DESCRIPTION", paragraphs(command.help or "")),
                section("OPTIONS", options(command, context)),
                section("EXAMPLES", examples(command)),
                section("SEE ALSO", "\\fBmllama\\fR(1)"),
            )
        )


def first_page(outer: click.Context) -> str:
    every = "\n".join(
        f".TP\n\\fBmllama\\-{plain(name)}\\fR(1)\n{sentence(COMMANDS[name][1])}" for name in sorted(COMMANDS)
    )
    return "".join(
        (
            head("mllama", "Describe images with Llama 3.2 Vision from GGUF files."),
            section("SYNOPSIS", "\\fBmllama\\fR [OPTIONS] COMMAND [ARGS]..."),
            section("DESCRIPTION", paragraphs(cli.help or "")),
            section("COMMANDS", every),
            section("OPTIONS", options(cli, outer)),
            section("EXAMPLES", examples(cli)),
            section("EXIT STATUS", tables("Exit codes")),
            section("ENVIRONMENT", tables("Environment variables")),
        )
    )


def manual() -> dict[str, str]:
    """The pages by the names of their files."""
    with click.Context(cli, info_name="mllama", help_option_names=["-h", "--help"]) as outer:
        pages = {"mllama.1": first_page(outer)}
        for name in sorted(COMMANDS):
            command = cli.get_command(outer, name)
            assert command is not None
            pages[f"mllama-{name}.1"] = page(name, command, outer)
    return pages


def write(check: bool) -> list[str]:
    """Write the pages that are not what the code says; check: only name them."""
    pages = manual()
    stale = [path.name for path in FOLDER.glob("*.1") if path.name not in pages]
    for name in stale:
        if not check:
            (FOLDER / name).unlink()
    for name, text in pages.items():
        path = FOLDER / name
        if not path.is_file() or path.read_text("utf-8") != text:
            stale.append(name)
            if not check:
                FOLDER.mkdir(exist_ok=True)
                path.write_text(text, "utf-8")
    return [f"contrib/man/{name}" for name in stale]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    if stale := write(check):
        print(f"{', '.join(stale)}: {'not what the code says' if check else 'written'}")
        sys.exit(int(check))


if __name__ == "__main__":
    main()
