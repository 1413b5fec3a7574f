"""Stores of models as Ollama lays them out on a disk: manifests by name, blobs by digest.

    manifests/HOST/NAMESPACE/NAME/TAG    JSON; its layers name blobs and what they are
    blobs/sha256-HEX                     a file of that digest

Newer versions of Ollama write `manifests-v2` instead, with links to blobs, and call their own host
ollama.com. `mllama pull` downloads from a registry into our own store, which has the older shape. This module
only reads stores, and blobs are used in place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MllamaError, ModelError
from ..reading import open_regular
from ..words import brief, os_reason, show_name
from .defaults import Defaults
from .digests import Blob
from .manifest import LARGEST_CONFIG, LARGEST_MANIFEST, SMALL_LAYERS, Manifest, parse_manifest, read_json
from .parameters import (
    idle_parameters,
    is_llama_template,
    options_of,
    read_messages,
    read_params,
    read_text_layer,
    settings_of,
)
from .references import HOST_ALIASES, OllamaRef

FOLDERS = ("manifests-v2", "manifests")  # of manifests in a store, in the order in which Ollama looks


@dataclass(frozen=True)
class OllamaModel:
    """A model in a store, with what its manifest says about its use.

    path:     the manifest
    digest:   sha256 of the manifest, 64 hexadecimal digits
    modified: when the manifest was written, as `time.time` counts
    size:     bytes of all layers
    params:   the parameters as Ollama spells them; see `settings` and `defaults` for what they mean here
    system:   the system message, or ""
    template: Go source of the chat template, or ""
    messages: how every conversation begins, as `create_chat_completion` takes messages
    licenses: texts
    config:   "model_family", "model_type" and the like
    missing:  kinds of small layers that the manifest names and no store has
    """

    ref: OllamaRef
    path: Path
    files: tuple[Path, ...]  # of the weights, in the order of `manifest.blobs`
    manifest: Manifest
    digest: str
    modified: float = field(compare=False)
    params: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    template: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    licenses: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.manifest.size

    @property
    def family(self) -> str:
        return self._config("model_family") or "mllama"

    @property
    def families(self) -> tuple[str, ...]:
        named = self.config.get("model_families")
        return tuple(map(str, named)) if isinstance(named, list) and named else (self.family,)

    @property
    def parameter_size(self) -> str:
        """As in "10.7B", or ""."""
        return self._config("model_type")

    @property
    def quantization_level(self) -> str:
        """As in "Q4_K_M", or ""."""
        return self._config("file_type")

    @property
    def format(self) -> str:
        return self._config("model_format") or "gguf"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """As Ollama names them."""
        return ("completion", "vision") if "mllama" in self.families else ("completion",)

    @property
    def has_known_template(self) -> bool:
        """Whether the template prompts as Llama 3.2 was trained. So does a model without a template."""
        return not self.template or is_llama_template(self.template)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the parameters say about opening the model: arguments of `Mllama`."""
        return settings_of(self.params)

    @property
    def defaults(self) -> Defaults:
        """What the layers say about replies."""
        known = bool(self.template) and self.has_known_template
        return Defaults(options_of(self.params), self.system, self.messages, known, tuple(self._notes()))

    def _notes(self) -> Iterator[str]:
        if not self.has_known_template:
            yield (
                f"{self.ref}: has a Go template of its own, which is not read; the chat template in its GGUF "
                "file is used (another: --chat-template)"
            )
        if idle := idle_parameters(self.params):
            yield f"{self.ref}: parameters without effect here: {show_name(', '.join(idle))}"
        if self.missing:
            kinds = ", ".join(dict.fromkeys(self.missing))
            yield f"{self.ref}: its {kinds} is not on this machine; fetch it: mllama pull {self.ref}"
        if self.manifest.unknown:
            kinds = ", ".join(brief(one) for one in dict.fromkeys(self.manifest.unknown))
            yield f"{self.ref}: layers of unknown kinds, which are not read: {show_name(kinds)}"

    def _config(self, key: str) -> str:
        value = self.config.get(key)
        return value if isinstance(value, str) and len(value) <= 100 else ""


# ---- stores ------------------------------------------------------------------------------------------------


def downloads() -> Path:
    """Where `mllama pull` puts models: $MLLAMA_DOWNLOADS, or a folder in the user's cache."""
    import platformdirs

    chosen = os.environ.get("MLLAMA_DOWNLOADS")
    if chosen:
        return Path(os.path.expanduser(chosen))
    return platformdirs.user_cache_path("mllama_gguf") / "models"


def find_stores() -> list[Path]:
    """The folders to look in, in this order: our downloads, and those of Ollama."""
    folders = [downloads()]
    if chosen := os.environ.get("OLLAMA_MODELS"):
        folders.append(Path(os.path.expanduser(chosen)))
    # Not Path.home(), which fails for a user without a name and $HOME, as in a container.
    folders += [Path(os.path.expanduser("~/.ollama/models")), Path("/usr/share/ollama/.ollama/models")]
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


def find(ref: OllamaRef) -> OllamaModel | None:
    """The model of that name, in the first store that has its manifest and, somewhere, all of its weights.
    Names differ in more than upper and lower case. None if no store has the manifest.

    Raises ModelError: a store cannot be read, the manifest or a layer is bad, or weights are missing.
    """
    problem: ModelError | None = None
    for store in find_stores():
        try:
            path = find_manifest(store, ref)
            if path is not None:
                return read_model(path, ref)
        except FileNotFoundError:
            continue
        except ModelError as e:
            problem = problem or e
    if problem:
        raise problem
    return None


def find_manifest(store: Path, ref: OllamaRef) -> Path | None:
    """The manifest of a name in a store: of that spelling, or else of one that differs in case. Raises
    ModelError if the store cannot be read."""
    hosts = HOST_ALIASES if ref.host.lower() in HOST_ALIASES else (ref.host,)
    try:
        for exact in (True, False):
            for folder in FOLDERS:
                for host in hosts:
                    parts = (host, ref.namespace, ref.name, ref.tag)
                    root = store / folder
                    path = root.joinpath(*parts) if exact else _folded(root, parts)
                    if path is not None and os.path.lexists(path):
                        os.stat(path)  # a folder that is closed, or a link to nothing
                        return path
    except PermissionError as e:
        raise _closed(e) from e
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ModelError(f"{e.filename}: {os_reason(e)}") from e
    return None


def _folded(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """The path below a folder whose parts are the same but for their case; the first by name."""
    if not parts:
        return folder
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    for name in names:
        if name.lower() == parts[0].lower():
            found = _folded(folder / name, parts[1:])
            if found is not None:
                return found
    return None


def read_model(path: Path, ref: OllamaRef) -> OllamaModel:
    """The model of a manifest's file. Raises FileNotFoundError, ModelError."""
    data, modified = _read_manifest(path)
    manifest = parse_manifest(data, path, _read_listed)
    files = []
    for blob in manifest.blobs:
        file = find_blob(blob)
        if file is None:
            raise ModelError(
                f"{path}: its blob {blob.file_name} is missing or not of {blob.size} bytes; "
                f"fetch it again: mllama pull {ref}"
            )
        files.append(file)
    digest = hashlib.sha256(data).hexdigest()
    return OllamaModel(ref, path, tuple(files), manifest, digest, modified, **_read_layers(manifest))


def _read_layers(manifest: Manifest) -> dict[str, Any]:
    """The small layers as fields of `OllamaModel`; of several of a kind the last counts, but for licences."""
    found: dict[str, Any] = {}
    licenses, missing = [], []
    # Each is read once, however often it is named.
    wanted = {(x.kind, x.blob.sha256 if x.kind == "license" else ""): x for x in manifest.layers}
    for layer in wanted.values():
        blob = layer.blob
        path = find_blob(blob)
        if path is None:
            missing.append(layer.kind)
            continue
        data = _read(path, SMALL_LAYERS[layer.kind])
        if layer.kind == "params":
            found["params"] = read_params(data, path)
        elif layer.kind == "messages":
            found["messages"] = read_messages(data, path)
        elif layer.kind == "license":
            licenses.append(data.decode("utf-8", "replace"))
        else:
            found[layer.kind] = read_text_layer(data, path, layer.kind)
    found["licenses"] = tuple(licenses)
    found["missing"] = tuple(kind for kind in missing if kind != "license")
    path = None if manifest.config is None else find_blob(manifest.config)
    if path is not None:
        found["config"] = read_config(path)
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The config of a model. Raises FileNotFoundError, ModelError."""
    config = read_json(_read(path, LARGEST_CONFIG), path, "its config")
    if not isinstance(config, dict):
        raise ModelError(f"{path}: its config is {type(config).__name__}, not an object")
    return config


def _read_manifest(path: Path) -> tuple[bytes, float]:
    """A manifest's bytes, and when it was written. Raises FileNotFoundError, ModelError."""
    try:
        modified = os.lstat(path).st_mtime
    except OSError:
        modified = 0.0
    return _read(path, LARGEST_MANIFEST), modified


def _read_listed(blob: Blob) -> bytes:
    """A manifest that a list of manifests names."""
    path = find_blob(blob)
    if path is None:
        raise ModelError(f"the manifest {blob.file_name}, which a list of manifests names, is missing")
    return _read(path, LARGEST_MANIFEST)


def _read(path: Path, most: int) -> bytes:
    """A small file. Raises FileNotFoundError, ModelError."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise FileNotFoundError(path) from e
    except PermissionError as e:
        raise _closed(e) from e
    except OSError as e:
        raise ModelError(f"{path}: {os_reason(e)}") from e
    if len(data) > most:
        raise ModelError(f"{path}: has more than {most} bytes")
    return data


def _closed(error: OSError) -> ModelError:
    return ModelError(
        f"{error.filename}: this user may not read it (permission denied); ask for read access to Ollama's "
        "folder, or fetch a copy with mllama pull"
    )


def list_tags(store: Path) -> Iterator[tuple[OllamaRef, OllamaModel | MllamaError]]:
    """All models that a store has manifests of, by name; the error for what cannot be used."""
    seen = set()
    for folder in FOLDERS:
        root = store / folder
        try:
            paths = sorted(root.glob("*/*/*/*"))
        except OSError:  # of Python 3.11 and older, for a folder in a closed one
            continue
        for path in paths:
            try:
                ref = OllamaRef.parse("/".join(path.relative_to(root).parts[:3]) + f":{path.name}")
            except ModelError:
                continue  # no name that could be asked for: .DS_Store and the like
            if ref.key in seen:
                continue
            seen.add(ref.key)
            try:
                yield ref, read_model(path, ref)
            except FileNotFoundError:
                continue
            except ModelError as e:
                yield ref, e


def list_models() -> Iterator[OllamaModel]:
    """The models of all stores that can be used, each name once. Of any architecture: see `family`."""
    seen = set()
    for store in find_stores():
        for ref, model in list_tags(store):
            if ref.key not in seen and isinstance(model, OllamaModel):
                seen.add(ref.key)
                yield model
