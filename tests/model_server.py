"""A web server on 127.0.0.1 that speaks Ollama's protocol and the hub's, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "beef"


@dataclass
class ModelServer:
    """What it serves and how it behaves. Everything may be changed between requests."""

    address: str = ""
    manifests: dict[str, bytes] = field(default_factory=dict)  # "library/name/tag"
    blobs: dict[str, bytes] = field(default_factory=dict)  # by sha256; the bytes may be others
    hub_files: dict[str, bytes] = field(default_factory=dict)  # "owner/repo/file"
    hub_sha256: dict[str, str] = field(default_factory=dict)  # what the hub claims, if not the truth
    drop_after: list[int] = field(default_factory=list)  # bytes, of the next replies with a body
    refuse: list[int] = field(default_factory=list)  # statuses of the next requests
    always: int | None = None  # status of every request
    error_code: str | None = None  # the hub's X-Error-Code beside a refusal
    ranges: bool = True
    redirect_to: str | None = None  # scheme and address of another server for blobs
    redirect_bytes: int = 0  # that a redirect promises and does not send
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    authorizations: list[str | None] = field(default_factory=list)
    encodings: set[str | None] = field(default_factory=set)  # that were asked for
    gate: threading.Event | None = None  # bodies wait for it

    def add_model(self, name: str, *parts: tuple[str, bytes], config: bytes | None = None) -> list[str]:
        """A tag `library/NAME/TAG` of (kind, bytes) layers, and its config; the digests of the layers."""
        digests = [self.add_blob(data) for _, data in parts]
        layers = [
            {
                "mediaType": f"application/vnd.ollama.image.{kind}",
                "digest": f"sha256:{digest}",
                "size": len(data),
            }
            for (kind, data), digest in zip(parts, digests, strict=True)
        ]
        manifest: dict[str, object] = {"schemaVersion": 2, "layers": layers}
        if config is not None:
            manifest["config"] = {"digest": f"sha256:{self.add_blob(config)}", "size": len(config)}
        self.manifests[name] = json.dumps(manifest).encode()
        return digests

    def add_blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def gets(self, part: str) -> list[str | None]:
        """The ranges of the GET requests for a path with that in it."""
        return [asked for method, path, asked in self.requests if method == "GET" and part in path]


@contextmanager
def serve() -> Iterator[ModelServer]:
    """A running server."""
    server = ModelServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = urlsplit(self.path).path
            server.requests.append((self.command, path, self.headers.get("Range")))
            server.authorizations.append(self.headers.get("Authorization"))
            server.encodings.add(self.headers.get("Accept-Encoding"))
            status = server.always or (server.refuse.pop(0) if server.refuse else None)
            if status:
                self.refuse(status)
            elif found := re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", path):
                self.send(server.manifests.get(f"{found[1]}/{found[2]}"))
            elif found := re.fullmatch(r"/v2/.+/blobs/sha256:([0-9a-f]{64})", path):
                if server.redirect_to:
                    self.send_response(307)
                    self.send_header("Location", f"{server.redirect_to}{path}")
                    self.send_header("Content-Length", str(server.redirect_bytes))
                    self.end_headers()
                else:
                    self.send(server.blobs.get(found[1]))
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                name = f"{found[1]}/{found[2]}"
                data = server.hub_files.get(name)
                if data is None:
                    server.error_code = "EntryNotFound"
                    self.refuse(404)
                    return
                digest = server.hub_sha256.get(name, hashlib.sha256(data).hexdigest())
                self.send(
                    data,
                    {
                        "ETag": f'"{digest}"',
                        "X-Repo-Commit": COMMIT,
                        "X-Linked-Size": str(len(data)),
                        "X-Linked-Etag": f'"{digest}"',
                    },
                )
            else:
                self.refuse(404)

        def refuse(self, status: int) -> None:
            self.send_response(status)
            if server.error_code:
                self.send_header("X-Error-Code", server.error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, data: bytes | None, headers: dict[str, str] | None = None) -> None:
            if data is None:
                self.refuse(404)
                return
            start = 0
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked and server.ranges:
                start = int(asked[1])
                if start >= len(data):
                    self.refuse(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            body = data[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if server.gate:
                server.gate.wait(30)
            if server.drop_after:
                self.wfile.write(body[: server.drop_after.pop(0)])
                self.close_connection = True
                return
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may hang up
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    http = Server(("127.0.0.1", 0), Handler)
    server.address = f"127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
