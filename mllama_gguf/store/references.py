"""Where a model comes from: `ollama:...` and `hf:...`, checked so that no name can leave a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import ModelError
from ..words import brief

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
# Names of Ollama's own registry: in addresses, and in the stores of newer versions.
HOST_ALIASES = (DEFAULT_HOST, "ollama.com")

# One part of a path: it cannot be "..", hidden, or hold a separator.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}(:[0-9]{1,5})?")
LOOPBACK = re.compile(r"(localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3})(:\d+)?")


@dataclass(frozen=True)
class OllamaRef:
    """A tag in a registry that speaks Ollama's protocol."""

    host: str
    namespace: str
    name: str
    tag: str

    @classmethod
    def parse(cls, words: str) -> OllamaRef:
        """`ollama:[[HOST/]NAMESPACE/]NAME[:TAG]`, with or without the `ollama:`, and with or without
        `https://` before the host. Raises ModelError."""
        name = words.removeprefix("ollama:")
        *before, last = re.sub("^https?://", "", name, flags=re.IGNORECASE).split("/")
        name, _, tag = last.partition(":")
        namespace = before.pop() if before else DEFAULT_NAMESPACE
        host = before.pop() if before else DEFAULT_HOST
        parts = (namespace, name, tag or DEFAULT_TAG)
        if (
            before
            or last.endswith(":")
            or not _HOST.fullmatch(host)
            or not all(_PART.fullmatch(part) for part in parts)
        ):
            raise ModelError(
                f"{brief(words, 200)} is not a model's name; write ollama:[[HOST/]NAMESPACE/]NAME[:TAG]"
            )
        return cls(DEFAULT_HOST if host.lower() in HOST_ALIASES else host, *parts)

    @property
    def key(self) -> str:
        """The same for names that differ only in case, which Ollama ignores."""
        return self.path.lower()

    def __str__(self) -> str:
        short = (self.host, self.namespace) == (DEFAULT_HOST, DEFAULT_NAMESPACE)
        space = "" if short else f"{self.namespace}/"
        host = "" if self.host == DEFAULT_HOST else f"{self.host}/"
        return f"ollama:{host}{space}{self.name}:{self.tag}"

    @property
    def path(self) -> str:
        """The manifest's, under `manifests/` of a store."""
        return f"{self.host}/{self.namespace}/{self.name}/{self.tag}"

    @property
    def url(self) -> str:
        """Address of the repository: https, but http for this machine itself."""
        scheme = "http" if LOOPBACK.fullmatch(self.host) else "https"
        return f"{scheme}://{self.host}/v2/{self.namespace}/{self.name}"


@dataclass(frozen=True)
class HubRef:
    """A file in a model repository of the Hugging Face hub. revision: a branch, a tag or a commit."""

    repo: str  # owner/name
    file: str  # path in the repository
    revision: str = "main"

    @classmethod
    def parse(cls, words: str) -> HubRef:
        """`hf:OWNER/REPO[@REVISION]/FILE`, with or without the `hf:`. Raises ModelError."""
        owner, _, rest = words.removeprefix("hf:").partition("/")
        repo, _, file = rest.partition("/")
        repo, at, revision = repo.partition("@")
        parts = (owner, repo, *file.split("/"), *([revision] if at else []))
        if not all(_PART.fullmatch(part) for part in parts):
            raise ModelError(f"{brief(words, 200)} is not a file's name; write hf:OWNER/REPO[@REVISION]/FILE")
        return cls(f"{owner}/{repo}", str(PurePosixPath(file)), revision if at else "main")

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf:{self.repo}{at}/{self.file}"
