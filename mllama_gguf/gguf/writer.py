"""What every writer of GGUF files here shares: pieces made by several threads and written in order, to files
that appear under their names only when whole.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..files import Kind, cannot_write, replacing
from ..temporary import remove_leftovers
from .reader import TensorEntry

GGUF = Kind.begins_with("GGUF file", b"GGUF")

Array = npt.NDArray[Any]
Job = Callable[[], Array]  # makes one piece of a tensor's data; run on any thread
Progress = Callable[[int, int], None]  # bytes written, of how many


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """The `tick` of `write_data` that tells `progress`, first that nothing is done."""
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    tick(0)
    return tick


def write_head(out: IO[bytes], keys: Sequence[bytes], tensors: Sequence[TensorEntry], alignment: int) -> None:
    """Write all that comes before the data. keys: each as the file stores it, name and value."""
    out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)))
    for key in keys:
        out.write(key)
    for t in tensors:
        name = t.name.encode()
        out.write(struct.pack("<Q", len(name)) + name)
        out.write(struct.pack(f"<I{len(t.ne)}QIQ", len(t.ne), *t.ne, t.type, t.offset))
    out.write(bytes(-out.tell() % alignment))


def write_data(
    out: IO[bytes],
    tensors: Iterable[tuple[int, Iterable[Job]]],
    *,
    alignment: int,
    n_threads: int,
    tick: Callable[[int], None],
) -> None:
    """Write the data of all tensors, each given as its size in bytes and the jobs that make it, piece after
    piece. tick: called with the bytes of each piece."""
    begun: deque[int] = deque()  # sizes of the tensors whose jobs run ahead of the writing

    def jobs() -> Iterator[Job]:
        for n_bytes, pieces in tensors:
            begun.append(n_bytes)
            yield from pieces

    written = 0
    with closing(_in_order(jobs(), n_threads)) as results:
        for piece in results:
            out.write(np.ascontiguousarray(piece).data)
            written += piece.nbytes
            if written == begun[0]:
                out.write(bytes(-written % alignment))
                begun.popleft()
                written = 0
            tick(piece.nbytes)
    assert not begun, "a tensor is shorter than its size"


def _in_order(jobs: Iterator[Job], n_threads: int) -> Generator[Array]:
    """The results of the jobs in their order; n_threads run at the same time, a few more are held."""
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="mllama-write")
    waiting: deque[Future[Array]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def new_gguf(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file to write a GGUF to, which appears under its name when it is whole; see `files.replacing`.

    Raises MllamaError if it cannot be written, if another process is writing it, and and if another
    file came into being there after `files.check_output` allowed it.
    """
    remove_leftovers(Path(os.path.realpath(path)).parent)  # of another output, tens of gigabytes perhaps
    try:
        with replacing(path, overwrite=overwrite, kind=GGUF, wait=0) as out:
            yield out
    except OSError as e:
        raise cannot_write(path, e) from e
