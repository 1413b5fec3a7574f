"""`mllama plan`: what fits where, before it is loaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from ..settings import MAX_PARALLEL
from ..words import show_size
from .opening import find_files, settings_of, with_tuned
from .options import ModelChoice, no_tuned_option, settings_options
from .terminal import echo, echo_json, table_width

if TYPE_CHECKING:
    from ..backend.plan import Plan

COLUMNS = ("mapped", "weights", "self_kv", "cross_kv", "compute", "vision", "staging", "peak")


@click.command(
    "plan",
    epilog="\b\nExamples:\n"
    "  mllama plan demo\n"
    "  mllama plan text.gguf --mmproj mmproj.gguf -c 8192\n"
    "  mllama plan all.gguf --budget 8GiB,4GiB --json\n"
    "  mllama plan all.gguf --rpc 127.0.0.1:50052 -ngl 12",
)
@click.argument("model_argument", metavar="[MODEL]", required=False)
@click.option(
    "--budget",
    metavar="SIZE,...",
    help="Memory to use on each device, or NAME=SIZE.  [default: what is free, less a margin]",
)
@click.option(
    "--parallel",
    metavar="N",
    type=click.IntRange(1, MAX_PARALLEL),
    default=1,
    help="Count N conversations that compute together, each with n_ctx tokens and an image.  [default: 1]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@no_tuned_option
@settings_options(without=("chat_template",))  # no prompt is written
def plan_command(
    model_argument: str | None,
    budget: str | None,
    parallel: int,
    as_json: bool,
    no_tuned: bool,
    choice: ModelChoice,
) -> None:
    """Show the memory that each number of offloaded layers needs on each device, and the largest that fits.

    MODEL is a path or a name, as for -m. The weights are not loaded. ggml says how large its buffers are for
    a full context and one image with all its tiles. "peak" is the most memory that a device needs at one
    time. "mapped" weights are pages of the file; they are not part of it. With -ngl only that number is
    shown. Settings that `mllama tune` found are used, except the number of layers.
    """
    from ..backend.plan import make_plan
    from .log import show_native_warnings

    show_native_warnings()

    if model_argument is not None:
        choice = replace(choice, name=model_argument)
    asked_layers = "n_gpu_layers" in choice.settings
    if not no_tuned:
        choice = with_tuned(choice)
    files = find_files(choice)
    settings = settings_of(choice, files).as_dict()
    layers = settings.pop("n_gpu_layers")
    if layers == "auto" or not asked_layers:
        layers = None
    plan = make_plan(
        files.text, files.mmproj, budget=budget, n_gpu_layers=layers, parallel=parallel, **settings
    )
    if as_json:
        echo_json(_as_dict(plan))
    else:
        _print(plan)


def _as_dict(plan: Plan) -> dict[str, Any]:
    from ..backend.plan import with_tiles

    total = sum(plan.n_tiles)
    return {
        "n_ctx": plan.n_ctx,
        "n_tiles": list(plan.n_tiles),
        "parallel": plan.parallel,
        "limits": plan.limits,
        "best": plan.best,
        "settings": [
            {
                "n_gpu_layers": setting.n_gpu_layers,
                "fits": setting.fits,
                "lacking": list(setting.lacking),
                "devices": [
                    {
                        **asdict(memory),
                        "peak": memory.peak,
                        "cross_kv_by_tiles": [
                            with_tiles(memory, total, n).cross_kv for n in range(1, total + 1)
                        ],
                    }
                    for memory in setting.devices
                ],
            }
            for setting in plan.settings
        ],
    }


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    tiles = f", one image of {plan.n_tiles[0]} tiles" if plan.n_tiles else ""
    many = f"{plan.parallel} conversations, each " if plan.parallel > 1 else ""
    table = Table(title=f"{many}n_ctx {plan.n_ctx}{tiles}", title_justify="left")
    for name in ("layers", "device", *COLUMNS, "fits"):
        table.add_column(name.replace("_", " "), justify="left" if name in ("device", "fits") else "right")
    for setting in plan.settings:
        for index, memory in enumerate(setting.devices):
            table.add_row(
                "" if index else str(setting.n_gpu_layers),
                memory.device,
                *(show_size(getattr(memory, name)) if getattr(memory, name) else "-" for name in COLUMNS),
                "no" if memory.device in setting.lacking else "yes",
                style="bold" if setting.n_gpu_layers == plan.best else None,
            )
    Console(width=table_width(140)).print(table)
    if plan.best is None:
        echo(f"Nothing fits; lower n_ctx{', --parallel' if plan.parallel > 1 else ''} or n_batch.")
    elif len(plan.settings) == 1 and not plan.settings[0].n_gpu_layers and not plan.limits:
        echo("There is no device to offload to: everything runs on the CPU.")
    else:
        echo(f"The largest that fits: -ngl {plan.best}")
