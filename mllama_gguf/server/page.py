"""The page for people: static files, served as they are."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .problems import Refused

FOLDER = Path(__file__).parent / "static"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def index() -> Response:
    """The page itself."""
    return file("index.html")


def file(name: str) -> Response:
    """A file of the page. Raises Refused for another name: no part of a request becomes a path."""
    for path in FOLDER.iterdir():
        if path.name == name and path.suffix in KINDS:
            return Response(path.read_bytes(), media_type=KINDS[path.suffix], headers=HEADERS)
    raise Refused(404, "there is no such file")


def routes() -> list[Route]:
    """The page is at /ui, its other files beside it."""

    async def ui(request: Request) -> Response:
        return index()

    async def part(request: Request) -> Response:
        return file(request.path_params["name"])

    return [
        Route("/ui", ui, methods=["GET"]),
        Route("/ui/{name}", part, methods=["GET"]),
    ]
