"""Fetching models: from a registry of Ollama's kind into our own store, from the hub into its cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import DownloadError, ModelError
from ..files import Kind, check_output, replacing
from ..words import brief, one_line, os_reason, show_name
from . import hub, ollama
from .digests import Blob, TransferProgress
from .download import Dropped, answer, check_space, check_status, client, download, patiently
from .lockfile import LockedFile, LockedModel, find_locked, find_locked_file, known_names
from .manifest import LARGEST_MANIFEST, Manifest, parse_manifest
from .references import HubRef, OllamaRef
from .resolve import BUNDLED, ModelFiles, resolve

if TYPE_CHECKING:
    import httpx


def pull(name: str, progress: TransferProgress | None = None) -> ModelFiles:
    """Fetch the missing files of a model and return where its files are.

    name: as `resolve` takes, but no path

    A file already here, in Ollama's store as well, is not fetched again. An interrupted download is resumed
    by the next call. Every file that is fetched is checked against its sha256.

    Raises DownloadError, ModelError for a wrong name and for a model of Ollama's that is no mllama,
    RequestError if a file that is not ours is in the way.
    """
    if name.startswith("ollama:"):
        _pull_tag(OllamaRef.parse(name), progress)
    elif name.startswith("hf:"):
        _pull_from_hub(HubRef.parse(name), progress)
    elif name not in BUNDLED:
        _pull_locked(_find_entry(name), progress)
    return resolve(name)


def _find_entry(name: str) -> LockedModel:
    locked = find_locked(name)
    if locked is None:
        raise ModelError(
            f"no model is called {brief(name, 200)}; there are {known_names()}, "
            "ollama:NAME[:TAG], hf:OWNER/REPO/FILE"
        )
    return locked


def _pull_locked(locked: LockedModel, progress: TransferProgress | None) -> None:
    if locked.source.startswith("ollama:"):
        _pull_blobs(locked.ollama_ref(), [(file.blob, file.likely_size) for file in locked.files], progress)
        return
    for file in locked.files:
        hub.fetch(locked.hub_ref(file), file.blob, progress)


def _pull_from_hub(ref: HubRef, progress: TransferProgress | None) -> None:
    locked = find_locked_file(ref)
    if locked is not None:
        _pull_locked(locked, progress)
    else:
        hub.fetch(ref, progress=progress)


def _pull_tag(ref: OllamaRef, progress: TransferProgress | None) -> None:
    with client() as http:
        words = _manifest(http, ref)
    manifest = parse_manifest(words, _manifest_url(ref))
    # Names ignore case.
    store = ollama.downloads()
    path = ollama.find_manifest(store, ref) or store / "manifests" / ref.path
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    target = check_output(path, _MANIFEST, overwrite=True)
    if manifest.config is not None:  # before gigabytes of a model that cannot run here
        _pull_blobs(ref, [(manifest.config, manifest.config.size or 0)], progress)
        _check_family(ref, manifest.config)
    blobs = (*manifest.small, *manifest.blobs)
    _pull_blobs(ref, [(blob, blob.size or 0) for blob in blobs], progress)
    with _writing(path), replacing(target, kind=_MANIFEST) as file:  # last: it says that its blobs are there
        file.write(words)


def _check_family(ref: OllamaRef, config: Blob) -> None:
    """Raises ModelError if a config that is here names families, and not ours among them."""
    path = _find_blob(config)
    words = ollama.read_config(path) if path is not None else {}
    several = words.get("model_families")
    named = [words.get("model_family"), *(several if isinstance(several, list) else ())]
    families = [name for name in named if isinstance(name, str) and name]
    if families and "mllama" not in families:
        shown = show_name(", ".join(dict.fromkeys(families)), 100)
        raise ModelError(f"{ref} is a model of the family {shown}; only mllama runs here")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong with a file is a DownloadError."""
    try:
        yield
    except OSError as e:
        raise DownloadError(f"{path}: cannot be written: {os_reason(e)}") from e


def _is_manifest(file: BinaryIO) -> bool:
    words = json.loads(file.read(LARGEST_MANIFEST))
    return isinstance(words, dict) and ("layers" in words or "manifests" in words)


_MANIFEST = Kind("manifest of a model", _is_manifest)


def _pull_blobs(ref: OllamaRef, blobs: Sequence[tuple[Blob, int]], progress: TransferProgress | None) -> None:
    """Fetch to our store those blobs that are in none; each with its likely size."""
    store = ollama.downloads()
    missing = [(blob, size) for blob, size in blobs if _find_blob(blob) is None]
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DownloadError(f"{store}: cannot be made: {os_reason(e)}") from e
    partials = [store / "partial" / blob.file_name for blob, _ in missing]
    here = sum(partial.stat().st_size for partial in partials if partial.is_file())
    check_space(store, max(0, sum(size for _, size in missing) - here))
    with client() as http:
        for (blob, _), partial in zip(missing, partials, strict=True):
            url = f"{ref.url}/blobs/sha256:{blob.sha256}"
            download(http, url, store / "blobs" / blob.file_name, blob, partial, progress)


def _find_blob(blob: Blob) -> Path | None:
    try:
        return ollama.find_blob(blob)
    except ModelError:  # in a store that is closed to us, if at all
        return None


def _manifest_url(ref: OllamaRef) -> str:
    return f"{ref.url}/manifests/{ref.tag}"


def _files_of(manifest: Manifest) -> tuple[LockedFile, ...]:
    files = [LockedFile("model", manifest.model.sha256, manifest.model.size)]
    if manifest.projector:
        files.append(LockedFile("mmproj", manifest.projector.sha256, manifest.projector.size))
    return tuple(files)


def _manifest(http: httpx.Client, ref: OllamaRef) -> bytes:
    """The JSON of a tag as the registry gives it. Raises DownloadError."""
    url = _manifest_url(ref)
    accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
    return _ask(http, "GET", url, f"{ref} ({url})", accept)[0]


def _ask(
    http: httpx.Client, method: str, url: str, what: str, headers: Mapping[str, str] | None = None
) -> tuple[bytes, httpx.Headers]:
    """A manifest, or what else is small, and the headers of the answer. Raises DownloadError."""
    import httpx

    found: list[tuple[bytes, httpx.Headers]] = []

    def attempt() -> None:
        data = bytearray()
        try:
            with answer(http, method, url, headers or {}) as response:
                check_status(response, what)
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > LARGEST_MANIFEST:
                        raise DownloadError(f"{what}: the server sends more than {LARGEST_MANIFEST} bytes")
        except httpx.TransportError as e:
            raise Dropped(f"the connection failed ({one_line(e)})", 0) from e
        except httpx.HTTPError as e:
            raise DownloadError(f"{what}: {one_line(e)}") from e
        found.append((bytes(data), response.headers))

    patiently(attempt, what)
    return found[0]


# ---- lock --------------------------------------------------------------------------------------------------


def lock(
    reference: str, *, name: str | None = None, mmproj: str | None = None, update: bool = False
) -> LockedModel:
    """The current files of a source as an entry for a lock file. No model is fetched.

    reference: `ollama:...`, `hf:...`, or a name in a lock file, whose digests stay and whose sizes are filled
               in
    name:      of the entry; None: made from the reference
    mmproj:    `hf:...` of the same repository, the vision encoder
    update:    take other digests for a name that is in a lock file, if its source has them

    Raises DownloadError, ModelError.
    """
    if reference.startswith("ollama:"):
        ref = OllamaRef.parse(reference)
        name = name or (ref.name if ref.tag == "latest" else f"{ref.name}-{ref.tag}")
        return LockedModel(name, str(ref), _tag_files(ref), Path())
    if reference.startswith("hf:"):
        text = HubRef.parse(reference)
        vision = HubRef.parse(mmproj) if mmproj else None
        if vision and (vision.repo, vision.revision) != (text.repo, text.revision):
            raise ModelError(f"{mmproj} is not in the repository of {reference}; a model has one source")
        return _hub_entry(name or Path(text.file).stem, text, vision)
    known = _find_entry(reference)
    if known.source == "bundled":
        raise ModelError(f"{reference} comes with the package; there is nothing to lock")
    known = replace(known, name=name or known.name)
    if not update:
        return replace(known, files=tuple(_with_size(known, file) for file in known.files))
    if known.source.startswith("ollama:"):
        return replace(known, files=_tag_files(known.ollama_ref()), layout=None)
    refs = [replace(known.hub_ref(file), revision="main") for file in (known.model, known.mmproj) if file]
    fresh = _hub_entry(known.name, refs[0], refs[1] if len(refs) > 1 else None)
    return replace(known, source=fresh.source, files=fresh.files, layout=None)


def _tag_files(ref: OllamaRef) -> tuple[LockedFile, ...]:
    with client() as http:
        return _files_of(parse_manifest(_manifest(http, ref), _manifest_url(ref)))


def _hub_entry(name: str, text: HubRef, vision: HubRef | None) -> LockedModel:
    commit, files = "", []
    for role, ref in (("model", text), ("mmproj", vision)):
        if ref is None:
            continue
        there = hub.ask(replace(ref, revision=commit) if commit else ref)
        if there.sha256 is None:
            raise ModelError(f"{ref}: the hub gives no sha256 for it, because it is not a large file")
        commit = there.commit
        files.append(LockedFile(role, there.sha256, there.size, file=ref.file))  # type: ignore[arg-type]
    return LockedModel(name, f"hf:{text.repo}@{commit}", tuple(files), Path())


def _with_size(locked: LockedModel, file: LockedFile) -> LockedFile:
    """The file with the exact size that its source tells."""
    if locked.source.startswith("hf:"):
        there = hub.ask(locked.hub_ref(file))
        if there.sha256 != file.sha256:
            raise DownloadError(
                f"{locked.hub_ref(file)}: the hub has other content now ({there.sha256}); --update accepts it"
            )
        return replace(file, size=there.size)
    url = f"{locked.ollama_ref().url}/blobs/sha256:{file.sha256}"
    with client() as http:
        words = _ask(http, "HEAD", url, url)[1].get("Content-Length", "")
    if not words.isdecimal():
        raise DownloadError(f"{url}: the server does not say how large it is")
    return replace(file, size=int(words))
