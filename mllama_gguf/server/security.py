"""Who may ask: the name that the request gives this server, the web page that it comes from, the key.

One layer before all routes, so that no route can be without it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from fnmatch import fnmatchcase
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import Refused
from .replies import error_reply
from .settings import ServerSettings

# Pages that may ask without being named: those of this machine, of desktop programs, of extensions.
_LOCAL_PAGES = ("localhost", "127.0.0.1", "0.0.0.0", "[::1]")
_PROGRAMS = ("app", "file", "tauri", "vscode-webview", "vscode-file")
_EXTENSIONS = ("chrome-extension", "moz-extension", "safari-web-extension")
_LOCAL_NAMES = (".localhost", ".local", ".internal")
_HEADERS = "authorization,content-type,user-agent,accept,x-requested-with,openai-beta"
# What needs no key: whether the server is alive, and the page, which asks for the key.
_OPEN = re.compile(r"/|/health|/v1/health|/ui(/[\w.-]*)?")
_MAX_TARGET = 4096  # characters of a path with its query


class Security:
    """Lets through what may pass. Everything else is answered here."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._own_names = {"", "localhost", socket.gethostname().lower(), *map(str.lower, settings.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        try:
            origin = self._check(scope)
        except Refused as e:
            asking = _header(scope, b"origin")
            if e.status == 401 and asking:  # a page that may ask is to see that it lacks the key
                e.headers = {**e.headers, "Access-Control-Allow-Origin": asking, "Vary": "Origin"}
            await error_reply(scope["path"], e)(scope, receive, send)
            return
        if origin is None:
            await self._app(scope, receive, send)
            return
        allowed = [
            (b"access-control-allow-origin", origin.encode("latin-1", "replace")),
            (b"vary", b"Origin"),
        ]
        if scope["method"] == "OPTIONS":
            asked = _header(scope, b"access-control-request-headers")
            extra = [
                name.strip() for name in asked.lower().split(",") if name.strip().startswith("x-stainless-")
            ]
            names = ",".join([_HEADERS, *extra]).encode("latin-1", "replace")
            headers = [
                *allowed,
                (b"access-control-allow-methods", b"GET,HEAD,POST,DELETE"),
                (b"access-control-allow-headers", names),
                (b"access-control-max-age", b"43200"),
            ]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *allowed]}
            await send(message)

        await self._app(scope, receive, send_allowed)

    def _check(self, scope: Scope) -> str | None:
        """The origin that may read the answer, None: none. Sets scope["client_name"]. Raises Refused."""
        settings = self._settings
        if len(scope["path"]) + len(scope.get("query_string", b"")) > _MAX_TARGET:
            raise Refused(414, "the address is too long")
        host = _header(scope, b"host")
        if (settings.is_local or not settings.keys) and not self._is_own_name(host):
            raise Refused(
                403, f"{host[:100]!r} is not a name of this server; mllama serve --allow-host NAME allows one"
            )
        origin = _header(scope, b"origin") or None
        if origin is not None and not self.allows_origin(origin, host):
            raise Refused(
                403, f"pages of {origin[:100]!r} may not ask; OLLAMA_ORIGINS or --allow-origin allows them"
            )
        if origin is None and _header(scope, b"sec-fetch-site").lower() == "cross-site":
            visits = _header(scope, b"sec-fetch-mode").lower() == "navigate"
            if not (visits and scope["method"] == "GET" and _OPEN.fullmatch(scope["path"])):
                raise Refused(403, "a page of another site is refused")
        peer = (scope.get("client") or ("",))[0]
        scope["client_name"] = peer
        is_open = scope["method"] in ("GET", "HEAD") and _OPEN.fullmatch(scope["path"])
        if settings.keys and scope["method"] != "OPTIONS" and not is_open:
            scheme, _, key = _header(scope, b"authorization").partition(" ")
            owner = settings.owner_of(key.strip() if scheme.lower() == "bearer" else None)
            owner = owner or settings.owner_of(_header(scope, b"x-api-key") or None)
            if owner is None:
                raise Refused(
                    401,
                    "a key is needed: Authorization: Bearer KEY",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            scope["client_name"] = f"{owner}@{peer}"
        return origin

    def _is_own_name(self, host: str) -> bool:
        """Whether a Host header names this machine. Else a page could let its own name point here."""
        name = _host_name(host)
        if name is None:
            return False
        if name in self._own_names or name.endswith(_LOCAL_NAMES):
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        # Nobody can let an address point elsewhere; beyond this machine each of its own is fine.
        return (
            address.is_loopback or address.is_private or address.is_unspecified or not self._settings.is_local
        )

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may ask. host: the name that the request gives this server."""
        try:
            parts = urlsplit(origin)
            port = parts.port
        except ValueError:
            return False
        scheme, name = parts.scheme.lower(), (parts.hostname or "").lower()
        if scheme in _PROGRAMS or scheme in _EXTENSIONS:
            return True
        if _matches(origin, self._settings.origins):
            return True
        if scheme not in ("http", "https") or not name or parts.path or parts.query or parts.fragment:
            return False
        shown = f"[{name}]" if ":" in name else name
        if shown in _LOCAL_PAGES:
            return True
        # The page that this server shows, whatever it is called: its name was checked, or a key is asked for.
        return host.lower() == (shown if port is None else f"{shown}:{port}")


def _matches(origin: str, allowed: Iterable[str]) -> bool:
    """Whether an origin is one of some, in which a * stands for anything."""
    low = origin.lower()
    for one in allowed:
        pattern = one.lower().replace("[", "[[]")
        patterns = (
            (pattern,) if "://" in pattern or pattern == "*" else (f"http://{pattern}", f"https://{pattern}")
        )
        if any(fnmatchcase(low, one) for one in patterns):
            return True
    return False


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is not such a header."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]*)(:\d{1,5})?", host)
    return None if match is None else match[1].strip("[]").rstrip(".").lower()


def _header(scope: Scope, name: bytes) -> str:
    """The value of a header; two of them with different values are as wrong as a foreign one."""
    values = {value for key, value in scope["headers"] if key == name}
    return ", ".join(sorted(value.decode("latin-1") for value in values))
