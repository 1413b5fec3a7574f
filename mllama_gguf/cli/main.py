"""The command line: its commands, and how every failure becomes one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some images of a batch failed, 130 interrupted (Ctrl-C), 141
the reader of the output went away.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import click

from .. import __version__
from ..errors import Aborted, MllamaError
from ..words import one_line, os_reason, show_name
from .terminal import NO_ROOM, discard, echo, fit_streams
from .verbose import is_verbose, verbose_option

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# The modules are imported when their command runs: some need numpy, which takes longer than all of --help.
COMMANDS = {
    "attend": ("attend:attend_command", "Show where each word of a reply looked."),
    "cache": ("cache:cache_command", "Show or clear the image cache."),
    "caption": ("caption:caption_command", "Describe images."),
    "chat": ("chat:chat_command", "Talk about images at the terminal."),
    "completion": ("completion:completion_command", "Print the script that completes commands in a shell."),
    "convert": ("convert:convert_command", "Convert a Hugging Face checkpoint to GGUF."),
    "devices": ("devices:devices_command", "List the devices that can compute."),
    "doctor": ("doctor:doctor_command", "Check this installation."),
    "gallery": ("gallery:gallery_command", "Show a batch as one HTML page."),
    "info": ("info:info_command", "Show what is in model files."),
    "lock": ("pull:lock_command", "Write a model's digests to models.lock."),
    "models": ("models:models_command", "List the models on this machine."),
    "plan": ("plan:plan_command", "Show what fits on which device."),
    "preprocess": ("preprocess:preprocess_command", "Show the pixels that the vision encoder receives."),
    "pull": ("pull:pull_command", "Download a model."),
    "quantize": ("quantize:quantize_command", "Write a smaller copy of a model."),
    "serve": ("serve:serve_command", "Serve models over HTTP: Ollama's and OpenAI's API."),
    "tune": ("tune:tune_command", "Find the fastest settings for a model."),
    "trace": ("trace:trace_command", "Show intermediate tensors by name."),
    "verify": ("verify:verify_command", "Check a model's files against their sha256."),
    "worker": ("worker:worker_command", "Serve this machine's devices to other machines."),
}


class Commands(click.Group):
    """A group that knows its commands by name and one line, and imports one when it is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(f".{module}", __package__), attribute)
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As `click.Group` has it, without an import of every command for its line of help."""
        from click.shell_completion import CompletionItem

        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        found = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExamples:\n"
    "  mllama caption photo.jpg\n"
    "  mllama caption photo.jpg -p 'What colour is the car?'\n"
    "  mllama caption photo.jpg -m text.gguf --mmproj mmproj.gguf\n"
    "  mllama caption photo.jpg -m ollama:llama3.2-vision\n"
    "  mllama info text.gguf mmproj.gguf",
)
@click.version_option(__version__, prog_name="mllama")
@verbose_option
def cli() -> None:
    """Llama 3.2 Vision from GGUF files: describe images, and look inside the model.

    Without -m the small bundled demo model is used. It knows simple drawings of everyday things.
    """


def run(args: Sequence[str]) -> int:
    """Run one command line; failures are printed. Returns the exit code."""
    context: click.Context | None = None

    def show_traceback() -> bool:
        shown = context is not None and is_verbose(context)
        if shown:
            import traceback

            traceback.print_exc()
        return shown

    def unexpected(error: Exception) -> int:
        """A bug, or a machine in trouble."""
        hint = "" if show_traceback() else " (--verbose shows where)"
        echo(f"Error: unexpected {type(error).__name__}: {one_line(error)}{hint}", err=True)
        return 1

    fit_streams()
    try:
        # Not cli.main(), which handles Ctrl-C and broken pipes in its own way.
        context = cli.make_context("mllama", list(args), obj=tuple(args))
        with context:
            code = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as e:  # --help, --version
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return e.exit_code
    except click.UsageError as e:
        path = e.ctx.command_path if e.ctx else "mllama"
        # click lists choices on lines of their own
        words = show_name(" ".join(e.format_message().split()), 600)
        echo(f"Error: {words} (see {path} --help)", err=True)
        return e.exit_code
    except click.ClickException as e:
        show_traceback()
        echo(f"Error: {e.format_message()}", err=True)
        return e.exit_code
    except (KeyboardInterrupt, Aborted):
        echo("Interrupted", err=True)
        return 130
    except BrokenPipeError:
        discard(sys.stdout)
        return 141
    except MllamaError as e:
        show_traceback()
        echo(f"Error: {e}", err=True)
        return 1
    except OSError as e:
        if e.errno == errno.ENOENT and e.filename is None and _has_no_folder():
            show_traceback()
            echo("Error: the current folder is gone; go to another one", err=True)
            return 1
        if e.errno not in NO_ROOM or e.filename is not None:
            return unexpected(e)
        show_traceback()
        discard(sys.stdout)
        echo(f"Error: the output cannot be written: {os_reason(e)}", err=True)
        return 1
    except Exception as e:
        return unexpected(e)
    return code if isinstance(code, int) else 0


def _has_no_folder() -> bool:
    """Whether the current folder was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
