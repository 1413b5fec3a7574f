"""Captions for thousands of pictures: pictures are decoded, and perhaps encoded, ahead (see prefetch.py),
captioned one after the other, and kept.

What is done is what the output holds, so that the same call goes on wherever the last one ended. What fails
for one picture is noted and the run goes on; it is tried again next time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from ..errors import Aborted, BackendError, MllamaError, ModelError, RequestError
from ..model import Mllama
from ..reading import open_regular
from ..vision.encoder import ImageEncoder
from ..vision.loading import load_image
from ..words import one_line
from .ahead import EncodeAhead, Prepared, pictures_ahead
from .captions import Caption, CaptionOptions, caption_picture
from .failures import ErrorLog
from .outputs import Output
from .records import Record

Report: TypeAlias = Callable[[dict[str, Any]], None]

Redo = Literal["length", "empty", "failed"]
REDO: tuple[Redo, ...] = get_args(Redo)
# How much the clocks of this machine and of a file server may differ.
CLOCK_SECONDS = 2.0
# A device that fails this often without a caption between is not opened once more.
MAX_LOSSES = 3
# Errors of writing that the next picture would meet as well.
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE))


@dataclass
class Summary:
    """What a run did.

    pictures:  all that the run was about: done before it, captioned, duplicates (of a picture's content; they
               got its caption), failed, and those it did not come to
    again:     how many had a caption that was to be made once more
    tokens:    of the new captions
    prompt_tokens, cached_tokens: of the prompts, and how many of them were not computed again
    seconds:   encode, prompt, decode: what the model computed, at once perhaps; busy: in which any of it was
               computed; wait: for a picture, while nothing was; total: from the first picture to the end
    stopped:   why the run ended early, or ""
    """

    pictures: int = 0
    done_before: int = 0
    captioned: int = 0
    duplicates: int = 0
    failed: int = 0
    again: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("encode", "prompt", "decode", "busy", "wait", "total"), 0.0)
    )
    stopped: str = ""
    interrupted: bool = False

    @property
    def utilisation(self) -> float:
        """Share of the time in which the model computed, 0 to 1."""
        return self.seconds["busy"] / self.seconds["total"] if self.seconds["total"] else 0.0


def caption_pictures(
    pictures: Sequence[str],
    output: Output,
    open_model: Callable[[], Mllama],
    options: CaptionOptions,
    *,
    errors: ErrorLog,
    report: Report = lambda event: None,
    encode_ahead: bool | None = None,
    redo: Collection[Redo] = (),
    unchanged_since: float | None = None,
) -> Summary:
    """Caption pictures that the output does not hold yet, and keep each caption while the next is made.

    pictures:   paths, each once, in the order to go
    open_model: opens the model; called only if there is something to do, and again when a device was lost
    errors:     keeps what failed
    report:     called with what happened, a dict whose "event" is "start", "caption", "error" or "summary"
    encode_ahead: encode the next pictures in another thread while a caption is written; None: if the model
                leaves CPUs free for that (`Mllama.encoder_threads`). The captions are the same.
    redo:       captions that are made once more: "length": those that were cut, "empty"; "failed" ones are
                always tried again
    unchanged_since: pictures that changed later (seconds, as `time.time` counts) are looked at: one with
                another content than when it was captioned is captioned again. None: none is looked at

    Ctrl-C drops the picture at hand; the summary tells. A full disk, or a device that cannot be opened again,
    stops the run; the summary tells why. Raises RequestError for an output that cannot be used, and what
    open_model raises the first time.
    """
    summary = Summary(pictures=len(pictures))
    try:
        known = {record.image: record for record in output.records()}
        again = {
            picture
            for picture in pictures
            if picture in known and _is_stale(known[picture], redo, unchanged_since)
        }
        output.again(again)
        for picture in again:
            del known[picture]
        errors.tidy(known)
    except OSError as e:
        raise RequestError(f"{e.filename}: {e.strerror}; nothing can be kept there") from e
    refused = output.refused
    pending = [picture for picture in pictures if picture not in known and picture not in refused]
    summary.done_before = sum(picture in known for picture in pictures)
    summary.again = len(again)
    counts = {"done_before": summary.done_before, "again": summary.again}
    report({"event": "start", "pictures": len(pictures), **counts})
    run = _Run(known, output, open_model, options, errors, report, summary, encode_ahead)
    try:
        for picture in pictures:
            if picture in refused:
                run.fail(picture, RequestError(refused[picture]))
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


def _is_stale(record: Record, redo: Collection[Redo], unchanged_since: float | None) -> bool:
    """Whether a caption that is there is to be made once more."""
    if "length" in redo and record.finish_reason == "length":
        return True
    if "empty" in redo and not record.caption.strip():
        return True
    if unchanged_since is None or not record.sha256:
        return False
    try:
        info = os.stat(record.image)
        # A file that is renamed to this name keeps the time when it was written.
        if max(info.st_mtime, info.st_ctime) < unchanged_since - CLOCK_SECONDS:
            return False
        return file_sha256(record.image) != record.sha256
    except (OSError, ValueError):
        return False  # it is gone, and its caption stays


class _Stop(Exception):
    """The run cannot go on."""


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
    _encode_ahead: bool | None
    _by_content: dict[str, Record] = field(default_factory=dict)
    _losses: int = 0
    _writing: _Writing | None = None
    _ahead: EncodeAhead | None = None
    _computed: deque[tuple[float, float]] = field(default_factory=deque)  # when the loop computed, lately
    _writer: ThreadPoolExecutor = field(init=False)

    def caption(self, pending: Sequence[str]) -> None:
        """Raises _Stop, KeyboardInterrupt, Aborted."""
        self._model = self._open_model()
        shape = self._model.hparams
        if not shape.has_vision:
            raise RequestError(
                f"{self._model.model_path.name} is a text model without vision encoder; give mmproj_path"
            )
        max_tiles = self._model.max_tiles
        self._by_content = dict(self._known_contents(pending))

        def prepare(path: str) -> Prepared:
            try:
                sha256 = file_sha256(path)
            except OSError:
                load_image(path)  # which has the words for it
                raise
            if sha256 in self._by_content:
                return Prepared(sha256, None)
            tiles = self._options.prepare(path, shape, max_tiles)
            _ = tiles.sha256  # needed later; remembered
            return Prepared(sha256, tiles)

        encoder = self._open_encoder()
        if encoder is not None:
            self._ahead = EncodeAhead(encoder, self._by_content, self._options.time_limit)
        start = time.perf_counter()
        with ThreadPoolExecutor(1, "mllama-write") as self._writer:
            try:
                with closing(pictures_ahead(pending, prepare, self._ahead)) as coming:
                    for path, future in coming:
                        self._caption_one(path, future)
                        self._summary.seconds["total"] = time.perf_counter() - start
                self._finish_writing()
            except BaseException:
                with suppress(_Stop):
                    self._finish_writing()
                raise
            finally:
                if self._ahead is not None:
                    self._ahead.encoder.close()
                self._summary.seconds["total"] = time.perf_counter() - start

    def _open_encoder(self) -> ImageEncoder | None:
        """The encoder for another thread, if one is wanted. One that nobody asked for may fail to open."""
        if self._encode_ahead is not None:
            return self._model.image_encoder() if self._encode_ahead else None
        try:
            return self._model.image_encoder() if self._model.encoder_threads else None
        except (BackendError, ModelError, OSError):
            return None

    def _caption_one(self, path: str, future: Future[Prepared]) -> None:
        try:
            record, caption = self._make_record(path, future)
        except Aborted:
            raise
        except BackendError as e:
            self.fail(path, e)
            self._open_again(e)
            return
        except (MllamaError, MemoryError, OSError) as e:
            self.fail(path, e)
            return
        self._finish_writing()
        self._by_content[record.sha256] = record
        self._writing = _Writing(record, caption, self._writer.submit(self._write, record, caption is None))

    def _write(self, record: Record, duplicate: bool) -> None:
        """In the writer's thread, which Ctrl-C does not interrupt: what is written is counted."""
        self._output.write(record)
        self._known[record.image] = record
        if duplicate:
            self._summary.duplicates += 1
        else:
            self._summary.captioned += 1

    def _finish_writing(self) -> None:
        """Wait until the record on its way is on the disk. Raises _Stop."""
        if self._writing is None:
            return
        record, caption = self._writing.record, self._writing.caption
        try:
            self._writing.done.result()
        except OSError as e:
            self._writing = None
            words = f"{e.filename or 'the output'}: cannot be written: {e.strerror}"
            self.fail(record.image, OSError(e.errno, words))
            if e.errno in FULL:
                raise _Stop(words) from e
            return
        self._writing = None
        event: dict[str, Any] = {"event": "caption", "image": record.image, "caption": record.caption}
        event["tokens"] = record.tokens
        if caption is None:
            self._report({**event, "duplicate_of": record.duplicate_of})
        else:
            self._report({**event, "seconds": dict(caption.seconds)})

    def _wait_for(self, future: Future[Prepared]) -> Prepared:
        """The picture, once it is there."""
        seconds, start = self._summary.seconds, time.perf_counter()
        begun = done = 0.0
        try:
            prepared = future.result()
            begun, done = prepared.encoded or (0.0, 0.0)
        finally:
            waited = (start, time.perf_counter())
            seconds["encode"] += done - begun
            seconds["busy"] += done - begun - sum(_overlap((begun, done), ours) for ours in self._computed)
            seconds["wait"] += waited[1] - waited[0] - _overlap((begun, done), waited)
            while self._computed and self._computed[0][1] <= done:  # the next encoding begins after this one
                self._computed.popleft()
        return prepared

    def _make_record(self, path: str, future: Future[Prepared]) -> tuple[Record, Caption | None]:
        summary = self._summary
        prepared = self._wait_for(future)
        if self._writing is not None and self._writing.record.sha256 == prepared.sha256:
            self._finish_writing()
        twin = self._by_content.get(prepared.sha256)
        if twin is not None:
            original = twin.duplicate_of or twin.image
            return replace(twin, image=path, sha256=prepared.sha256, duplicate_of=original), None
        assert prepared.image is not None
        begun, done = prepared.encoded or (0.0, 0.0)
        caption = caption_picture(self._model, prepared.image, self._options, spent=done - begun)
        end, busy = time.perf_counter(), sum(caption.seconds.values())
        if self._ahead is not None:
            self._computed.append((end - busy, end))  # what comes before it is making ready
        self._losses = 0
        summary.tokens += caption.tokens
        summary.prompt_tokens += caption.prompt_tokens
        summary.cached_tokens += caption.cached_tokens
        for phase, seconds in caption.seconds.items():
            summary.seconds[phase] += seconds
        summary.seconds["busy"] += busy
        if prepared.encoded is not None:
            encode = caption.seconds["encode"] + done - begun
            caption = replace(caption, seconds={**caption.seconds, "encode": encode})
        return Record(path, caption.text, caption.finish_reason, caption.tokens, prepared.sha256), caption

    def fail(self, path: str, error: Exception) -> None:
        """Note that a picture has no caption."""
        self._summary.failed += 1
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        entry = {"image": path, "error": type(error).__name__, "message": one_line(message, 2000)}
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
            if self._ahead is not None:
                self._ahead.encoder.close()
            self._model = self._open_model()
            if self._ahead is not None:
                # A closed one leaves the encoding to us.
                self._ahead.encoder = self._open_encoder() or self._ahead.encoder
        except MllamaError as e:
            raise _Stop(f"the model cannot be opened again: {e}") from e

    def _known_contents(self, pending: Sequence[str]) -> Iterator[tuple[str, Record]]:
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
    """Hex digest of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """How much two spans of time have in common."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None
