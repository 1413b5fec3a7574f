"""Files of the Hugging Face hub, by huggingface_hub: its client, its cache, its token (extra `hub`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DownloadError, MllamaError, ModelError
from ..words import one_line, os_reason
from .digests import Blob, TransferProgress, is_sha256, sha256_of, stored_sha256
from .download import Dropped, check_space, patiently
from .references import HubRef

if TYPE_CHECKING:
    import types

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it. commit: the full name of the revision."""

    commit: str
    size: int
    sha256: str | None  # of what is stored as a large file: every model


def _hub() -> types.ModuleType:
    try:
        import huggingface_hub
    except ImportError as e:
        raise MllamaError("hf: names need huggingface_hub: pip install 'mllama_gguf[hub]'") from e
    return huggingface_hub


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def find_cached(ref: HubRef) -> Path | None:
    """The file in the hub's cache. Raises MllamaError if huggingface_hub is not installed."""
    path = _hub().try_to_load_from_cache(ref.repo, ref.file, _cache_folder(), ref.revision)
    return Path(path) if isinstance(path, str) else None


def ask(ref: HubRef) -> HubFile:
    """The hub's current file of that name. Raises DownloadError."""
    hub = _hub()
    url = hub.hf_hub_url(ref.repo, ref.file, revision=ref.revision, endpoint=endpoint())
    found = _with_retries(ref, lambda: hub.get_hf_file_metadata(url))
    if not found.commit_hash or found.size is None:
        raise DownloadError(f"{ref}: {endpoint()} does not answer like the Hugging Face hub")
    return HubFile(found.commit_hash, found.size, found.etag if is_sha256(found.etag) else None)


def fetch(ref: HubRef, blob: Blob | None = None, progress: TransferProgress | None = None) -> Path:
    """Download a file to the hub's cache and check its hash.

    blob: the file that is expected; None: as the hub describes it

    A file with another hash is removed from the cache. Raises DownloadError.
    """
    there = ask(ref)
    if blob is not None and there.sha256 not in (None, blob.sha256):
        raise DownloadError(
            f"{ref}: the hub has a file of sha256 {there.sha256} there, models.lock wants {blob.sha256}"
        )
    if find_cached(HubRef(ref.repo, ref.file, there.commit)) is None:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, there.size, "HF_HUB_CACHE")
    # By the branch's name, which the cache then knows; the commit that `ask` saw may be older by now.
    path = Path(
        _with_retries(
            ref,
            lambda: _hub().hf_hub_download(
                ref.repo, ref.file, revision=ref.revision, cache_dir=_cache_folder(), endpoint=endpoint()
            ),
        )
    )
    expected = blob.sha256 if blob else stored_sha256(path)
    actual = sha256_of(path, progress)
    if expected not in (None, actual):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{ref}: what came has the sha256 {actual} instead of {expected}; it was thrown away: try again, "
            "or report it to the publisher"
        )
    return path


def _with_retries(ref: HubRef, call: Callable[[], T]) -> T:
    """The result of a call to the hub, repeated after a transient error. Raises DownloadError."""
    import httpx
    from huggingface_hub import errors

    found: list[T] = []

    def attempt() -> None:
        try:
            found.append(call())
        except errors.GatedRepoError as e:
            raise DownloadError(
                f"{ref}: its publisher requires that you accept the licence: do so at "
                f"{endpoint()}/{ref.repo}, "
                "then set HF_TOKEN to a token of that account"
            ) from e
        except errors.LocalEntryNotFoundError as e:  # how hf_hub_download says that it could not ask
            raise Dropped(f"{endpoint()} cannot be reached ({one_line(e.__cause__ or e)})", 0) from e
        except (errors.RevisionNotFoundError, errors.EntryNotFoundError, errors.RepositoryNotFoundError) as e:
            hint = "; if it is private or gated, set HF_TOKEN to a token that may read it"
            hint = hint if isinstance(e, errors.RepositoryNotFoundError) else ""
            raise DownloadError(f"{ref}: the hub does not have it (404){hint}") from e
        except (OSError, httpx.HTTPError) as e:  # of the hub's answers, of requests, of httpx, of the disk
            code = getattr(getattr(e, "response", None), "status_code", None)
            if code in (401, 403):
                raise DownloadError(
                    f"{ref}: the hub answers {code}: see the licence at {endpoint()}/{ref.repo} and set "
                    "HF_TOKEN to a token of an account that accepted it"
                ) from e
            if code is not None:  # huggingface_hub has tried again by itself
                raise DownloadError(f"{ref}: the hub answers {code}, each time; try again later") from e
            if isinstance(e, OSError) and e.errno is not None:
                raise DownloadError(f"{ref}: {os_reason(e)}") from e
            raise Dropped(one_line(e), 0) from e
        except ValueError as e:  # a name or an answer that the library does not accept
            raise DownloadError(f"{ref}: {one_line(e)}") from e

    patiently(attempt, str(ref))
    return found[0]


def scan() -> list[tuple[HubRef, Path]]:
    """The GGUF files in the hub's cache; none if huggingface_hub is not installed or has no cache."""
    try:
        hub: Any = _hub()
        repos = hub.scan_cache_dir(_cache_folder()).repos if _cache_folder().is_dir() else ()
    except (MllamaError, ValueError, OSError):
        return []
    files = [
        (f"{repo.repo_id}@{revision.commit_hash}", revision.refs, file)
        for repo in repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        for file in revision.files
        if file.file_name.endswith(".gguf")
    ]
    found = []
    for repo, refs, file in files:
        inside = file.file_path.relative_to(
            next(p for p in file.file_path.parents if p.parent.name == "snapshots")
        )
        try:
            ref = HubRef.parse(f"{repo}/{inside.as_posix()}")
        except ModelError:
            continue
        found.append((HubRef(ref.repo, ref.file) if "main" in refs else ref, file.file_path))
    return sorted(found, key=lambda item: str(item[0]))
