"""Stores of models as Ollama lays them out on a disk: manifests by name, blobs by digest.

    manifests/HOST/NAMESPACE/NAME/TAG    JSON; its layers name blobs and what they are
    blobs/sha256-HEX                     a file of that digest

`mllama pull` downloads from a registry into our own store, which has the same shape. This module only reads
stores, and blobs are used in place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MllamaError, ModelError
from ..reading import open_regular
from .digests import Blob, is_sha256
from .references import OllamaRef

MEDIA_TYPE = "application/vnd.ollama.image."
LARGEST_MANIFEST = 1 << 20  # bytes; real ones take one or two thousand


@dataclass(frozen=True)
class Manifest:
    """The parts of a model that are weights. projector: of a model in two files."""

    model: Blob
    projector: Blob | None

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (self.model,) if self.projector is None else (self.model, self.projector)


def parse_manifest(data: bytes, origin: object) -> Manifest:
    """Read and check a manifest's JSON. origin: its file or URL, for messages. Raises ModelError."""
    try:
        layers = json.loads(data)["layers"]
        if not isinstance(layers, list):
            raise TypeError
        found = {
            kind: [_blob(x, origin) for x in layers if x["mediaType"] == MEDIA_TYPE + kind]
            for kind in ("model", "projector")
        }
    except ModelError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ModelError(f"{origin}: not a manifest of Ollama") from e
    if len(found["model"]) != 1 or len(found["projector"]) > 1:
        numbers = f"{len(found['model'])} model and {len(found['projector'])} projector layers"
        raise ModelError(f"{origin}: {numbers}; a model in GGUF has one model and at most one projector")
    return Manifest(found["model"][0], found["projector"][0] if found["projector"] else None)


def _blob(layer: dict[str, Any], origin: object) -> Blob:
    algorithm, _, sha256 = str(layer["digest"]).partition(":")
    if algorithm != "sha256" or not is_sha256(sha256):
        raise ModelError(
            f"{origin}: {layer['digest']!r:.100} is no digest (sha256: and 64 hexadecimal digits)"
        )
    size = layer["size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ModelError(f"{origin}: {size!r:.100} is no size")
    return Blob(sha256, size)


def downloads() -> Path:
    """Where `mllama pull` puts models: $MLLAMA_DOWNLOADS, or a folder in the user's cache."""
    import platformdirs

    chosen = os.environ.get("MLLAMA_DOWNLOADS")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("mllama_gguf") / "models"


def find_stores() -> list[Path]:
    """The folders to look in, in this order: our downloads, and those of Ollama."""
    folders = [downloads()]
    if chosen := os.environ.get("OLLAMA_MODELS"):
        folders.append(Path(chosen).expanduser())
    folders += [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    return list(dict.fromkeys(folders))


def find_blob(blob: Blob) -> Path | None:
    """The file in any store. A file of another size is ignored. Raises ModelError if a store that may
    have it cannot be read."""
    closed: OSError | None = None
    for store in find_stores():
        path = store / "blobs" / blob.file_name
        try:
            size = path.stat().st_size
        except PermissionError as e:
            closed = closed or e
        except OSError:
            continue
        else:
            if blob.size in (None, size):
                return path
    if closed:
        raise _closed(closed)
    return None


def find(ref: OllamaRef) -> tuple[Manifest, list[Path]] | None:
    """The manifest and the files of a model, in the first store that has its manifest and, somewhere, all of
    its blobs. None if no store has the manifest.

    Raises ModelError: a store cannot be read, the manifest is bad, or a blob is missing.
    """
    problem: ModelError | None = None
    for store in find_stores():
        path = store / "manifests" / ref.path
        try:
            manifest = parse_manifest(_read(path), path)
            files = [find_blob(blob) for blob in manifest.blobs]
        except FileNotFoundError:
            continue
        except ModelError as e:
            problem = problem or e
            continue
        whole = [file for file in files if file is not None]
        if len(whole) == len(files):
            return manifest, whole
        missing = next(blob for blob, file in zip(manifest.blobs, files, strict=True) if file is None)
        problem = problem or ModelError(
            f"{path}: its blob {missing.file_name} is missing or not of {missing.size} bytes; "
            f"fetch it again: mllama pull {ref}"
        )
    if problem:
        raise problem
    return None


def _read(path: Path) -> bytes:
    """A manifest's bytes. Raises FileNotFoundError, and ModelError for what else goes wrong."""
    try:
        with open_regular(path) as file:
            return file.read(LARGEST_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise FileNotFoundError(path) from e
    except PermissionError as e:
        raise _closed(e) from e
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror or e}") from e


def _closed(error: OSError) -> ModelError:
    return ModelError(
        f"{error.filename}: this user may not read it (permission denied); ask for read access to Ollama's "
        "folder, or fetch a copy with mllama pull"
    )


def list_tags(store: Path) -> Iterator[tuple[OllamaRef, Manifest | MllamaError]]:
    """All models that a store has manifests of, by name; the error for what cannot be read."""
    root = store / "manifests"
    for path in sorted(root.glob("*/*/*/*")):
        try:
            ref = OllamaRef.parse("/".join(path.relative_to(root).parts[:3]) + f":{path.name}")
        except ModelError:
            continue  # no name that could be asked for: .DS_Store and the like
        try:
            yield ref, parse_manifest(_read(path), path)
        except FileNotFoundError:
            continue
        except ModelError as e:
            yield ref, e
