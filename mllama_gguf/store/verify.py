"""Whether files are what they should be, by their sha256."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from .digests import TransferProgress, sha256_of
from .resolve import ModelFiles


@dataclass(frozen=True)
class Verified:
    """A file's hash. expected: None if nothing says what it should be."""

    path: Path
    actual: str
    expected: str | None

    @property
    def ok(self) -> bool:
        return self.actual == self.expected


def verify(files: ModelFiles, progress: TransferProgress | None = None) -> list[Verified]:
    """Hash the files of a model. A file whose name tells no digest is looked for in models.lock.

    A bad lock file of the user is only a warning, because the model is known without it.

    Raises ModelError if one cannot be read.
    """
    from .lockfile import usable_locked_models

    locked = usable_locked_models()
    known = {file.sha256 for model in locked.values() for file in model.files}
    if files.name in locked:
        by_role = {file.role: file.sha256 for file in locked[files.name].files}
        named = {files.text: by_role["model"]}
    else:
        named = {}
    results = []
    for path in files.paths:
        actual = sha256_of(path, progress)
        expected = files.sha256.get(path) or named.get(path) or (actual if actual in known else None)
        results.append(Verified(path, actual, expected))
    return results


def require_verified(files: ModelFiles, progress: TransferProgress | None = None) -> None:
    """Raises ModelError, naming the file, unless every file of a model is what it should be."""
    for result in verify(files, progress):
        if result.expected is None:
            raise ModelError(
                f"{result.path}: cannot be verified: its expected sha256 is not known ({result.actual})"
            )
        if not result.ok:
            raise ModelError(
                f"{result.path}: damaged or not the published file: its sha256 is {result.actual} instead of "
                f"{result.expected}; delete it and fetch it again"
            )
