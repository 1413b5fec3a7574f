"""Download one file: resumed, hashed while it arrives, renamed when it is complete."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import DownloadError
from ..temporary import open_locked
from ..words import one_line, os_reason, show_name, show_size
from .digests import CHUNK, Blob, TransferProgress
from .references import LOOPBACK

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # in a row without progress
FIRST_PAUSE = 1.0  # seconds before the second attempt; doubled for each further one
TIMEOUT = 30.0  # seconds for a connection, and between two pieces
REDIRECTS = 20
SPARE = 64 << 20  # bytes that a download leaves free on the disk
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


def client() -> httpx.Client:
    """An HTTP client with our time limits, for `answer`. Plain HTTP is for this machine only."""
    import httpx

    def check(request: httpx.Request) -> None:
        host = request.url.host
        if request.url.scheme != "https" and not LOOPBACK.fullmatch(host):
            shown = show_name(str(request.url.copy_with(query=None)))
            raise DownloadError(f"{shown}: refused: the connection is not encrypted")

    return httpx.Client(timeout=TIMEOUT, event_hooks={"request": [check]})


@contextmanager
def answer(http: httpx.Client, method: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
    """What a server answers, its body not read yet, and as it is. Redirects are followed; of their bodies,
    which httpx would read whole and unpacked, nothing is read. Raises DownloadError, httpx.HTTPError."""
    request = http.build_request(method, url, headers={**headers, "Accept-Encoding": "identity"})
    for _ in range(REDIRECTS):
        response = http.send(request, stream=True)
        try:
            if response.next_request is None:
                yield response
                return
        finally:
            response.close()
        request = response.next_request
    raise DownloadError(f"{url}: the server redirects more than {REDIRECTS} times")


def check_space(folder: Path, n_bytes: int, variable: str = "MLLAMA_DOWNLOADS") -> None:
    """Raises DownloadError if `folder`'s disk has not that many bytes free, and some to spare.

    variable: the environment variable that sets the folder, for the message
    """
    free = shutil.disk_usage(folder).free
    if n_bytes and n_bytes + SPARE > free:
        raise DownloadError(
            f"{folder}: not enough room: {show_size(n_bytes)} to fetch, {show_size(free)} free; "
            f"set {variable} to a folder on another disk"
        )


class Dropped(Exception):
    """The transfer failed in a way that may be gone next time."""


def patiently(attempt: Callable[[], None], what: str) -> None:
    """Call `attempt` until it does not raise Dropped. It raises DownloadError after ATTEMPTS in a row that
    got no further. `Dropped.args`: the reason, and how many bytes are there now."""
    best, failures = 0, 0
    while True:
        try:
            attempt()
            return
        except Dropped as e:
            reason, done = e.args
            failures = failures + 1 if done <= best else 1
            best = max(best, done)
            if failures >= ATTEMPTS:
                kept = "; the part that arrived is kept: run the command again to resume" if best else ""
                raise DownloadError(f"{what}: {reason}, {ATTEMPTS} times{kept}") from e
            pause = FIRST_PAUSE * 2 ** (failures - 1)
            logger.info("%s: %s; again in %g s", what, reason, pause)
            time.sleep(pause)


def download(
    http: httpx.Client,
    url: str,
    target: Path,
    blob: Blob,
    partial: Path,
    progress: TransferProgress | None = None,
) -> None:
    """Fetch `blob` from `url` to `target`; the data goes to `partial` first, where a later call resumes.

    Only one process at a time fetches to `partial`; another waits, and finds the file there. `target` is on
    the same disk; one of the wrong size is replaced. Raises DownloadError; `target` is then as it was.
    """
    import httpx

    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            raw, _ = open_locked(partial)
        except BlockingIOError:
            logger.warning("%s is being fetched by another mllama; waiting for it", target.name)
            raw, _ = open_locked(partial, float("inf"))
        with io.BufferedRandom(raw) as file:
            if target.exists():
                there = target.stat().st_size
                if blob.size in (None, there):
                    partial.unlink()
                    return
                logger.warning(
                    "%s: has %d bytes instead of %d; it is fetched again", target, there, blob.size
                )
            _Transfer(http, url, blob, partial, progress).run(file)
            os.replace(partial, target)
    except httpx.HTTPError as e:  # no TransportError: too many redirects and the like
        raise DownloadError(f"{url}: {one_line(e)}") from e
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise DownloadError(
                f"{partial}: the disk is full; free some room and run the command again to resume"
            ) from e
        raise DownloadError(f"{e.filename or partial}: {os_reason(e)}") from e


class _Transfer:
    """The bytes of one blob on their way into `partial`, with the hash of those that have come."""

    def __init__(
        self, http: httpx.Client, url: str, blob: Blob, partial: Path, progress: TransferProgress | None
    ) -> None:
        self._http, self._url, self._blob, self._partial = http, url, blob, partial
        self._progress = progress or (lambda phase, done, total: None)
        self._hash = hashlib.sha256()
        self._done = 0  # bytes in the file and in the hash

    def run(self, file: BinaryIO) -> None:
        """Fetch what is missing in the open partial file. Raises DownloadError, OSError."""
        self._take_up(file)
        if self._hash.hexdigest() != self._blob.sha256:
            patiently(lambda: self._attempt(file), self._url)
        file.flush()
        os.fsync(file.fileno())
        if self._hash.hexdigest() != self._blob.sha256:
            self._partial.unlink()
            raise DownloadError(
                f"{self._url}: what came has the sha256 {self._hash.hexdigest()} instead of "
                f"{self._blob.sha256}; it was thrown away: try again, or report it to the publisher"
            )

    def _take_up(self, file: BinaryIO) -> None:
        """Hash what an earlier call left."""
        there = os.fstat(file.fileno()).st_size
        if self._blob.size is not None and there > self._blob.size:
            self._start_over(file)
            return
        file.seek(0)
        while chunk := file.read(CHUNK):
            self._hash.update(chunk)
            self._done += len(chunk)
            self._progress("verify", self._done, there)

    def _start_over(self, file: BinaryIO) -> None:
        file.seek(0)
        file.truncate()
        self._hash, self._done = hashlib.sha256(), 0

    def _attempt(self, file: BinaryIO) -> None:
        """Ask for what is missing and take what comes. Raises Dropped, DownloadError."""
        import httpx

        # Compressed, a range would count other bytes.
        headers = {"Range": f"bytes={self._done}-"} if self._done else {}
        try:
            with answer(self._http, "GET", self._url, headers) as response:
                if (
                    response.status_code == 416
                ):  # there is nothing after what we have, so it is not of this blob
                    self._start_over(file)
                    raise Dropped("the server's file is shorter than the part that was kept", 0)
                check_status(response, self._url)
                if response.status_code == 206 and self._range_start(response) != self._done:
                    raise DownloadError(f"{self._url}: the server sends another range than the requested one")
                if response.status_code != 206:  # it knows no ranges, or none was asked for
                    self._start_over(file)
                total = self._total(response)
                check_space(self._partial.parent, total - self._done)
                for chunk in response.iter_raw():
                    file.write(chunk)
                    self._hash.update(chunk)
                    self._done += len(chunk)
                    if total and self._done > total:
                        self._start_over(file)
                        raise DownloadError(f"{self._url}: sends more than {total} bytes")
                    self._progress("download", self._done, total)
        except httpx.TransportError as e:
            raise Dropped(f"the connection failed ({one_line(e)})", self._done) from e
        if self._done < total:
            raise Dropped(f"the connection ended after {self._done} of {total} bytes", self._done)

    @staticmethod
    def _range_start(response: httpx.Response) -> int | None:
        found = re.match(r"bytes (\d{1,19})-", response.headers.get("Content-Range", ""))
        return int(found[1]) if found else None

    def _total(self, response: httpx.Response) -> int:
        """Bytes of the whole blob; 0 if nobody says."""
        words = response.headers.get("Content-Length", "")
        said = self._done + int(words) if words.isdecimal() else 0
        wanted = self._blob.size
        if wanted is not None and said and said != wanted:
            raise DownloadError(f"{self._url}: the server has {said} bytes, it must be {wanted}")
        return wanted or said


def check_status(response: httpx.Response, what: str) -> None:
    """Raises Dropped for a server in passing trouble, DownloadError for another refusal."""
    code = response.status_code
    said = f"{code} {show_name(response.reason_phrase)}"
    if code in _RETRIED:
        raise Dropped(f"the server answers {said}", 0)
    if code in (401, 403):
        raise DownloadError(f"{what}: the server answers {code}: it is not public")
    if code == 404:
        raise DownloadError(f"{what}: the server does not have it (404)")
    if not response.is_success:
        raise DownloadError(f"{what}: the server answers {said}")
