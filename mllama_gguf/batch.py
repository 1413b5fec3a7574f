"""Captions for thousands of pictures: pictures are decoded ahead, captioned one after the other, and kept.

What is done is what the output holds, so that the same call goes on wherever the last one ended. What fails
for one picture is noted and the run goes on; it is tried again next time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

from .captions import Caption, CaptionOptions, caption_picture
from .errors import Aborted, BackendError, ImageError, MllamaError, RequestError
from .model import Mllama, usable_cpus
from .preprocess import TiledImage, load_image, preprocess_image
from .records import ErrorLog, Output, Record

T = TypeVar("T")
R = TypeVar("R")
Report: TypeAlias = Callable[[dict[str, Any]], None]

THREADS = min(4, usable_cpus())
NICE = 10
# Pictures that wait decoded: enough that one large picture among small ones is not waited for. One takes up
# to 15 MB.
AHEAD = 8
# A device that fails this often without a caption between is not opened once more.
MAX_LOSSES = 3
# Errors of writing that the next picture would meet as well.
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO))


@dataclass
class Summary:
    """What a run did.

    pictures:  all that the run was about: done before it, captioned, duplicates (of a picture's content; they
               got its caption), failed, and those it did not come to
    tokens:    of the new captions
    prompt_tokens, cached_tokens: of the prompts, and how many of them were not computed again
    seconds:   encode, prompt, decode: what the model computed; wait: for a picture to be decoded; total: from
               the first picture to the end
    stopped:   why the run ended early, or ""
    """

    pictures: int = 0
    done_before: int = 0
    captioned: int = 0
    duplicates: int = 0
    failed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("encode", "prompt", "decode", "wait", "total"), 0.0)
    )
    stopped: str = ""
    interrupted: bool = False

    @property
    def utilisation(self) -> float:
        """Share of the time in which the model computed, 0 to 1."""
        busy = sum(self.seconds[name] for name in ("encode", "prompt", "decode"))
        return busy / self.seconds["total"] if self.seconds["total"] else 0.0


def caption_pictures(
    pictures: Sequence[str],
    output: Output,
    open_model: Callable[[], Mllama],
    options: CaptionOptions,
    *,
    errors: ErrorLog,
    report: Report = lambda event: None,
) -> Summary:
    """Caption pictures that the output does not hold yet, and keep each caption while the next is made.

    pictures:   paths, each once, in the order to go
    open_model: opens the model; called only if there is something to do, and again when a device was lost
    errors:     keeps what failed
    report:     called with what happened, a dict whose "event" is "start", "caption", "error" or "summary"

    Ctrl-C drops the picture at hand; the summary tells. A full disk, or a device that cannot be opened again,
    stops the run; the summary tells why. Raises RequestError for an output that cannot be used, and what
    open_model raises the first time.
    """
    summary = Summary(pictures=len(pictures))
    try:
        known = {record.image: record for record in output.records()}
        errors.tidy(known)
    except OSError as e:
        raise RequestError(f"{e.filename}: {e.strerror}; nothing can be kept there") from e
    pending = [picture for picture in pictures if picture not in known]
    summary.done_before = len(pictures) - len(pending)
    report({"event": "start", "pictures": len(pictures), "done_before": summary.done_before})
    run = _Run(known, output, open_model, options, errors, report, summary)
    try:
        if pending:
            run.caption(pending)
    except (KeyboardInterrupt, Aborted):
        summary.interrupted = True
    except _Stop as e:
        summary.stopped = str(e)
    with suppress(OSError):
        errors.tidy(known)
    if not summary.interrupted and not summary.stopped:
        try:
            output.finish()
        except OSError as e:
            summary.stopped = f"{e.filename}: {e.strerror}"
    report({"event": "summary", **vars(summary), "utilisation": summary.utilisation})
    return summary


class _Stop(Exception):
    """The run cannot go on."""


@dataclass(frozen=True)
class _Prepared:
    """tiles: None for a picture whose content has a caption already."""

    sha256: str
    tiles: TiledImage | None


@dataclass(frozen=True)
class _Writing:
    """A record on its way to the disk. caption: None for a duplicate."""

    record: Record
    caption: Caption | None
    done: Future[None]


@dataclass
class _Run:
    """The loop over the pictures."""

    _known: dict[str, Record]
    _output: Output
    _open_model: Callable[[], Mllama]
    _options: CaptionOptions
    _errors: ErrorLog
    _report: Report
    _summary: Summary
    _by_content: dict[str, Record] = field(default_factory=dict)
    _losses: int = 0
    _writing: _Writing | None = None
    _writer: ThreadPoolExecutor = field(init=False)

    def caption(self, pending: Sequence[str]) -> None:
        """Raises _Stop, KeyboardInterrupt, Aborted."""
        self._model = self._open_model()
        shape = self._model.hparams
        if not shape.has_vision:
            raise RequestError(
                f"{self._model.model_path.name} is a text model without vision encoder; give mmproj_path"
            )
        self._by_content = dict(self._contents(pending))

        def prepare(path: str) -> _Prepared:
            try:
                sha256 = file_sha256(path)
            except OSError:
                load_image(path)  # which has the words for it
                raise
            if sha256 in self._by_content:
                return _Prepared(sha256, None)
            tiles = preprocess_image(path, tile_size=shape.image_size, max_tiles=shape.max_tiles)
            _ = tiles.sha256  # needed later; remembered
            return _Prepared(sha256, tiles)

        start = time.perf_counter()
        with ThreadPoolExecutor(1, "mllama-write") as self._writer:
            try:
                with closing(prefetch(pending, prepare, threads=THREADS, ahead=AHEAD)) as prepared:
                    for path, future in prepared:
                        self._one(path, future)
                        self._summary.seconds["total"] = time.perf_counter() - start
                self._written()
            except BaseException:
                with suppress(_Stop):
                    self._written()
                raise
            finally:
                self._summary.seconds["total"] = time.perf_counter() - start

    def _one(self, path: str, future: Future[_Prepared]) -> None:
        try:
            record, caption = self._record(path, future)
        except Aborted:
            raise
        except BackendError as e:
            self._fail(path, e)
            self._open_again(e)
            return
        except (MllamaError, MemoryError, OSError) as e:
            self._fail(path, e)
            return
        self._written()
        self._by_content[record.sha256] = record
        self._writing = _Writing(record, caption, self._writer.submit(self._output.write, record))

    def _written(self) -> None:
        """Wait until the record on its way is on the disk. Raises _Stop."""
        if self._writing is None:
            return
        record, caption = self._writing.record, self._writing.caption
        try:
            self._writing.done.result()
        except OSError as e:
            self._writing = None
            words = f"{e.filename or 'the output'}: cannot be written: {e.strerror}"
            self._fail(record.image, OSError(e.errno, words))
            if e.errno in FULL:
                raise _Stop(words) from e
            return
        self._writing = None
        self._known[record.image] = record
        event: dict[str, Any] = {"event": "caption", "image": record.image, "caption": record.caption}
        event["tokens"] = record.tokens
        if caption is None:
            self._summary.duplicates += 1
            self._report({**event, "duplicate_of": record.duplicate_of})
        else:
            self._summary.captioned += 1
            self._report({**event, "seconds": dict(caption.seconds)})

    def _record(self, path: str, future: Future[_Prepared]) -> tuple[Record, Caption | None]:
        summary = self._summary
        start = time.perf_counter()
        try:
            prepared = future.result()
        finally:
            summary.seconds["wait"] += time.perf_counter() - start
        if self._writing is not None and self._writing.record.sha256 == prepared.sha256:
            self._written()
        twin = self._by_content.get(prepared.sha256)
        if twin is not None:
            original = twin.duplicate_of or twin.image
            return replace(twin, image=path, sha256=prepared.sha256, duplicate_of=original), None
        assert prepared.tiles is not None
        caption = caption_picture(self._model, prepared.tiles, self._options)
        self._losses = 0
        summary.tokens += caption.tokens
        summary.prompt_tokens += caption.prompt_tokens
        summary.cached_tokens += caption.cached_tokens
        for phase, seconds in caption.seconds.items():
            summary.seconds[phase] += seconds
        return Record(path, caption.text, caption.finish_reason, caption.tokens, prepared.sha256), caption

    def _fail(self, path: str, error: Exception) -> None:
        self._summary.failed += 1
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        entry = {"image": path, "error": type(error).__name__, "message": " ".join(message.split())}
        try:
            self._errors.add(entry)
        except OSError as e:
            entry["unrecorded"] = f"{self._errors.path}: {e.strerror}"
        self._report({"event": "error", **entry})

    def _open_again(self, error: BackendError) -> None:
        self._losses += 1
        if self._losses >= MAX_LOSSES:
            raise _Stop(f"the device failed {self._losses} times in a row: {error}") from error
        try:
            self._model = self._open_model()
        except MllamaError as e:
            raise _Stop(f"the model cannot be opened again: {e}") from e

    def _contents(self, pending: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """What is captioned already, by content. Caption files beside their pictures do not tell the content;
        only a picture as large as one to come is worth reading for it."""
        sizes: set[int | None] = set()
        if any(not record.sha256 for record in self._known.values()):
            sizes = {_size(path) for path in pending} - {None}
        for record in self._known.values():
            if record.sha256:
                yield record.sha256, record
            elif _size(record.image) in sizes:
                with suppress(OSError, ValueError):
                    yield file_sha256(record.image), record


def file_sha256(path: str) -> str:
    """Hex digest of a file. Raises OSError, and ImageError for what is no plain file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
        raise ImageError(f"{path}: is no plain file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None


class _Job(Generic[T, R]):
    def __init__(self, item: T) -> None:
        self.item = item
        self.future: Future[R] = Future()


def prefetch(
    items: Iterable[T], work: Callable[[T], R], *, threads: int, ahead: int
) -> Generator[tuple[T, Future[R]], None, None]:
    """The items in order, each with the future of its work, which threads do for `ahead` items in advance.

    The threads are daemons: nobody waits for them at exit, however large the picture that they decode.
    """
    jobs: SimpleQueue[_Job[T, R] | None] = SimpleQueue()

    def serve() -> None:
        if sys.platform == "linux":  # where a thread has a priority: the model's threads go first
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (job := jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                result = work(job.item)
            except BaseException as e:
                job.future.set_exception(e)
            else:
                job.future.set_result(result)

    for _ in range(threads):
        threading.Thread(target=serve, name="mllama-decode", daemon=True).start()
    waiting: deque[_Job[T, R]] = deque()
    try:
        for item in items:
            waiting.append(_Job(item))
            jobs.put(waiting[-1])
            if len(waiting) > ahead:
                job = waiting.popleft()
                yield job.item, job.future
        while waiting:
            job = waiting.popleft()
            yield job.item, job.future
    finally:
        for job in waiting:
            job.future.cancel()
        for _ in range(threads):
            jobs.put(None)
