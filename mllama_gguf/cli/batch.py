"""`mllama caption --out FILE` and `--sidecar .txt`: thousands of images, by the package `batch`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..words import os_reason
from .batch_options import BatchSettings
from .first_use import tell_of_real_models
from .opening import find_files, open_chosen
from .options import ModelChoice
from .progress import BatchBar
from .terminal import echo, echo_json, is_live, name_on

if TYPE_CHECKING:
    from ..batch.captions import CaptionOptions
    from ..batch.failures import ErrorLog
    from ..batch.outputs import Output
    from ..batch.records import Record
    from ..batch.run import Report
    from ..batch.settings import SettingsFile
    from ..batch.summary import Summary
    from ..files import AnyPath
    from ..model import Mllama


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
    from ..batch.outputs import suffix_of
    from ..batch.records import read_records
    from ..batch.settings import SettingsFile, now, run_settings
    from ..batch.sidecars import Sidecars, check_suffix
    from ..batch.sources import home_of, lists_among
    from ..errors import RequestError

    started = now()
    if settings.out is not None:
        suffix_of(settings.out)
    if settings.sidecar is not None:
        check_suffix(settings.sidecar)
    home = Path(settings.out).parent if settings.out is not None else Path(home_of(sources[0]))
    logs = [home / name for name in NAMES]
    if settings.out is not None and any(
        os.path.realpath(settings.out) == os.path.realpath(path) for path in logs
    ):
        raise RequestError(f"{settings.out}: failures are noted in a file of this name; give another --out")
    errors = error_log(home, _output_name(settings, home))
    images = _list_images(sources, settings, logs)
    named = [name for name in (choice.name, choice.mmproj) if name]
    lists = lists_among(sources, settings.sidecar, settings.sidecar_full_name)
    read: list[AnyPath] = [*inputs, *named, *logs, *lists]
    files = find_files(replace(choice, verify=False))
    mine = run_settings(options, files, choice.settings)
    beside = SettingsFile.beside(*_place(settings, home))
    output = _open_output(settings, options, images, home, mine, read)
    if not as_json:
        tell_of_real_models(choice)  # before thousands of captions
    failed = True
    try:
        skips = settings.how == "skip"
        done = list(output.records()) if skips else []
        since = _since(settings, beside, mine, done, started)
        with _reporter(as_json) as report:
            # A journal does not say when its images were looked at.
            looked = since if skips else 0.0
            summary = _caption(images, output, settings, options, choice, errors, report, looked)
        failed = bool(summary.stopped)
        whole = not (summary.failed or summary.stopped or summary.interrupted)
        # Later runs look at what changed since: only if all that is there was looked at, and done.
        if not skips and settings.out is not None and whole:
            done = list(read_records(settings.out).values())
        everything = whole and {record.image for record in done} <= set(images)
        if isinstance(output, Sidecars):  # whose records are those of this run's images alone
            everything &= not output.has_others()
        if skips or _changed(summary):
            _keep(beside, mine, started if everything else since)
    finally:
        output.close(failed=failed)
    if not as_json:
        echo(_in_words(summary, errors.path), err=True)
    if summary.interrupted:
        return 130
    return 3 if summary.failed or summary.stopped else 0


def _list_images(sources: Sequence[str], settings: BatchSettings, logs: Sequence[Path]) -> list[str]:
    """The images of the sources. logs: files for failures, which a pattern may name too"""
    from ..batch.sources import list_images

    return list_images(
        sources,
        recursive=settings.recursive,
        sidecar=settings.sidecar,
        full_name=settings.sidecar_full_name,
        exclude=[*map(str, logs), *([settings.out] if settings.out else [])],
        stdin=sys.stdin.buffer.read() if "-" in sources else b"",
    )[: settings.limit]


def _caption(
    images: Sequence[str],
    output: Output,
    settings: BatchSettings,
    options: CaptionOptions,
    choice: ModelChoice,
    errors: ErrorLog,
    report: Report,
    since: float,
) -> Summary:
    """Caption the images with the chosen model. since: see `_since`"""
    from ..batch.run import caption_images

    with ExitStack() as stack:

        def opened() -> Mllama:
            stack.close()  # a model that lost its device
            return stack.enter_context(open_chosen(choice, bar=False))

        return caption_images(
            images,
            output,
            opened,
            options,
            errors=errors,
            report=report,
            encode_ahead=settings.encode_ahead,
            parallel=settings.parallel or 1,
            redo=settings.redo,
            unchanged_since=since,
        )


def _place(settings: BatchSettings, home: Path) -> tuple[Path, str]:
    """The folder of an output, links followed, and the name under which its settings are kept."""
    if settings.out is None:
        full = "full-name" if settings.sidecar_full_name else ""
        return home, f"mllama-sidecar{full}{settings.sidecar}"
    path = Path(os.path.realpath(settings.out))
    return path.parent, path.name


def _output_name(settings: BatchSettings, home: Path) -> str:
    """What the lines of errors.jsonl in a folder call an output, links followed."""
    from ..batch.failures import output_name

    if settings.out is None:
        return f"--sidecar {settings.sidecar}"
    return output_name(settings.out, home)


def _since(
    settings: BatchSettings,
    beside: SettingsFile,
    mine: Mapping[str, Any],
    done: Sequence[Record],
    started: float,
) -> float:
    """When the images of the existing captions were last looked at. Keeps the settings of a run that skips
    captions, because one that continues after a kill is compared with them. Raises RequestError if the
    existing captions were made with others, MllamaError for a full disk."""
    from ..batch.settings import check_same
    from ..files import cannot_write, is_full

    kept = beside.read()
    if settings.how != "skip":
        return kept.looked if kept is not None else 0.0
    if not done:
        since = started
    elif kept is None:  # of an earlier version, or moved without its settings
        since = started
        if settings.out is not None:
            since = os.stat(settings.out).st_mtime
            words = "the settings of the captions there are not known"
            echo(f"Note: {name_on(sys.stderr, settings.out)}: {words}", err=True)
    else:
        since = kept.looked
        if not settings.any_settings:
            where = settings.out or f"--sidecar {settings.sidecar}"
            if others := check_same(where, kept, mine):
                words = f"Note: {where}: captions there were made with other {', '.join(others)}"
                echo(words, err=True)
    try:
        beside.write(mine, since)
    except OSError as e:  # `_keep` says so at the end
        if is_full(e):
            raise cannot_write(beside.path, e) from e
    return since


def _changed(summary: Summary) -> bool:
    """Whether a run that does not skip captions has put new ones in their place."""
    made = summary.captioned or summary.duplicates or summary.done_before
    return bool(made) and not summary.stopped and not summary.interrupted


def _keep(beside: SettingsFile, settings: Mapping[str, Any], looked: float) -> None:
    try:
        beside.write(settings, looked)
    except OSError as e:
        echo(f"Warning: {beside.path}: the settings of this run cannot be kept: {os_reason(e)}", err=True)


def _open_output(
    settings: BatchSettings,
    options: CaptionOptions,
    images: Sequence[str],
    home: Path,
    mine: Mapping[str, Any],
    inputs: Sequence[AnyPath],
) -> Output:
    """Where the captions go.

    What overwrites or adds to captions collects new ones in a hidden file until all are there, which a killed
    run finds again. The file's name has a digest of what shapes the captions, so that it never mixes two
    kinds.
    """
    import json

    from ..batch.outputs import CombinedFile, RecordFile
    from ..batch.sidecars import Sidecars
    from ..errors import RequestError
    from ..files import why_protected
    from ..temporary import remove_leftovers

    how, is_added = settings.how, settings.how in ("append", "prepend")
    is_xmp = settings.sidecar is not None and settings.sidecar.lower().endswith(".xmp")
    if is_added and not is_xmp and "json" in str((options.response_format or {}).get("type", "")):
        raise RequestError(f"--existing {how}: text before or after JSON would make it invalid")
    folder, name = _place(settings, home)
    remove_leftovers(folder)
    partial = None
    if how != "skip":
        if words := why_protected(folder / "new"):
            raise RequestError(
                f"cannot write to {os.fspath(folder)}: {words}; make it writable, or use --out"
            )
        partial = _partial(folder, name, json.dumps([how, settings.separator, mine]))
    if settings.out is not None and partial is not None:
        return CombinedFile(settings.out, partial, how, settings.separator, inputs)
    if settings.out is not None:
        return RecordFile(settings.out, inputs=inputs)
    assert settings.sidecar is not None
    return Sidecars(
        settings.sidecar,
        images,
        partial,
        how=how,
        separator=settings.separator,
        full_name=settings.sidecar_full_name,
        log=folder / f".{name}.mllama.jsonl",
        inputs=inputs,
    )


def _partial(folder: Path, name: str, words: str) -> Path:
    """The hidden file of an output of that name (see `_place`), and of the words that say how it is made;
    others of the output go, unless a run writes them now."""
    import hashlib

    from ..temporary import remove_unlocked

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]

    beginning = f".mllama-{digest(name)}-"
    partial = folder / f"{beginning}{digest(words)}.partial.jsonl"
    pattern = re.compile(re.escape(beginning) + r"[0-9a-f]{12}\.partial\.[a-zA-Z]+")
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.name != partial.name:
                with suppress(OSError):
                    remove_unlocked(Path(entry.path))
    return partial


# ---- messages ----------------------------------------------------------------------------------------------


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
        shown = name_on(sys.stderr, event["image"])
        name = "" if event["image"] in event["message"] or shown in event["message"] else f"{shown}: "
        show(f"Error: {name}{event['message']}")
        if "unrecorded" in event:
            show(f"Error: not even that could be written: {event['unrecorded']}")


def _in_words(summary: Summary, errors: Path) -> str:
    s, seconds = summary, summary.seconds
    parts = [f"{s.captioned} captioned"]
    for count, words in ((s.duplicates, "duplicates"), (s.done_before, "done before")):
        parts += [f"{count} {words}"] if count else []
    parts += [f"{s.again} of them again"] if s.again else []
    parts += [f"{s.failed} failed, see {os.fspath(errors)}"] if s.failed else []
    left = s.images - s.captioned - s.duplicates - s.done_before - s.failed
    parts += [f"{left} left"] if left else []
    lines = [f"{s.images} image{'' if s.images == 1 else 's'}: {', '.join(parts)}"]
    if s.captioned:
        phases = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("encode", "prompt", "decode", "wait"))
        lines.append(
            f"{s.tokens} tokens, {s.cached_tokens} of {s.prompt_tokens} prompt tokens from the cache; "
            f"{seconds['total']:.1f} s: {phases}; "
            f"{(s.captioned + s.duplicates) / seconds['total'] * 60:.0f} images a minute, "
            f"the model busy {s.utilisation:.1%}"
        )
    if s.stopped:
        lines.append(f"Error: stopped: {s.stopped}; run the same command again to continue")
    if s.interrupted:
        lines.append("Interrupted; run the same command again to continue")
    return "\n".join(lines)
