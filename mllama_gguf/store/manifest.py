"""A model's manifest: the JSON that names the layers of an Ollama model by their digests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..words import brief, show_size
from .digests import Blob, is_sha256, is_size

MEDIA_TYPE = "application/vnd.ollama.image."
LARGEST_MANIFEST = 1 << 20  # bytes; real ones take one or two thousand

# The layers that say how a model is used, and the most bytes that one of them may have.
SMALL_LAYERS: Mapping[str, int] = {
    "params": 1 << 20,
    "template": 1 << 20,
    "system": 1 << 20,
    "messages": 64 << 20,  # they may hold images
    "license": 1 << 20,
}
LARGEST_CONFIG = 1 << 20
MOST_LAYERS = 20  # of these; real models have up to six
# Ollama's own runners for GGUF. A list of manifests may have others beside them.
_RUNNERS = ("ollama", "llamacpp", "")


@dataclass(frozen=True)
class Layer:
    """A part of a model. kind: "params", "template" and so on; "config"."""

    kind: str
    blob: Blob


@dataclass(frozen=True)
class Manifest:
    """The parts of a model.

    projector: of a model in two files
    layers:    those that say how the model is used, in order
    config:    its size and types in words
    unknown:   media types of layers that are not read
    size:      bytes of all layers and of the config
    """

    model: Blob
    projector: Blob | None
    layers: tuple[Layer, ...] = ()
    config: Blob | None = None
    unknown: tuple[str, ...] = ()
    size: int = 0

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """The weights."""
        return (self.model,) if self.projector is None else (self.model, self.projector)

    @property
    def small(self) -> tuple[Blob, ...]:
        """All blobs but the weights."""
        config = () if self.config is None else (self.config,)
        return tuple(dict.fromkeys((*(layer.blob for layer in self.layers), *config)))


def parse_manifest(data: bytes, origin: object, read_blob: Callable[[Blob], bytes] | None = None) -> Manifest:
    """Read and check a manifest's JSON, or one of a list of manifests. Raises ModelError.

    origin:    its file or URL, for messages
    read_blob: reads a manifest that a list names by its digest; None: such a list is refused
    """
    try:
        words = json.loads(data)
        if "manifests" in words:
            words = _choose(words["manifests"], origin, read_blob)
        layers = words["layers"]
        if not isinstance(layers, list):
            raise TypeError
        parts = [(str(layer["mediaType"]), layer) for layer in layers]
        config = words.get("config")
        config_blob = None if config is None else _blob(config, origin)
    except ModelError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ModelError(f"{origin}: not a manifest of Ollama") from e

    found: dict[str, list[Blob]] = {"model": [], "projector": []}
    small, unknown, size = [], [], 0
    for media_type, layer in parts:
        kind = media_type.removeprefix(MEDIA_TYPE)
        if media_type == MEDIA_TYPE + "adapter":
            n_bytes = layer.get("size")
            shown = f" of {show_size(n_bytes)}" if is_size(n_bytes) else ""
            raise ModelError(
                f"{origin}: has an adapter layer (LoRA){shown}, which this package does not apply; merge the "
                "adapter into the weights, or use the model without it"
            )
        blob = _blob(layer, origin)
        size += blob.size or 0
        if media_type == MEDIA_TYPE + kind and kind in found:
            found[kind].append(blob)
        elif media_type == MEDIA_TYPE + kind and kind in SMALL_LAYERS:
            _check_size(f"its {kind} layer", blob, SMALL_LAYERS[kind], origin)
            small.append(Layer(kind, blob))
        else:
            unknown.append(media_type)
    if len(small) > MOST_LAYERS:
        raise ModelError(
            f"{origin}: {len(small)} layers beside the weights; {MOST_LAYERS} are the most that are read"
        )
    if len(found["model"]) != 1 or len(found["projector"]) > 1:
        numbers = f"{len(found['model'])} model and {len(found['projector'])} projector layers"
        raise ModelError(f"{origin}: {numbers}; a model in GGUF has one model and at most one projector")
    if config_blob is not None:
        _check_size("its config", config_blob, LARGEST_CONFIG, origin)
        size += config_blob.size or 0
    return Manifest(
        found["model"][0],
        found["projector"][0] if found["projector"] else None,
        tuple(small),
        config_blob,
        tuple(unknown),
        size,
    )


def _choose(manifests: Any, origin: object, read_blob: Callable[[Blob], bytes] | None) -> Any:
    """The manifest for GGUF in a list of them."""
    for runner in _RUNNERS:
        for one in manifests:
            if str(one.get("runner", "")).lower() != runner or one.get("format", "gguf") != "gguf":
                continue
            if "layers" in one:
                return one
            digest = str(one["digest"]).removeprefix("sha256:")
            if read_blob is None or not is_sha256(digest):
                break
            return json.loads(read_blob(Blob(digest, None)))
    raise ModelError(f"{origin}: a list of manifests, none of which is a GGUF model that is here")


def _blob(layer: Mapping[str, Any], origin: object) -> Blob:
    digest, size = layer.get("digest"), layer.get("size")
    algorithm, _, sha256 = str(digest).partition(":")
    if algorithm != "sha256" or not is_sha256(sha256):
        raise ModelError(
            f"{origin}: {brief(digest, 100)} is not a digest (sha256: and 64 hexadecimal digits)"
        )
    if not is_size(size):
        raise ModelError(f"{origin}: {brief(size, 100)} is not a size")
    return Blob(sha256, size)


def _check_size(what: str, blob: Blob, most: int, origin: object) -> None:
    if (blob.size or 0) > most:
        raise ModelError(f"{origin}: {what} has {blob.size} bytes; {most} are the most that is read")


def read_json(data: bytes, origin: object, what: str) -> Any:
    """The JSON of a layer. NaN and Infinity are refused. Raises ModelError."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a number")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{origin}: {what} is not JSON: {brief(str(e), 100)}") from e
