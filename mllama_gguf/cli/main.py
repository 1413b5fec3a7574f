"""The command line: the commands, what they share, and how every failure becomes one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some pictures of a batch failed, 130 interrupted (Ctrl-C), 141
the reader of the output went away.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .. import __version__
from ..cpus import MAX_THREADS
from ..errors import Aborted, MllamaError
from ..words import one_line

if TYPE_CHECKING:
    from ..model import Mllama

F = TypeVar("F", bound=Callable[..., Any])

# The modules are imported when their command runs: some need numpy, which takes longer than all of --help.
COMMANDS = {
    "cache": ("cache:cache_command", "Show or clear the cache of encoded pictures."),
    "caption": ("caption:caption_command", "Say what is in a picture."),
    "convert": ("convert:convert_command", "Convert a Hugging Face checkpoint to GGUF."),
    "devices": ("devices:devices_command", "List the devices that can compute."),
    "info": ("info:info_command", "Show what is in model files."),
    "lock": ("pull:lock_command", "Write a model's digests into models.lock."),
    "models": ("models:models_command", "List the models on this machine."),
    "plan": ("plan:plan_command", "Say what fits on which device."),
    "preprocess": ("preprocess:preprocess_command", "Show what the vision encoder gets of a picture."),
    "pull": ("pull:pull_command", "Download a model."),
    "quantize": ("quantize:quantize_command", "Write a smaller copy of a model."),
    "tune": ("tune:tune_command", "Find the fastest settings for a model."),
    "trace": ("trace:trace_command", "Show intermediate tensors by name."),
    "verify": ("verify:verify_command", "Check a model's files against their sha256."),
    "worker": ("worker:worker_command", "Serve this machine's devices to others."),
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


def _be_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value and not ctx.resilient_parsing:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("mllama_gguf").setLevel(logging.DEBUG)
        Failure.show_traceback = True
    return value


verbose_option = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_be_verbose,
    help="Log to stderr; show tracebacks.",
)


class Failure:
    """Whether failures are shown with their traceback. click has torn its context down by the time we ask."""

    show_traceback = False


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
    """Llama 3.2 Vision from GGUF files: say what is in a picture, and look inside the model.

    Without -m the small bundled demo model answers; it knows simple drawings of everyday things.
    """


def run(args: Sequence[str]) -> int:
    """Run one command line; failures are printed. Returns the exit code."""
    Failure.show_traceback = False
    try:
        # Not cli.main(), which handles Ctrl-C and broken pipes in its own way.
        with cli.make_context("mllama", list(args)) as context:
            code = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as e:  # --help, --version
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return e.exit_code
    except click.UsageError as e:
        path = e.ctx.command_path if e.ctx else "mllama"
        click.echo(f"Error: {e.format_message()} (see {path} --help)", err=True)
        return e.exit_code
    except click.ClickException as e:
        _traceback()
        e.show()
        return e.exit_code
    except (KeyboardInterrupt, Aborted):
        print("Interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would complain at exit, when it flushes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MllamaError as e:
        _traceback()
        click.echo(f"Error: {e}", err=True)
        return 1
    except Exception as e:  # a bug, or a machine in trouble
        _traceback()
        hint = "" if Failure.show_traceback else " (--verbose shows where)"
        click.echo(f"Error: unexpected {type(e).__name__}: {one_line(e)}{hint}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _traceback() -> None:
    if Failure.show_traceback:
        traceback.print_exc()


# ---- what the commands that open a model share -------------------------------------------------------------


def comma_list(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """An option's callback: NAME,NAME to a list."""
    return None if value is None else [word.strip() for word in value.split(",") if word.strip()]


def comma_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    """An option's callback: 3,1 or 3/1 to a list."""
    try:
        return None if value is None else [float(word) for word in re.split(r"[,/]", value)]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers, as in 3,1") from None


def layer_count(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    """An option's callback: -1, 0, 1, ... or auto."""
    return "auto" if value.lower() == "auto" else click.IntRange(min=-1)(value, param, ctx)


def given(name: str) -> bool:
    """Whether the user gave an option of the running command, on the command line or in the environment."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def model_options(command: F) -> F:
    """The options that say which model to open and how; `open_model` takes their values."""
    for option in reversed(
        (
            click.option(
                "-m",
                "--model",
                metavar="NAME|PATH",
                default="demo",
                envvar="MLLAMA_MODEL",
                show_default=True,
                show_envvar=True,
                help="GGUF file of the text model or of the whole model; demo; ollama:NAME[:TAG]; "
                "hf:OWNER/REPO/FILE; or a name in models.lock.",
            ),
            click.option(
                "--mmproj",
                metavar="NAME|PATH",
                envvar="MLLAMA_MMPROJ",
                show_envvar=True,
                help="GGUF file of the vision encoder, or hf:OWNER/REPO/FILE, if the model has none.",
            ),
            click.option(
                "-ngl",
                "--n-gpu-layers",
                metavar="N|auto",
                callback=layer_count,
                default="0",
                show_default=True,
                help="How many of the last layers go to the GPU; -1: all; auto: as many as fit.",
            ),
            click.option(
                "--vision-device",
                metavar="NAME",
                default="auto",
                show_default=True,
                help="Where the vision encoder runs: auto, cpu, or a name from `mllama devices`.",
            ),
            click.option(
                "--device",
                "devices",
                metavar="NAME,...",
                callback=comma_list,
                help="Devices to offload to, named as in `mllama devices`.  [default: all GPUs and workers]",
            ),
            click.option(
                "-ts",
                "--tensor-split",
                metavar="N,...",
                callback=comma_numbers,
                help="Share of each device, as in 3,1.  [default: by free memory]",
            ),
            click.option(
                "--main-gpu",
                metavar="N",
                type=click.IntRange(min=0),
                help="The one device that takes everything, counted from 0.  [default: all share]",
            ),
            click.option(
                "--no-kv-offload",
                "offload_kqv",
                flag_value=False,
                default=True,
                help="Keep caches and attention of offloaded layers on the CPU.",
            ),
            click.option(
                "--rpc",
                "rpc_servers",
                metavar="HOST:PORT,...",
                callback=comma_list,
                help="Use the devices of these `mllama worker`s too.",
            ),
            click.option(
                "--rpc-timeout",
                metavar="SECONDS",
                type=click.FloatRange(min=0, min_open=True),
                default=300.0,
                show_default=True,
                help="Longest silence of a worker.",
            ),
            click.option(
                "-c",
                "--n-ctx",
                metavar="N_CTX",
                type=click.IntRange(min=0),
                default=4096,
                show_default=True,
                help="Most tokens of a conversation; 0: as the model was trained.",
            ),
            click.option(
                "-b",
                "--n-batch",
                metavar="N_BATCH",
                type=click.IntRange(min=1),
                default=512,
                show_default=True,
                help="Most tokens that are computed at once.",
            ),
            click.option(
                "-fa",
                "--flash-attn",
                type=click.Choice(["on", "off"]),
                default="on",
                show_default=True,
                callback=lambda ctx, param, value: value == "on",
                help="Attention without its matrix in memory.",
            ),
            click.option(
                "--repack/--no-repack",
                default=False,
                show_default=True,
                help="Copy text weights to the layouts of ggml's special CPU kernels.",
            ),
            click.option(
                "-t",
                "--threads",
                metavar="THREADS",
                type=click.IntRange(1, MAX_THREADS),
                help="CPU threads.  [default: all usable CPUs, fewer for a small model]",
            ),
            click.option(
                "--allow-quantized-vision",
                is_flag=True,
                help="Take a vision encoder with quantized matrices, which ruin the captions.",
            ),
            click.option("--verify", is_flag=True, help="Check the files' sha256 before they are used."),
            verbose_option,
        )
    ):
        command = option(command)
    return command


def offload_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values of `model_options` those that say what may be offloaded to, as `Mllama` takes them; only
    those that say something."""
    names = ("devices", "tensor_split", "main_gpu", "rpc_servers")
    settings = {name: options[name] for name in names if options[name] is not None}
    return settings if options["offload_kqv"] else {**settings, "offload_kqv": False}


def with_tuned(options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `model_options`, with what `mllama tune` found for this model where the user gave none;
    says so on stderr."""
    from ..store.resolve import resolve
    from ..tune.saved import in_options, key_of, read_tuned

    warn = logging.StreamHandler(sys.stderr)
    warn.setFormatter(logging.Formatter("Warning: %(message)s"))
    log = logging.getLogger("mllama_gguf.tune.saved")
    log.addHandler(warn)
    try:
        tuned = read_tuned(
            lambda: key_of(resolve(options["model"], options["mmproj"]).paths, offload_settings(options))
        )
    except OSError:
        return dict(options)  # opening says it better
    finally:
        log.removeHandler(warn)
    used = {name: value for name, value in tuned.items() if not given(_OPTIONS.get(name, name))}
    if used:
        words = f"Tuned settings: {in_options(used)} (of mllama tune; --no-tuned ignores them)"
        click.echo(words, err=True)
    return {**options, **{_OPTIONS.get(name, name): value for name, value in used.items()}}


# Settings whose option has another name.
_OPTIONS = {"n_threads": "threads"}


@contextmanager
def open_model(*, bar: bool = True, image_cache: bool = False, **options: Any) -> Iterator[Mllama]:
    """The model that the options of `model_options` name; bar: with a progress bar on a terminal;
    image_cache: keep encoded pictures on disk."""
    from ..model import Mllama
    from ..store.resolve import resolve

    files = resolve(options["model"], options["mmproj"])
    if options["verify"]:
        from ..store.verify import require_verified

        with transfer_bar() as transfer:
            require_verified(files, transfer)
    settings: dict[str, Any] = dict(files.parameters)
    if options["allow_quantized_vision"]:
        settings["allow_quantized_vision"] = True
    if image_cache:
        _show_warnings("mllama_gguf.cache.disk")
    with (
        progress_bar() if bar else nullcontext() as progress,
        Mllama(
            files.text,
            files.mmproj,
            n_gpu_layers=options["n_gpu_layers"],
            vision_device=options["vision_device"],
            n_ctx=options["n_ctx"],
            n_batch=options["n_batch"],
            n_threads=options["threads"],
            flash_attn=options["flash_attn"],
            repack=options["repack"],
            **offload_settings(options),
            rpc_timeout=options["rpc_timeout"],
            progress=progress,
            image_cache=image_cache,
            **settings,
        ) as opened,
    ):
        yield opened


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"Warning: {record.getMessage()}", err=True)


def _show_warnings(name: str) -> None:
    """Show on stderr what a part of the package logs; with --verbose the whole log is shown."""
    logger = logging.getLogger(name)
    if not Failure.show_traceback and not any(isinstance(h, _Warnings) for h in logger.handlers):
        logger.addHandler(_Warnings(logging.WARNING))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback that draws a bar for each phase on stderr; None if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

    titles = {"load": "loading", "encode": "looking", "prompt": "reading"}
    console = Console(stderr=True)
    bar: Progress | None = None
    task = TaskID(0)
    phase = ""

    def stop() -> None:
        nonlocal bar
        if bar is not None:
            bar.stop()
            bar = None

    def progress(new_phase: str, done: int, total: int) -> None:
        nonlocal bar, task, phase
        if done >= total:
            stop()  # the text that follows must not meet the bar
            return
        if bar is None or new_phase != phase:
            stop()
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            bar = Progress(*columns, console=console, transient=True)
            task = bar.add_task(titles[new_phase], total=total)
            bar.start()
            phase = new_phase
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        stop()


@contextmanager
def transfer_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback that draws bytes, rate and time left on stderr; None if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    titles = {
        "download": "fetching",
        "verify": "checking",
        "convert": "converting",
        "quantize": "quantizing",
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(titles[phase], total=total or None, completed=done)
            bar.update(tasks[phase], completed=done, total=total or None)
            if total and done >= total:
                bar.remove_task(tasks.pop(phase))  # the next file gets a bar of its own

        yield progress
