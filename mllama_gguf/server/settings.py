"""What the server itself is told: where to listen, who may ask, how much, how long."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from ..errors import RequestError
from ..reading import read_text
from ..settings import MAX_PARALLEL
from ..words import one_line, os_reason
from .images import ImageLimits
from .times import parse_duration

PORT = 11434
VERSION = "0.24.0"  # of Ollama, the last that ran this model; programs ask for it
KEEP_ALIVE = 300.0  # seconds


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server.

    keys:        sha256 of each key; (): none is asked for
    origins:     web pages that may ask beside those of this machine, as OLLAMA_ORIGINS names them
    hosts:       names of this server, beside its addresses
    keep_alive:  seconds that a model stays loaded; inf: for ever
    max_queue:   waiting requests
    max_models:  loaded at the same time
    parallel:    requests of a model that are computed together; None: as `models.need_of` says
    max_body:    bytes of a request
    max_waiting: bytes of the images and texts of all waiting requests
    body_seconds: the longest pause inside a request that arrives
    time_limit:  seconds of a request, 0: none
    ping:        seconds after which a waiting client gets a sign of life
    grace:       seconds for running replies at the end
    memory:      bytes of this machine that models may take; None: nearly all
    """

    host: str = "127.0.0.1"
    port: int = PORT
    keys: tuple[bytes, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    keep_alive: float = KEEP_ALIVE
    max_queue: int = 512
    max_models: int = 3
    parallel: int | None = None
    max_body: int = 64 << 20
    max_waiting: int = 1 << 30
    body_seconds: float = 30.0
    time_limit: float = 0.0
    ping: float = 15.0
    grace: float = 10.0
    memory: int | None = None
    version: str = VERSION
    allow_pull: bool = False
    allow_gbnf: bool = False
    images: ImageLimits = field(default_factory=ImageLimits)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    def owner_of(self, key: str | None) -> str | None:
        """A short name of whoever has this key; None: it is not a key. All wrong ones take the same time."""
        found = None
        given = digest_of(key or "")
        for known in self.keys:
            if hmac.compare_digest(given, known):
                found = known.hex()[:12]
        return found


def digest_of(key: str) -> bytes:
    """The sha256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def check_key(key: str, where: str) -> str:
    """The key, if a header can carry it as it is. where: for the error, which must not show it. Raises
    RequestError."""
    if not key or not key.isascii() or not key.isprintable():
        raise RequestError(f"{where}: a key has one or more printable characters of ASCII")
    return key


def is_loopback(host: str) -> bool:
    """Whether a host to listen on is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: str) -> tuple[bytes, ...]:
    """The keys in a file, one a line; empty lines and those that begin with # count nothing.

    Raises RequestError.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as e:
        raise RequestError(f"{path}: the keys cannot be read: {os_reason(e)}") from e
    except UnicodeDecodeError as e:
        raise RequestError(f"{path}: the file of keys is not UTF-8") from e
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise RequestError(f"{path}: there is no key in it")
    return tuple(digest_of(check_key(key, path)) for key in keys)


def parse_host(words: str) -> tuple[str, int | None]:
    """(host, port) of OLLAMA_HOST: HOST, HOST:PORT, :PORT, http://HOST:PORT or [::1]:PORT.

    Raises RequestError.
    """
    text = re.sub(r"^(https?)://", "", words.strip().strip("'\""), flags=re.IGNORECASE).partition("/")[0]
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]*)(?::(\d{1,5}))?", text)
    if match:
        host, port = match[1].strip("[]"), match[2]
    elif re.fullmatch(r"[0-9A-Fa-f:.]+", text):
        host, port = text, None  # an IPv6 address alone
    else:
        raise RequestError(f"OLLAMA_HOST: {one_line(repr(words))} is no host; write HOST:PORT")
    if port is not None and not 0 <= int(port) <= 65535:
        raise RequestError(f"OLLAMA_HOST: {port} is not a port")
    return host or "127.0.0.1", None if port is None else int(port)


def from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """What Ollama's variables say, by the names of `ServerSettings`; and n_ctx. Raises RequestError."""
    found: dict[str, object] = {}
    if words := environment.get("OLLAMA_HOST", "").strip():
        found["host"], port = parse_host(words)
        found |= {} if port is None else {"port": port}
    if words := environment.get("OLLAMA_ORIGINS", "").strip():
        found["origins"] = tuple(one.strip() for one in words.split(",") if one.strip())
    if words := environment.get("OLLAMA_KEEP_ALIVE", "").strip():
        found["keep_alive"] = duration_of("OLLAMA_KEEP_ALIVE", words)
    for variable, name, least in (
        ("OLLAMA_MAX_QUEUE", "max_queue", 1),
        ("OLLAMA_MAX_LOADED_MODELS", "max_models", 0),
        ("OLLAMA_NUM_PARALLEL", "parallel", 0),
        ("OLLAMA_CONTEXT_LENGTH", "n_ctx", 0),
    ):
        if words := environment.get(variable, "").strip():
            most = MAX_PARALLEL if name == "parallel" else (1 << 31) - 1
            if not words.isascii() or not words.isdecimal() or not least <= int(words[:20]) <= most:
                raise RequestError(
                    f"{variable}: {one_line(repr(words))} is not a number from {least} to {most}"
                )
            if int(words):
                found[name] = int(words)
    return found


def duration_of(what: str, words: str) -> float:
    """Seconds of a duration; below 0: for ever. what: the option or variable. Raises RequestError."""
    try:
        return parse_duration(words)
    except ValueError as e:
        raise RequestError(f"{what}: {e}") from None


def check_reach(settings: ServerSettings, no_auth: bool) -> None:
    """Raise RequestError for a server that others reach and that asks for no key."""
    if not settings.is_local and not settings.keys and not no_auth:
        raise RequestError(
            f"--host {settings.host} (or OLLAMA_HOST) lets other machines in; give --api-key-file FILE, "
            "--api-key KEY, or --no-auth if everybody who reaches it may use it"
        )


def show_address(host: str, port: int) -> str:
    """The address as one types it into a browser."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
