"""Files known by their sha256."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..reading import open_regular
from ..words import os_reason

# "download" or "verify", bytes done, bytes in all (0: not known)
TransferProgress = Callable[[str, int, int], None]

CHUNK = 1 << 20  # bytes that are read and hashed in one step
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """A file known by its content. size: bytes; None: not known."""

    sha256: str
    size: int | None

    @property
    def file_name(self) -> str:
        return f"sha256-{self.sha256}"


def is_sha256(words: object) -> bool:
    """Whether this is a digest: 64 lower-case hexadecimal digits."""
    return isinstance(words, str) and _SHA256.fullmatch(words) is not None


def is_size(number: object) -> bool:
    """Whether a file can have so many bytes."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 63


def stored_sha256(path: Path) -> str | None:
    """The digest in a path: blobs of the hub's cache and of Ollama's store are named by their digest."""
    name = os.path.basename(os.path.realpath(path)).removeprefix("sha256-")
    return name if is_sha256(name) else None


def sha256_of(path: Path, progress: TransferProgress | None = None) -> str:
    """The sha256 of a file, in hexadecimal. Raises ModelError if it cannot be read."""
    digest, done = hashlib.sha256(), 0
    try:
        with open_regular(path) as file:
            total = os.fstat(file.fileno()).st_size
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress("verify", done, total)
    except OSError as e:
        raise ModelError(f"{path}: {os_reason(e)}") from e
    return digest.hexdigest()
