"""`mllama tune`: the fastest settings for a model on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..settings import DEFAULT_PROMPT, DEFAULTS, in_options, offload_settings
from ..tune.saved import TUNED
from ..words import show_size
from .opening import find_files, settings_of
from .options import ModelChoice, model_options
from .progress import StepBar
from .terminal import echo, table_width

if TYPE_CHECKING:
    from ..settings import Settings
    from ..tune.search import Point, Range, Task


@click.command(
    "tune",
    epilog="\b\nExamples:\n"
    "  mllama tune photo.jpg -m all.gguf\n"
    "  mllama tune photo.jpg -m text.gguf --mmproj mmproj.gguf --out tuning --repeats 5\n"
    "  mllama tune photo.jpg -t 8 --vision-device cpu   # these two are not varied",
)
@click.argument("image", metavar="IMAGE", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", default=DEFAULT_PROMPT, show_default=True, help="Question about the image.")
@click.option(
    "-n",
    "--max-tokens",
    metavar="MAX",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Stop a reply after MAX tokens.",
)
@click.option(
    "--repeats",
    metavar="N",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of captions at each point; their medians count.",
)
@click.option(
    "-o",
    "--out",
    metavar="DIR",
    type=click.Path(),
    default="mllama-tune",
    show_default=True,
    help="Folder of tune.json, tune.csv and tune.png; an interrupted run continues from there.",
)
@click.option("--fresh", is_flag=True, help="Discard the results in the folder.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=1800.0,
    show_default=True,
    help="Give up on a point after SECONDS.",
)
@click.option(
    "--no-save", is_flag=True, help="Show the best settings, but do not keep them for `mllama caption`."
)
@model_options
def tune_command(
    image: Path,
    prompt: str,
    max_tokens: int,
    repeats: int,
    out: str,
    fresh: bool,
    timeout: float,
    no_save: bool,
    choice: ModelChoice,
) -> None:
    """Find the fastest settings for a model on this machine, by captions of IMAGE.

    It varies n_gpu_layers, the vision encoder's device, flash attention, threads and batch, except those that
    are given. Each point is measured in its own process; a crash is shown in the table as a failed point.
    `mllama caption` then uses the best settings with this model.
    """
    from ..errors import RequestError
    from ..files import cannot_write
    from ..reading import open_regular
    from ..tune.saved import check_tuned, config_path, key_of, write_tuned
    from ..tune.search import Results, Task, draw_plot, tune
    from ..vision.loading import load_image
    from ..words import os_reason, show_name

    try:
        open_regular(image).close()
    except OSError as e:
        raise RequestError(f"{show_name(image)}: {os_reason(e)}") from e
    load_image(image)  # else every point fails for it
    files = find_files(choice)
    settings = settings_of(choice, files)
    fixed = {
        name: value
        for name, value in settings.as_dict().items()
        if name not in TUNED and (value != DEFAULTS[name] or name == "n_ctx")
    }
    task = Task(files.text, files.mmproj, image, prompt, max_tokens, repeats, fixed, timeout)
    varied = _range(task, choice, settings)
    results = Results(out, task, fresh=fresh)
    if not no_save:
        check_tuned()
    with StepBar("measuring") as bar:

        def on_point(point: Point, done: int, total: int) -> None:
            words = point.error or f"{point.total:.3f} s"
            bar.advance(done, total, in_options(point.settings), words)

        best = tune(task, varied, results, on_point)

    _print(results.points, best)
    echo(f"Best: {in_options(best.settings)}")
    if varied.is_empty:
        echo("Nothing was varied: every setting is given. `mllama caption` does not use them by itself")
    elif not no_save:
        key = key_of(files.paths, offload_settings(choice.settings))
        about = {"model": files.name, "seconds": best.seconds, "date": time.strftime("%Y-%m-%d")}
        try:
            path = write_tuned(key, best.settings, about)
        except OSError as e:
            raise cannot_write(e.filename or config_path(), e) from e
        echo(f"`mllama caption` uses it from now on for this model ({path})")
    try:
        draw_plot(results.points, results.plot_path, f"{files.name}, one caption of {image.name}")
        written = f"{results.json_path}, {results.csv_path}, {results.plot_path}"
    except RequestError as e:
        written = f"{results.json_path}, {results.csv_path} ({e})"
    echo(f"Results: {written}")


def _range(task: Task, choice: ModelChoice, settings: Settings) -> Range:
    """What is varied, from where: not what the user gave."""
    from ..backend.isolated import remote_devices
    from ..backend.local import devices
    from ..backend.plan import make_plan, offload_devices
    from ..cpus import default_threads, usable_cpus
    from ..tune.search import BATCHES, Range

    found = remote_devices(settings.rpc_servers) if settings.rpc_servers else devices()
    targets = offload_devices(found, settings.for_model())
    # Also the check that the model can be read, before the first point.
    plan = make_plan(
        task.model,
        task.mmproj,
        n_gpu_layers=0,
        n_ctx=settings.n_ctx,
        allow_quantized_vision=settings.allow_quantized_vision,
    )
    n_bytes = sum(memory.mapped + memory.weights for memory in plan.settings[0].devices)
    cpus = usable_cpus()
    fixed_layers = settings.n_gpu_layers if choice.settings.get("n_gpu_layers", "auto") != "auto" else None
    base = {name: getattr(settings, name) for name in TUNED}
    base["n_gpu_layers"] = fixed_layers or 0
    base["n_threads"] = settings.n_threads or default_threads(n_bytes)
    others: dict[str, list[Any]] = {
        "vision_device": ["auto", "cpu", *(device.name for device in targets)] if targets else ["auto"],
        "flash_attn": [True, False] if settings.type_v != "q8_0" else [True],
        "n_threads": sorted({cpus, *(2**i for i in range(cpus.bit_length()) if 2**i <= cpus)}),
        "n_batch": [n for n in BATCHES if n <= plan.n_ctx] or [settings.n_batch],
    }
    others.update({name: [base[name]] for name in others if name in choice.settings})
    return Range(base, plan.n_layer if targets and fixed_layers is None else 0, others)


def _print(points: list[Point], best: Point) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..tune.search import SECONDS

    devices = list(dict.fromkeys(device for point in points for device in point.memory))
    table = Table(title="Medians of one caption", title_justify="left")
    for name in ("layers", "vision", "threads", "batch", "fa", *(f"{n} s" for n in SECONDS), "prompt t/s"):
        table.add_column(name, justify="right")
    for name in ("decode t/s", *(f"{device} peak" for device in devices), "process"):
        table.add_column(name, justify="right")
    for point in points:
        p = point.settings
        row = [
            p["n_gpu_layers"],
            p["vision_device"],
            p["n_threads"],
            p["n_batch"],
            "on" if p["flash_attn"] else "off",
        ]
        if not point.error:
            row += [f"{point.seconds[name]:.3f}" for name in SECONDS]
            row += [f"{point.tokens_per_second[name]:.1f}" for name in ("prompt", "decode")]
            row += [show_size(point.memory[device]) if device in point.memory else "-" for device in devices]
            row += [show_size(point.rss)]
        table.add_row(*map(str, row), style="bold" if point is best else "red" if point.error else None)
    console = Console(width=table_width(160))
    console.print(table)
    for point in points:
        if point.error:
            echo(f"Failed: {in_options(point.settings)}: {point.error}")
