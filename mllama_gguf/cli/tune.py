"""`mllama tune`: the fastest settings for a model on this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..words import show_size
from .main import given, model_options, offload_settings

if TYPE_CHECKING:
    from ..tune.search import Point, Range, Task


@click.command(
    "tune",
    epilog="\b\nExamples:\n"
    "  mllama tune photo.jpg -m all.gguf\n"
    "  mllama tune photo.jpg -m text.gguf --mmproj mmproj.gguf --out tuning --repeats 5\n"
    "  mllama tune photo.jpg -t 8 --vision-device cpu   (these two are not varied)",
)
@click.argument("image", metavar="IMAGE", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", default="Describe this image.", show_default=True, help="What to ask.")
@click.option(
    "-n",
    "--max-tokens",
    metavar="MAX",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most tokens of a reply.",
)
@click.option(
    "--repeats",
    metavar="N",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Captions a point; the medians count.",
)
@click.option(
    "-o",
    "--out",
    metavar="DIR",
    type=click.Path(),
    default="mllama-tune",
    show_default=True,
    help="Folder of tune.json, tune.csv and tune.png; an interrupted run goes on from there.",
)
@click.option("--fresh", is_flag=True, help="Forget what is in the folder.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=1800.0,
    show_default=True,
    help="Most time for a point.",
)
@click.option(
    "--no-save", is_flag=True, help="Only show the best settings; `mllama caption` does not use them."
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
    **model_settings: Any,
) -> None:
    """Find the fastest settings for a model on this machine, by captions of IMAGE.

    Varied are n_gpu_layers, the vision encoder's device, flash attention, threads and batch, except those
    that are given. Every point is a process of its own: one that crashes is a row of the table. What is best
    is kept for `mllama caption` with this model.
    """
    from ..errors import RequestError
    from ..files import cannot_write
    from ..store.resolve import resolve
    from ..tune.saved import check_tuned, config_path, in_options, key_of, write_tuned
    from ..tune.search import Results, Task, draw_plot, tune

    s = model_settings
    if not image.is_file():
        raise RequestError(f"{image}: no such file")
    offload = offload_settings(s)
    files = resolve(s["model"], s["mmproj"])
    fixed = {**files.parameters, **offload, "n_ctx": s["n_ctx"]}
    if s["allow_quantized_vision"]:
        fixed["allow_quantized_vision"] = True
    if s["repack"]:
        fixed["repack"] = True
    if s["rpc_servers"]:
        fixed["rpc_timeout"] = s["rpc_timeout"]
    task = Task(files.text, files.mmproj, image, prompt, max_tokens, repeats, fixed, timeout)
    choice = _range(task, s)
    results = Results(out, task, fresh=fresh)
    if not no_save:
        check_tuned()
    with _progress() as on_point:
        best = tune(task, choice, results, on_point)

    _print(results.points, best)
    try:
        draw_plot(results.points, results.plot_path, f"{files.name}, one caption of {image.name}")
        written = f"{results.json_path}, {results.csv_path}, {results.plot_path}"
    except RequestError as e:
        written = f"{results.json_path}, {results.csv_path} ({e})"
    click.echo(f"Best: {in_options(best.settings)}")
    click.echo(f"Results: {written}")
    if not no_save:
        about = {"model": files.name, "seconds": best.seconds, "date": time.strftime("%Y-%m-%d")}
        try:
            path = write_tuned(key_of(files.paths, offload), best.settings, about)
        except OSError as e:
            raise cannot_write(e.filename or config_path(), e) from e
        click.echo(f"`mllama caption` uses it from now on for this model ({path})")


def _range(task: Task, s: dict[str, Any]) -> Range:
    from ..backend.isolated import parse_workers, remote_devices
    from ..backend.local import devices
    from ..backend.plan import make_plan, offload_devices
    from ..cpus import default_threads, usable_cpus
    from ..tune.search import BATCHES, Range

    workers = parse_workers(s["rpc_servers"]) if s["rpc_servers"] else ()
    found = remote_devices(workers) if workers else devices()
    main_gpu = -1 if s["main_gpu"] is None else s["main_gpu"]
    targets = offload_devices(found, {"devices": s["devices"], "main_gpu": main_gpu})
    # Also the check that the model can be read, before the first point.
    plan = make_plan(
        task.model,
        task.mmproj,
        n_gpu_layers=0,
        n_ctx=s["n_ctx"],
        allow_quantized_vision=task.fixed.get("allow_quantized_vision", False),
    )
    n_bytes = sum(memory.mapped + memory.weights for memory in plan.settings[0].devices)
    cpus = usable_cpus()
    base = {
        "n_gpu_layers": 0 if s["n_gpu_layers"] == "auto" else s["n_gpu_layers"],
        "vision_device": s["vision_device"],
        "n_threads": s["threads"] or default_threads(n_bytes),
        "n_batch": s["n_batch"],
        "flash_attn": s["flash_attn"],
    }
    others: dict[str, list[Any]] = {
        "vision_device": ["auto", "cpu", *(device.name for device in targets)] if targets else ["auto"],
        "flash_attn": [True, False],
        "n_threads": sorted({cpus, *(2**i for i in range(cpus.bit_length()) if 2**i <= cpus)}),
        "n_batch": [n for n in BATCHES if n <= plan.n_ctx] or [s["n_batch"]],
    }
    for name, option in (
        ("n_threads", "threads"),
        *((n, n) for n in ("vision_device", "flash_attn", "n_batch")),
    ):
        if given(option):
            others[name] = [base[name]]
    fixed_layers = given("n_gpu_layers") and s["n_gpu_layers"] != "auto"
    return Range(base, plan.n_layer if targets and not fixed_layers else 0, others)


class _progress:
    """A bar on a terminal's stderr with the time left; elsewhere a line a point."""

    def __enter__(self) -> Any:
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("measuring", total=None)
            self._bar.start()
        return self._on_point

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _on_point(self, point: Point, done: int, total: int) -> None:
        from ..tune.saved import in_options

        words = point.error or f"{point.total:.3f} s"
        if self._bar is None:
            click.echo(f"{done}/{total}  {in_options(point.settings)}: {words}", err=True)
        else:
            self._bar.update(self._task, completed=done, total=total, description=in_options(point.settings))


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
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for point in points:
        if point.error:
            from ..tune.saved import in_options

            click.echo(f"Failed: {in_options(point.settings)}: {point.error}")
