"""Which settings are the fastest for a model on this machine: measured on a real caption.

One setting is varied at a time, the best of it kept for the next: n_gpu_layers first in large steps, then
between the best of those, then where the vision encoder runs, flash attention, threads, batch. Every point is
a process of its own; what was measured is kept in a file from which a later run continues.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import MllamaError, RequestError
from ..files import AnyPath, Kind, cannot_write, check_folder, check_output, replacing, write_whole
from ..reading import parse_json, read_regular, read_text
from ..words import printable
from .process import PointFailed, run_point
from .saved import TUNED, head_sha256

logger = logging.getLogger(__name__)

VERSION = 1
CAPTION = "mllama_gguf.tune.search:measure_caption"
SECONDS = ("load", "encode", "prompt", "decode")
BATCHES = (64, 128, 256, 512, 1024, 2048)
COARSE = 5  # values of n_gpu_layers in the first round
# What is faster by less than this is no better: it is noise.
NOISE = 0.03


@dataclass
class Point:
    """One setting and its medians. error: why there are none.

    seconds: load, encode, prompt, decode; tokens_per_second: prompt, decode; memory: peak bytes by device;
    rss: the most of the process's memory, bytes
    """

    settings: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    rss: int = 0
    caption: str = ""
    error: str = ""

    @property
    def total(self) -> float:
        """Seconds of one caption; infinite for a failure."""
        return sum(self.seconds[name] for name in SECONDS[1:]) if not self.error else float("inf")


@dataclass(frozen=True)
class Task:
    """What is measured: a caption of an image by a model, each `repeats` times.

    fixed:   settings of `Mllama` that are not varied: n_ctx, devices, rpc_servers, ...
    timeout: most seconds of a point
    function: what measures it, in a process of its own; see `measure_caption`
    """

    model: Path
    mmproj: Path | None
    image: Path
    prompt: str
    max_tokens: int = 64
    repeats: int = 3
    fixed: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 1800.0
    function: str = CAPTION

    def key(self) -> str:
        """Tells results of another task apart. Raises OSError."""
        parts = [
            [head_sha256(path) for path in (self.model, self.mmproj) if path],
            hashlib.sha256(read_regular(self.image)).hexdigest(),
            [self.prompt, self.max_tokens, self.repeats, sorted(self.fixed.items())],
        ]
        return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()

    def measure_point(self, settings: Mapping[str, Any]) -> Point:
        """One point, in a process of its own. A failure is a point too."""
        request = {
            "model": os.path.realpath(self.model),
            "mmproj": None if self.mmproj is None else os.path.realpath(self.mmproj),
            "image": os.path.realpath(self.image),
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "repeats": self.repeats,
            "settings": {**self.fixed, **settings},
        }
        try:
            return Point(dict(settings), **run_point(self.function, request, self.timeout))
        except PointFailed as e:
            return Point(dict(settings), error=str(e))


def measure_caption(
    model: str,
    mmproj: str | None,
    image: str,
    prompt: str,
    max_tokens: int,
    repeats: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Caption an image `repeats` times from empty caches: the fields of a `Point`, for `points`."""
    from ..model import Mllama

    start = time.perf_counter()
    with Mllama(model, mmproj, image_cache=False, **settings) as opened:
        load = time.perf_counter() - start
        runs = []
        caption = ""
        for _ in range(repeats):
            opened.reset()
            reply = opened.reply(image=image, prompt=prompt, max_tokens=max_tokens)
            caption = reply.read()
            runs.append(reply.stats)
        memory = {d.device: d.mapped + d.peak for d in opened.memory().devices}
    return {
        "seconds": {"load": load, **_medians([run.seconds for run in runs])},
        "tokens_per_second": _medians([run.tokens_per_second for run in runs]),
        "memory": memory,
        "rss": max(_peak_rss(resource.RUSAGE_SELF), _peak_rss(resource.RUSAGE_CHILDREN)),
        "caption": caption,
    }


def _medians(runs: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    return {name: statistics.median(run[name] or 0.0 for run in runs) for name in runs[0]}


def _peak_rss(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Results:
    """The points of a task in a folder: tune.json, from which a later run continues, and tune.csv. plot_path
    is for `draw_plot`."""

    def __init__(self, folder: AnyPath, task: Task, *, fresh: bool = False) -> None:
        """fresh: discard earlier results. Raises RequestError if it is of another task or damaged, or if the
        folder cannot be written or has other files of these names."""
        folder = check_folder(folder)
        self.json_path, self.csv_path = folder / "tune.json", folder / "tune.csv"
        self.plot_path = folder / "tune.png"
        inputs = [path for path in (task.model, task.mmproj, task.image) if path]
        if folder.is_dir():  # else they can be made
            for path, kind in ((self.json_path, _JSON), (self.csv_path, _CSV), (self.plot_path, PLOT)):
                check_output(path, kind, inputs=inputs, overwrite=True)
        self._key = task.key()
        self._about = {"model": str(task.model), "image": str(task.image), "prompt": task.prompt}
        self.points: list[Point] = []
        self.recommended: dict[str, Any] | None = None
        if self.json_path.exists() and not fresh:
            self._read()

    def _read(self) -> None:
        another = f"give another folder, or --fresh to measure again ({self.json_path})"
        try:
            content = parse_json(read_text(self.json_path))
            points = [_read_point(point) for point in content["points"]]
            same = (content["version"], content["key"]) == (VERSION, self._key)
        except (ValueError, KeyError, TypeError) as e:
            raise RequestError(f"results that cannot be read: {e}; {another}") from None
        if not same:
            raise RequestError(f"results of another model, image or choice of options; {another}")
        self.points, self.recommended = points, content.get("recommended")

    def find(self, settings: Mapping[str, Any]) -> Point | None:
        """The point of these settings, if it was measured."""
        return next((point for point in self.points if point.settings == settings), None)

    def add(self, point: Point) -> None:
        """Keep a point. Raises MllamaError."""
        self.points.append(point)
        self.save()

    def save(self) -> None:
        """Write both files. Raises MllamaError."""
        content = {
            "version": VERSION,
            "key": self._key,
            **self._about,
            "recommended": self.recommended,
            "points": [asdict(point) for point in self.points],
        }
        text = json.dumps(content, indent=1) + "\n"
        for path, words, kind in ((self.json_path, text, _JSON), (self.csv_path, self._csv(), _CSV)):
            try:
                write_whole(path, words, kind=kind)
            except OSError as e:
                raise cannot_write(path, e) from e

    def _csv(self) -> str:
        devices = list(dict.fromkeys(device for point in self.points for device in point.memory))
        out = io.StringIO()
        rows = csv.writer(out)
        rows.writerow(
            [
                *TUNED,
                *(f"{name}_seconds" for name in SECONDS),
                *(f"{name}_tokens_per_second" for name in ("prompt", "decode")),
                *(f"memory_{device}" for device in devices),
                "rss",
                "caption",
                "error",
            ]
        )
        for point in self.points:
            rows.writerow(
                [
                    *(point.settings[name] for name in TUNED),
                    *(point.seconds.get(name, "") for name in SECONDS),
                    *(point.tokens_per_second.get(name, "") for name in ("prompt", "decode")),
                    *(point.memory.get(device, "") for device in devices),
                    point.rss or "",
                    point.caption,
                    point.error,
                ]
            )
        return out.getvalue()


def _read_point(values: Mapping[str, Any]) -> Point:
    """A point of a file. Raises ValueError, TypeError, KeyError."""
    point = Point(**values)
    tables = (point.settings, point.seconds, point.tokens_per_second, point.memory)
    if not all(isinstance(table, dict) for table in tables) or not set(TUNED) <= set(point.settings):
        raise ValueError("a point without its settings or measurements")
    float(point.total)
    return point


@dataclass(frozen=True)
class Range:
    """What is varied. base: where the search begins; n_layer: of the model, 0 without a device to offload to;
    others: the values of every other setting."""

    base: Mapping[str, Any]
    n_layer: int
    others: Mapping[str, Sequence[Any]]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is varied."""
        return not self.n_layer and all(
            list(values) == [self.base[name]] for name, values in self.others.items()
        )


def tune(
    task: Task,
    choice: Range,
    results: Results,
    on_point: Callable[[Point, int, int], None] = lambda point, done, total: None,
) -> Point:
    """Measure until the best setting is known; the best point.

    on_point: called with every point, how many are done, and of how many, as far as that is known

    Raises MllamaError if no point works at all.
    """
    best: Point | None = None
    current = dict(choice.base)
    seen: list[dict[str, Any]] = []  # in this run
    rounds = [("n_gpu_layers", None), *choice.others.items()]
    for index, (name, given) in enumerate(rounds):
        # A later round does not measure the value again that is the best until then.
        ahead = sum(len(v) - (choice.base[n] in v) for n, v in rounds[index + 1 :] if v)
        if given is None:
            values = _layer_counts(choice, results, current)
            left = COARSE + 2 if choice.n_layer else 1
        else:
            new = [value for value in given if {**current, name: value} not in seen]
            values, left = iter(new), len(new)
        for value in values:
            left = max(0, left - 1)
            settings = {**current, name: value}
            point = results.find(settings)
            if point is None:
                point = task.measure_point(settings)
                results.add(point)
            seen.append(settings)
            on_point(point, len(seen), len(seen) + left + ahead)
            if not point.error and (best is None or point.total < best.total * (1 - NOISE)):
                best = point
        if best is not None:
            current = dict(best.settings)
    if best is None:
        raise MllamaError(f"no setting works; error of the last one: {results.points[-1].error}")
    results.recommended = best.settings
    results.save()
    return best


def _layer_counts(choice: Range, results: Results, current: Mapping[str, Any]) -> Iterator[int]:
    """First in large steps from none to all, then by halves between the neighbours of the best."""
    if not choice.n_layer:
        yield current["n_gpu_layers"]
        return
    most = choice.n_layer + 1
    tried = sorted({round(most * i / (COARSE - 1)) for i in range(COARSE)})
    yield from tried

    def seconds(n: int) -> float:
        point = results.find({**current, "n_gpu_layers": n})
        return point.total if point else float("inf")

    while True:
        best = min(tried, key=seconds)
        place = tried.index(best)
        new = []
        for other in tried[max(0, place - 1) : place] + tried[place + 1 : place + 2]:
            if abs(other - best) > 1:
                new.append((other + best) // 2)
        if not new:
            return
        yield from new
        tried = sorted({*tried, *new})


def _is_json(file: BinaryIO) -> bool:
    """Whether a file is the tune.json of a run of tune."""
    content = parse_json(file.read())
    return isinstance(content, dict) and {"version", "key", "points"} <= set(content)


PROGRAM = "mllama tune"
PLOT = Kind.png_by(f"plot of `{PROGRAM}`", PROGRAM)
_JSON = Kind(f"file of `{PROGRAM}`", _is_json)
_CSV = Kind.begins_with(f"table of `{PROGRAM}`", ",".join(TUNED).encode() + b",load_seconds,")


def draw_plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Seconds and memory over layers, as a PNG. Raises RequestError without matplotlib, MllamaError if the
    file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("no plot without matplotlib; run: pip install 'mllama_gguf[tune]'") from None
    first = points[0].settings
    shown = [p for p in points if {**p.settings, "n_gpu_layers": 0} == {**first, "n_gpu_layers": 0}]
    shown.sort(key=lambda point: point.settings["n_gpu_layers"])
    good = [point for point in shown if not point.error]
    layers = [point.settings["n_gpu_layers"] for point in good]

    figure = Figure(figsize=(8, 7), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    speed, memory = figure.subplots(2, 1, sharex=True)
    speed.set_title(printable(title, keep=""), parse_math=False)  # names of files may have "$"
    for name in SECONDS[1:]:
        speed.plot(layers, [point.seconds[name] for point in good], marker="o", label=name)
    for index, point in enumerate(p for p in shown if p.error):
        label = "failed" if index == 0 else None
        speed.axvline(point.settings["n_gpu_layers"], color="tab:red", linestyle=":", label=label)
    speed.set_ylabel("seconds")
    speed.set_ylim(bottom=0)
    speed.legend()
    for device in dict.fromkeys(device for point in good for device in point.memory):
        used = [point.memory.get(device, 0) / 2**20 for point in good]
        memory.plot(layers, used, marker="o", label=device)
    memory.set_ylabel("peak memory, MiB")
    memory.set_xlabel("n_gpu_layers")
    memory.set_ylim(bottom=0)
    if good:
        memory.legend()
    try:
        with replacing(path, kind=PLOT) as file:
            canvas.print_figure(file, dpi=120, format="png", metadata={"Software": PROGRAM})
    except OSError as e:
        raise cannot_write(path, e) from e
