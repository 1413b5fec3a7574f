"""`mllama caption --out FILE` and `--sidecar .txt`: thousands of pictures, as batch.py does them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..settings import DEFAULTS
from .opening import open_chosen
from .options import F, ModelChoice
from .progress import BatchBar
from .terminal import echo, echo_json, is_live

if TYPE_CHECKING:
    from ..batch.captions import CaptionOptions
    from ..batch.outputs import Output
    from ..batch.run import Report, Summary
    from ..files import AnyPath
    from ..model import Mllama


@dataclass(frozen=True)
class BatchSettings:
    """The values of `batch_options`."""

    out: str | None
    sidecar: str | None
    recursive: bool
    prefix: str
    suffix: str
    overwrite: bool
    limit: int | None
    encode_ahead: bool | None

    @property
    def wanted(self) -> bool:
        """Whether this is a batch. Raises UsageError for options that only one would heed."""
        if self.out is not None and self.sidecar is not None:
            raise click.UsageError("--out and --sidecar exclude each other")
        if self.out is not None or self.sidecar is not None:
            return True
        for name in ("recursive", "prefix", "suffix", "overwrite", "limit"):
            if getattr(self, name):
                raise click.UsageError(f"--{name} needs --out or --sidecar")
        if self.encode_ahead is not None:
            raise click.UsageError("--encode-ahead needs --out or --sidecar")
        return False


def batch_options(command: F) -> F:
    """The options of a batch; the command takes them as `batch`, a BatchSettings."""

    @wraps(command)
    def run(**values: Any) -> Any:
        named = {field.name: values.pop(field.name) for field in fields(BatchSettings)}
        return command(batch=BatchSettings(**named), **values)

    wrapped: Any = run
    for option in reversed(
        (
            click.option("--out", metavar="FILE", help="Write the captions to FILE.jsonl or FILE.csv."),
            click.option(
                "--sidecar", metavar=".txt", help="Write each caption beside its image, with this suffix."
            ),
            click.option("--recursive", is_flag=True, help="Search subfolders too."),
            click.option("--prefix", default="", metavar="TEXT", help="Text to put before every caption."),
            click.option("--suffix", default="", metavar="TEXT", help="Text to put after every caption."),
            click.option("--overwrite", is_flag=True, help="Replace captions that exist."),
            click.option(
                "--limit", metavar="N", type=click.IntRange(min=1), help="Caption only the first N images."
            ),
            click.option(
                "--encode-ahead/--no-encode-ahead",
                default=None,
                help="Encode the next images while a caption is written.  [default: if a CPU is free]",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def run_batch(
    sources: Sequence[str],
    settings: BatchSettings,
    options: CaptionOptions,
    as_json: bool,
    choice: ModelChoice,
    inputs: Sequence[str] = (),
) -> int:
    """Caption what the sources name. inputs: files that the options name. Returns the exit code."""
    from ..batch.failures import NAMES, error_log
    from ..batch.run import caption_pictures
    from ..batch.sources import home_of, list_pictures, lists_among
    from ..errors import RequestError

    home = Path(settings.out).parent if settings.out is not None else Path(home_of(sources[0]))
    logs = [home / name for name in NAMES]
    if settings.out is not None and any(
        os.path.realpath(settings.out) == os.path.realpath(path) for path in logs
    ):
        raise RequestError(f"{settings.out}: failures are noted in a file of this name; give another --out")
    errors = error_log(home)
    pictures = list_pictures(
        sources,
        recursive=settings.recursive,
        sidecar=settings.sidecar,
        exclude=[*map(str, logs), *([settings.out] if settings.out else [])],
        stdin=sys.stdin.buffer.read() if "-" in sources else b"",
    )[: settings.limit]
    named = [name for name in (choice.name, choice.mmproj) if name]
    read: list[AnyPath] = [*inputs, *named, *logs, *lists_among(sources, settings.sidecar)]
    output = _open_output(settings, options, pictures, home, choice, read)
    try:
        with ExitStack() as stack, _reporter(as_json) as report:

            def opened() -> Mllama:
                stack.close()  # a model that lost its device
                return stack.enter_context(open_chosen(choice, bar=False))

            summary = caption_pictures(
                pictures,
                output,
                opened,
                options,
                errors=errors,
                report=report,
                encode_ahead=settings.encode_ahead,
            )
    finally:
        output.close()
    if not as_json:
        echo(_in_words(summary, errors.path), err=True)
    if summary.interrupted:
        return 130
    return 3 if summary.failed or summary.stopped else 0


def _open_output(
    settings: BatchSettings,
    options: CaptionOptions,
    pictures: Sequence[str],
    home: Path,
    choice: ModelChoice,
    inputs: Sequence[AnyPath],
) -> Output:
    """Where the captions go.

    --overwrite collects them in a hidden file until all are there, which a killed run finds again. The
    file's name has a digest of what shapes the captions, so that it never mixes two kinds.
    """
    from ..batch.outputs import RecordFile, Sidecars
    from ..temporary import remove_leftovers

    folder = Path(os.path.realpath(settings.out)).parent if settings.out is not None else home
    remove_leftovers(folder)
    partial = None
    if settings.overwrite:
        model = [choice.name, choice.mmproj, choice.settings.get("n_ctx", DEFAULTS["n_ctx"])]
        words = json.dumps([settings.out, settings.sidecar, repr(options), model])
        partial = _partial(folder, settings.out, words)
    if settings.out is not None:
        return RecordFile(settings.out, inputs=inputs, partial=partial)
    assert settings.sidecar is not None
    return Sidecars(settings.sidecar, pictures, partial, inputs=inputs)


def _partial(folder: Path, out: str | None, words: str) -> Path:
    """The hidden file of an output and of the words that say how it is made; others of the output go, unless
    a run writes them now."""

    from ..temporary import remove_unlocked

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]

    suffix = ".jsonl" if out is None else os.path.splitext(out)[1]
    beginning = f".mllama-{digest(os.path.basename(out or ''))}-"
    partial = folder / f"{beginning}{digest(words)}.partial{suffix}"
    pattern = re.compile(re.escape(beginning) + "[0-9a-f]{12}" + re.escape(f".partial{suffix}"))
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.name != partial.name:
                with suppress(OSError):
                    remove_unlocked(Path(entry.path))
    return partial


# ---- what is shown -----------------------------------------------------------------------------------------


@contextmanager
def _reporter(as_json: bool) -> Iterator[Report]:
    """What takes the events: JSON lines on stderr, a bar if that is a terminal, or failures alone."""
    if as_json:
        yield lambda event: echo_json(event, err=True)
    elif is_live(sys.stderr):
        with BatchBar() as bar:

            def report(event: dict[str, Any]) -> None:
                if event["event"] == "start":
                    bar.begin(event["pictures"], event["done_before"])
                elif event["event"] in ("caption", "error"):
                    bar.advance(failed=event["event"] == "error")
                _show_failure(event, bar.print)

            yield report
    else:
        yield lambda event: _show_failure(event, lambda line: echo(line, err=True))


def _show_failure(event: dict[str, Any], show: Callable[[str], None]) -> None:
    if event["event"] == "error":
        name = "" if event["image"] in event["message"] else f"{event['image']}: "
        show(f"Error: {name}{event['message']}")
        if "unrecorded" in event:
            show(f"Error: not even that could be written: {event['unrecorded']}")


def _in_words(summary: Summary, errors: Path) -> str:
    s, seconds = summary, summary.seconds
    parts = [f"{s.captioned} captioned"]
    for count, words in ((s.duplicates, "duplicates"), (s.done_before, "done before")):
        parts += [f"{count} {words}"] if count else []
    parts += [f"{s.failed} failed, see {os.fspath(errors)}"] if s.failed else []
    left = s.pictures - s.captioned - s.duplicates - s.done_before - s.failed
    parts += [f"{left} left"] if left else []
    lines = [f"{s.pictures} pictures: {', '.join(parts)}"]
    if s.captioned:
        phases = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("encode", "prompt", "decode", "wait"))
        lines.append(
            f"{s.tokens} tokens, {s.cached_tokens} of {s.prompt_tokens} prompt tokens from the cache; "
            f"{seconds['total']:.1f} s: {phases}; "
            f"{(s.captioned + s.duplicates) / seconds['total'] * 60:.0f} pictures a minute, "
            f"the model busy {s.utilisation:.1%}"
        )
    if s.stopped:
        lines.append(f"Error: stopped: {s.stopped}; the same command goes on")
    if s.interrupted:
        lines.append("Interrupted; the same command goes on")
    return "\n".join(lines)
