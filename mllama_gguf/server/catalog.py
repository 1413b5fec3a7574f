"""The models that the server offers, by name, and the facts about them that need no loading."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import MllamaError, ModelError, RequestError
from ..gguf.reader import GGUFFile, LongArray, read_gguf
from ..inspect.inventory import is_text_model, names
from ..store.references import DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG
from ..store.resolve import ModelFiles, resolve
from .problems import Refused
from .times import rfc3339

logger = logging.getLogger(__name__)

FRESH_SECONDS = 10.0  # how long the list of models on this machine is believed
LONGEST_NAME = 300  # characters


@dataclass(frozen=True)
class Offer:
    """A model that may be asked for.

    name:      as Ollama writes names, with a tag
    reference: as `store.resolve` takes it; mmproj: the same, for the vision encoder
    """

    name: str
    reference: str
    mmproj: str | None = None


@dataclass(frozen=True)
class Card:
    """The facts about a model that the heads of its files tell."""

    offer: Offer
    files: ModelFiles = field(compare=False)
    digest: str  # 64 hexadecimal digits, another one for every model
    size: int  # bytes
    modified: float  # as time.time counts
    n_parameters: int
    quantization: str
    context_length: int  # tokens that it was trained with
    embedding_length: int
    has_vision: bool
    keys: Mapping[str, Any] = field(compare=False)
    projector_keys: Mapping[str, Any] = field(compare=False)
    heads: tuple[GGUFFile, ...] = field(compare=False)

    @property
    def name(self) -> str:
        return self.offer.name

    @property
    def capabilities(self) -> list[str]:
        return ["completion", "vision"] if self.has_vision else ["completion"]

    @property
    def details(self) -> dict[str, Any]:
        """As Ollama's API has them."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": "mllama",
            "families": ["mllama"],
            "parameter_size": show_count(self.n_parameters),
            "quantization_level": self.quantization,
        }

    @property
    def tag(self) -> dict[str, Any]:
        """A line of /api/tags."""
        return {
            "name": self.name,
            "model": self.name,
            "modified_at": rfc3339(self.modified),
            "size": self.size,
            "digest": self.digest,
            "details": self.details,
            "capabilities": self.capabilities,
        }


def canonical(name: str) -> str:
    """The same for all spellings of a name: without Ollama's own host and namespace, with a tag, in small
    letters."""
    low = name.strip().lower().removeprefix("ollama:")
    low = low.removeprefix("https://").removeprefix("http://")
    low = low.removeprefix(f"{DEFAULT_HOST}/").removeprefix(f"{DEFAULT_NAMESPACE}/")
    return low if ":" in low.rpartition("/")[2] else f"{low}:{DEFAULT_TAG}"


def offer_of(words: str, mmproj: str | None = None) -> Offer:
    """What an option -m offers: MODEL, or NAME=MODEL. Without a name: Ollama's, or else the name of the file.

    Raises RequestError.
    """
    name, equals, reference = words.partition("=")
    if not equals or "/" in name or name.startswith(("ollama:", "hf:")) or Path(words).exists():
        name, reference = "", words
    if equals and not reference:
        raise RequestError(f"-m {words}: expected MODEL or NAME=MODEL")
    return Offer(canonical(name or _name_of(reference)), reference, mmproj)


def _name_of(reference: str) -> str:
    if reference.startswith("ollama:"):
        return reference
    if reference.startswith("hf:") or "/" in reference or reference.lower().endswith(".gguf"):
        stem = reference.rsplit("/", 1)[-1]
        return stem[: -len(".gguf")] if stem.lower().endswith(".gguf") else stem
    return reference


class Catalog:
    """The models that are offered. Safe from several threads; never waits for a computation."""

    def __init__(self, offers: Sequence[Offer] | None) -> None:
        """offers: None: every model on this machine."""
        self._chosen = None if offers is None else tuple(offers)
        self._lock = threading.Lock()
        self._cards: dict[str, Card] = {}
        self._known: dict[tuple[Offer, tuple[Any, ...]], Card] = {}
        self._looked = -FRESH_SECONDS

    @property
    def is_chosen(self) -> bool:
        """Whether it offers what it was given, and nothing else."""
        return self._chosen is not None

    def cards(self) -> list[Card]:
        """All models, those that were changed last first."""
        return sorted(self._look().values(), key=lambda card: (-card.modified, card.name))

    def find(self, name: str) -> Card:
        """The model of a name as a request spells it. Raises Refused."""
        if len(name) > LONGEST_NAME:
            raise Refused(400, f"a model's name of {len(name)} characters", "invalid_model", "model")
        wanted = canonical(name)
        found = self._look().get(wanted) or self._look(again=True).get(wanted)
        if found is None:
            raise Refused(404, f"model '{name}' not found", "model_not_found", "model")
        return found

    def recent(self, name: str) -> Card | None:
        """The model of a name if it was looked for a short time ago. Touches no file, and never waits."""
        if time.monotonic() - self._looked >= FRESH_SECONDS or len(name) > LONGEST_NAME:
            return None
        return self._cards.get(canonical(name))

    def check(self) -> None:
        """Raise ModelError if a chosen model is not there or not usable."""
        seen: dict[str, str] = {}
        for offer in self._chosen or ():
            if offer.name in seen:
                raise RequestError(f"{seen[offer.name]} and {offer.reference} are both called {offer.name}")
            seen[offer.name] = offer.reference
            if not is_text_model(resolve(offer.reference).text):
                raise ModelError(f"{offer.reference}: is not a mllama text model")
            self._card(offer)

    def forget(self) -> None:
        """Look again at the next question. Never waits."""
        self._looked = -FRESH_SECONDS

    def _look(self, again: bool = False) -> dict[str, Card]:
        with self._lock:
            age = time.monotonic() - self._looked
            if age < FRESH_SECONDS and not (again and age > 1):
                return self._cards
            cards: dict[str, Card] = {}
            for offer in self._offers():
                if offer.name in cards:
                    continue
                try:
                    cards[offer.name] = self._card(offer)
                except (MllamaError, OSError) as e:
                    logger.warning("%s is not offered: %s", offer.name, e)
            self._cards, self._looked = cards, time.monotonic()
            return cards

    def _offers(self) -> Iterator[Offer]:
        if self._chosen is not None:
            yield from self._chosen
            return
        for name, place in names():
            try:
                if place == "bundled" or is_text_model(resolve(name).text):
                    yield offer_of(name)
            except MllamaError as e:
                logger.info("%s is not offered: %s", name, e)

    def _card(self, offer: Offer) -> Card:
        files = resolve(offer.reference, offer.mmproj)
        stamps = [path.stat() for path in files.paths]
        key = offer, tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stamps)
        if key not in self._known:
            self._known[key] = read_card(offer, files)
        return replace(self._known[key], files=files)


def read_card(offer: Offer, files: ModelFiles) -> Card:
    """What the heads of a model's files say. Raises ModelError, OSError."""
    heads = tuple(read_gguf(path) for path in files.paths)
    keys = heads[0].keys
    size = sum(head.size for head in heads)
    return Card(
        offer=offer,
        files=files,
        digest=_digest(offer, files, size),
        size=size,
        modified=max(path.stat().st_mtime for path in files.paths),
        n_parameters=sum(tensor.n_values for head in heads for tensor in head.tensors),
        quantization=_quantization(heads[0]),
        context_length=_whole(keys, "mllama.context_length"),
        embedding_length=_whole(keys, "mllama.embedding_length"),
        has_vision=any(head.has_vision for head in heads),
        keys=keys,
        projector_keys=heads[1].keys if len(heads) > 1 else {},
        heads=heads,
    )


def _digest(offer: Offer, files: ModelFiles, size: int) -> str:
    """The manifest's sha256 of a model of Ollama, else one of names and sizes: no two are equal."""
    if files.ollama is not None:
        return files.ollama.digest
    known = [files.sha256.get(path, "") for path in files.paths]
    words = json.dumps([offer.name, [path.name for path in files.paths], known, size])
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def _whole(keys: Mapping[str, Any], name: str) -> int:
    value = keys.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _quantization(head: GGUFFile) -> str:
    """As Ollama names it: the type that most of the text's weights have."""
    import gguf

    try:
        name = gguf.LlamaFileType(_whole(head.keys, "general.file_type")).name
        if "general.file_type" in head.keys:
            return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        pass
    by_type: dict[str, int] = {}
    for tensor in head.tensors:
        if not tensor.name.startswith(("v.", "mm.")):
            by_type[tensor.type_name] = by_type.get(tensor.type_name, 0) + tensor.n_values
    return max(by_type, key=lambda name: by_type[name], default="unknown")


def show_count(n: int) -> str:
    """A number of parameters as Ollama shows it: 10.7B, 5.5M."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= factor:
            return f"{n / factor:.1f}{unit}"
    return str(n)


def plain_keys(keys: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """The keys of a GGUF file as JSON. whole: long arrays too, as far as they were read; else null."""

    def value(found: Any) -> Any:
        if isinstance(found, LongArray):
            return None
        if isinstance(found, list) and len(found) > 5 and not whole:
            return None
        if isinstance(found, float) and (found != found or found in (float("inf"), float("-inf"))):
            return None
        return found

    return {name: value(found) for name, found in keys.items()}
