"""Progress bars on a terminal's stderr. rich is imported when a bar is drawn."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..words import printable
from .terminal import echo, is_live

if TYPE_CHECKING:
    from types import FrameType

    from rich.progress import Progress, ProgressColumn, TaskID

_PHASES = {"load": "loading", "encode": "looking", "prompt": "reading"}
_TRANSFERS = {
    "download": "fetching",
    "verify": "checking",
    "convert": "converting",
    "quantize": "quantizing",
}


@contextmanager
def _whole() -> Iterator[None]:
    """Let Ctrl-C wait: a bar that is half begun or half taken away stays, and draws over what follows."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _new(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    class Whole(Progress):
        def start(self) -> None:
            try:
                with _whole():
                    super().start()
            except KeyboardInterrupt:  # in a `with` nobody else would stop it
                self.stop()
                raise

        def stop(self) -> None:
            with _whole():
                super().stop()

    return Whole(*columns, console=Console(stderr=True), transient=True)


class PhaseBar:
    """A callback for `Mllama` that draws a bar for each phase; draws nothing if stderr is not a terminal."""

    def __init__(self) -> None:
        self._live = is_live(sys.stderr)
        self._bar: Progress | None = None
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self._live:
            return
        if done >= total:
            self.stop()  # the text that follows must not meet the bar
            return
        bar = self._bar
        if bar is None or phase != self._phase:
            self.stop()
            bar = self._begin(phase, total)
        bar.update(bar.task_ids[0], completed=done, total=total)

    def _begin(self, phase: str, total: int) -> Progress:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn

        bar = _new(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        bar.add_task(_PHASES[phase], total=total)
        self._bar, self._phase = bar, phase
        bar.start()
        return bar

    def stop(self) -> None:
        """Take the bar away; a phase that was stopped or failed has no other end."""
        with _whole():
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def __enter__(self) -> PhaseBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def transfer_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback that draws bytes, rate and time left; None if stderr is not a terminal."""
    if not is_live(sys.stderr):
        yield None
        return

    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _new(*columns) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(_TRANSFERS[phase], total=total or None, completed=done)
            bar.update(tasks[phase], completed=done, total=total or None)
            if total and done >= total:
                bar.remove_task(tasks.pop(phase))  # the next file gets a bar of its own

        yield progress


class BatchBar:
    """A batch's images, their rate, the time left and the failures. Only for a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        self._bar = _new(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
        )
        self._task = self._bar.add_task("", total=None, rate="", failed="")
        self._failed = 0

    def __enter__(self) -> BatchBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, total: int, done: int) -> None:
        """Begin with `total` images, `done` of them done before."""
        self._bar.update(self._task, total=total, completed=done)
        self._bar.reset(self._task, total=total, completed=done)

    def advance(self, *, failed: bool) -> None:
        """One more image is done, or failed."""
        self._failed += failed
        speed = self._bar.tasks[0].speed
        self._bar.update(
            self._task,
            advance=1,
            rate="" if speed is None else f"{speed * 60:.0f} a minute",
            failed=f"[red]{self._failed} failed" if self._failed else "",
        )

    def print(self, line: str) -> None:
        """Show a line above the bar."""
        self._bar.console.print(printable(line), markup=False, highlight=False)


class StepBar:
    """Steps of a measurement, a line of words for each. Without a terminal the lines stay."""

    def __init__(self, title: str) -> None:
        self._bar: Progress | None = None
        if is_live(sys.stderr):
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

            self._bar = _new(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> StepBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, total: int, what: str, result: str) -> None:
        """One step is done. what: the step; result: what came out."""
        if self._bar is None:
            echo(f"{done}/{total}  {what}: {result}", err=True)
        else:
            self._bar.update(self._task, completed=done, total=total, description=what)
