"""Captions for thousands of images: images are decoded, and perhaps encoded, ahead (see ahead.py),
captioned one after the other, and kept.

The output says what is done, so the same call continues where the last one ended. An image that fails is
noted, and the run continues; the next run tries it again.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..errors import Aborted, BackendError, MllamaError, ModelError, RequestError
from ..files import cannot_write, is_full
from ..model import Mllama
from ..vision.encoder import ImageEncoder
from ..vision.loading import load_image
from ..words import one_line, os_reason
from .ahead import EncodeAhead, Prepared, images_ahead
from .captions import Caption, CaptionOptions
from .choices import Redo
from .contents import file_sha256, is_stale, known_contents
from .failures import ErrorLog
from .outputs import Output
from .records import Record
from .summary import Busy, Summary
from .together import Made, Together, make

Report: TypeAlias = Callable[[dict[str, Any]], None]

# A device that fails this often without a caption between is not opened once more.
MAX_LOSSES = 3
# Errors of writing that the next image would meet as well.
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE))


def caption_images(
    images: Sequence[str],
    output: Output,
    open_model: Callable[[], Mllama],
    options: CaptionOptions,
    *,
    errors: ErrorLog,
    report: Report = lambda event: None,
    encode_ahead: bool | None = None,
    parallel: int = 1,
    redo: Collection[Redo] = (),
    unchanged_since: float | None = None,
) -> Summary:
    """Caption images that the output does not hold yet, and keep each caption while the next is made.

    images:     paths, each once, in the order to go
    open_model: opens the model; called only if there is something to do, and again when a device was lost
    errors:     keeps what failed
    report:     called with what happened, a dict whose "event" is "start", "caption", "error" or "summary"
    encode_ahead: encode the next images in another thread while a caption is written; None: if the model
                leaves CPUs free for that (`Mllama.encoder_threads`). The captions are the same.
    parallel:   how many images are captioned together. The captions come in the order of the images. They are
                the same unless two tokens are equally likely but for rounding.
    redo:       captions that are made once more: "length": those that were cut, "empty"; "failed" ones are
                always tried again
    unchanged_since: images that changed later (seconds, as `time.time` counts) are looked at: one with
                another content than when it was captioned is captioned again. None: none is looked at

    Ctrl-C drops the image at hand; the summary tells. A full disk, or a device that cannot be opened again,
    stops the run; the summary tells why. Raises RequestError for an output that cannot be used, MllamaError
    for a disk that is full, and what open_model raises the first time.
    """
    summary = Summary(images=len(images))
    try:
        known = {record.image: record for record in output.records()}
        folders: dict[str, float] = {}
        again = {
            image
            for image in images
            if image in known and is_stale(known[image], redo, unchanged_since, folders)
        }
        output.again(again)
        for image in again:
            del known[image]
        errors.tidy(known)
    except OSError as e:
        if is_full(e):
            raise cannot_write(e.filename or "the output", e) from e
        raise RequestError(f"{e.filename}: {os_reason(e)}; nothing can be kept there") from e
    refused = output.refused
    pending = [image for image in images if image not in known and image not in refused]
    unwritable = output.unwritable(pending)
    if pending and len(unwritable) == len(pending):
        raise RequestError(next(iter(unwritable.values())))
    pending = [image for image in pending if image not in unwritable]
    refused = {**refused, **unwritable}
    summary.done_before = sum(image in known for image in images)
    summary.again = len(again)
    counts = {"done_before": summary.done_before, "again": summary.again}
    report({"event": "start", "pictures": len(images), **counts})
    run = _Run(known, output, open_model, options, errors, report, summary, encode_ahead, parallel)
    try:
        for image in images:
            if image in refused:
                run.fail(image, RequestError(refused[image]))
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
            summary.stopped = str(cannot_write(e.filename or "the output", e))
        except RequestError as e:  # somebody else has written there meanwhile
            summary.stopped = str(e)
    report({"event": "summary", **vars(summary), "utilisation": summary.utilisation})
    return summary


class _Stop(Exception):
    """The run cannot continue."""


@dataclass(frozen=True)
class _Writing:
    """A record on its way to the disk. caption: None for a duplicate."""

    record: Record
    caption: Caption | None
    done: Future[None]


@dataclass
class _Coming:
    """An image whose caption is not kept yet. made: by a thread; None: it is still to be made, or its
    content has a caption."""

    path: str
    prepared: Prepared
    made: Future[Made] | None


@dataclass
class _Run:
    """The loop over the images."""

    _known: dict[str, Record]
    _output: Output
    _open_model: Callable[[], Mllama]
    _options: CaptionOptions
    _errors: ErrorLog
    _report: Report
    _summary: Summary
    _encode_ahead: bool | None
    _parallel: int
    _by_content: dict[str, Record] = field(default_factory=dict)
    _losses: int = 0
    _writing: _Writing | None = None
    _ahead: EncodeAhead | None = None
    _coming: deque[_Coming] = field(default_factory=deque)  # in order
    _together: Together | None = None
    _writer: ThreadPoolExecutor = field(init=False)
    _busy: Busy = field(init=False)

    def caption(self, pending: Sequence[str]) -> None:
        """Raises _Stop, KeyboardInterrupt, Aborted."""
        self._model = self._open_model()
        self._busy = Busy(self._summary.seconds)
        shape = self._model.hparams
        if not shape.has_vision:
            raise RequestError(
                f"{self._model.model_path.name} is a text model without vision encoder; give mmproj_path"
            )
        max_tiles = self._model.max_tiles
        self._by_content = dict(known_contents(self._known.values(), pending))

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
        self._open_together()
        start = time.perf_counter()
        with ThreadPoolExecutor(1, "mllama-write") as self._writer:
            try:
                with closing(images_ahead(pending, prepare, self._ahead)) as coming:
                    for path, future in coming:
                        self._begin(path, future)
                        while len(self._coming) >= self._most_coming:
                            self._end_first()
                        self._summary.seconds["total"] = time.perf_counter() - start
                while self._coming:
                    self._end_first()
                self._finish_writing()
            except BaseException:
                with suppress(_Stop):
                    self._finish_writing()
                raise
            finally:
                if self._together is not None:
                    self._together.close()
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

    def _open_together(self) -> None:
        if self._parallel > 1:
            self._together = Together(self._model, self._options, self._parallel)

    @property
    def _most_coming(self) -> int:
        """Some more than are captioned at the same time: a thread need not wait for the first of all."""
        return 1 if self._together is None else self._parallel + min(self._parallel, 4)

    def _begin(self, path: str, future: Future[Prepared]) -> None:
        """Let an image be captioned, if threads do that."""
        try:
            prepared = self._wait_for(future)
        except Aborted:
            raise
        except BackendError as e:
            while self._coming:
                self._end_first()
            self.fail(path, e)
            self._open_again(e)
            return
        except (MllamaError, MemoryError, OSError) as e:
            self.fail(path, e)
            return
        made = None
        is_known = prepared.sha256 in self._by_content
        is_coming = any(one.prepared.sha256 == prepared.sha256 for one in self._coming)
        if self._together is not None and prepared.image is not None and not is_known and not is_coming:
            made = self._together.begin(prepared.image, prepared.seconds)
        self._coming.append(_Coming(path, prepared, made))

    def _end_first(self) -> None:
        """Keep the caption of the first image of all that are coming."""
        first = self._coming.popleft()
        try:
            record, caption = self._make_record(first)
        except Aborted:
            raise
        except BackendError as e:
            self._lose(first, e)
            return
        except (MllamaError, MemoryError, OSError) as e:
            self.fail(first.path, e)
            return
        self._finish_writing()
        self._by_content[record.sha256] = record
        self._writing = _Writing(record, caption, self._writer.submit(self._write, record, caption is None))

    def _lose(self, first: _Coming, error: BackendError) -> None:
        """The device failed while it captioned an image, and perhaps others: which of them is at fault is
        seen when each is captioned alone."""
        others = [one for one in self._coming if one.made is not None]
        if first.made is None or not others:
            self.fail(first.path, error)
            self._open_again(error)
            return
        wait([one.made for one in others if one.made is not None])
        self._open_again(error, is_counted=False)
        for one in (first, *others):
            if one.made is not None and isinstance(one.made.exception(), BackendError):
                one.made = None
        self._coming.appendleft(first)
        while any(one.made is None for one in self._coming):
            self._end_first()

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
            if e.errno in FULL:  # no fault of the image: it is left for the next run
                raise _Stop(str(cannot_write(e.filename or "the output", e))) from e
            words = f"{e.filename or 'the output'}: cannot be written: {os_reason(e)}"
            self.fail(record.image, OSError(e.errno, words))
            return
        self._writing = None
        event: dict[str, Any] = {"event": "caption", "image": record.image, "caption": record.caption}
        event["tokens"] = record.tokens
        if caption is None:
            self._report({**event, "duplicate_of": record.duplicate_of})
        else:
            self._report({**event, "seconds": dict(caption.seconds)})

    def _wait_for(self, future: Future[Prepared]) -> Prepared:
        """The image, once it is there."""
        start, encoded = time.perf_counter(), (0.0, 0.0)
        try:
            prepared = future.result()
            encoded = prepared.encoded or encoded
        finally:
            self._busy.encoded(encoded)
            if not any(one.made is not None and not one.made.done() for one in self._coming):
                self._busy.waited((start, time.perf_counter()), encoded)
        return prepared

    def _make_record(self, one: _Coming) -> tuple[Record, Caption | None]:
        summary, prepared = self._summary, one.prepared
        if self._writing is not None and self._writing.record.sha256 == prepared.sha256:
            self._finish_writing()
        twin = self._by_content.get(prepared.sha256)
        if twin is not None:
            original = twin.duplicate_of or twin.image
            return replace(twin, image=one.path, sha256=prepared.sha256, duplicate_of=original), None
        assert prepared.image is not None
        if one.made is not None:
            made = one.made.result()
        else:
            made = make(self._model, prepared.image, self._options, prepared.seconds)
        caption = made.caption
        self._losses = 0
        summary.tokens += caption.tokens
        summary.prompt_tokens += caption.prompt_tokens
        summary.cached_tokens += caption.cached_tokens
        self._busy.captioned((made.begun, made.ended), caption.seconds)
        if prepared.encoded is not None:
            encode = caption.seconds["encode"] + prepared.seconds
            caption = replace(caption, seconds={**caption.seconds, "encode": encode})
        return Record(one.path, caption.text, caption.finish_reason, caption.tokens, prepared.sha256), caption

    def fail(self, path: str, error: Exception) -> None:
        """Note that an image has no caption. Raises _Stop if the disk is too full for the note."""
        self._summary.failed += 1
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        entry = {"image": path, "error": type(error).__name__, "message": one_line(message, 2000)}
        try:
            self._errors.add(entry)
        except OSError as e:
            entry["unrecorded"] = f"{self._errors.path}: {os_reason(e)}"
            if is_full(e):
                self._report({"event": "error", **entry})
                raise _Stop(str(cannot_write(self._errors.path, e))) from e
        self._report({"event": "error", **entry})

    def _open_again(self, error: BackendError, *, is_counted: bool = True) -> None:
        self._losses += is_counted
        if self._losses >= MAX_LOSSES:
            raise _Stop(f"the device failed {self._losses} times in a row: {error}") from error
        try:
            if self._together is not None:
                self._together.close()
            if self._ahead is not None:
                self._ahead.encoder.close()
            self._model = self._open_model()
            self._open_together()
            if self._ahead is not None:
                # A closed one leaves the encoding to us.
                self._ahead.encoder = self._open_encoder() or self._ahead.encoder
        except MllamaError as e:
            raise _Stop(f"the model cannot be opened again: {e}") from e
