"""A server's life: it listens, serves, and ends in good order."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from ..errors import MllamaError
from ..words import os_reason
from .connections import BACKLOG, Connection, most_connections
from .service import Service
from .settings import ServerSettings

HEADER_BYTES = 64 << 10
LAST_WORDS = 2  # seconds for answers to be sent after the engine has ended
KEEP_CONNECTION = 75  # seconds that a connection without requests stays
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens at the address. Raises MllamaError if that cannot be."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only of a socket that names its protocol asyncio turns off Nagle's algorithm, which costs 40 ms a reply.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host, settings.port))
        made.listen(512)
        made.setblocking(False)
        return made
    except OSError as e:
        made.close()
        where = f"{settings.host}:{settings.port}"
        if e.errno in (48, 98):  # in use: macOS, Linux
            raise MllamaError(
                f"{where}: another program listens there already (Ollama?); end it, or give --port N"
            ) from e
        raise MllamaError(f"{where}: cannot listen there: {os_reason(e)}") from e


# How long a thread of Python waits for another one. The default of 5 ms is the time of many tokens of a small
# model, which would wait while requests are read.
SWITCH_SECONDS = 0.0005


class Server(uvicorn.Server):
    """uvicorn's server, whose end is ours: waiting requests are refused, running ones get their time."""

    def __init__(self, service: Service, app: ASGIApp, ready: Callable[[], None]) -> None:
        """ready: called once it answers."""
        self._service = service
        self._ready = ready
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                http=Connection,
                backlog=BACKLOG,
                ws="none",
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=KEEP_CONNECTION,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at the end; ours is an end like any other."""
        if threading.current_thread() is not threading.main_thread():
            yield  # of a test
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # it ends anyway, and in good order

    def end(self) -> None:
        """End in good order; the second time immediately."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        engine = self._service.engine
        engine.stop()
        grace = asyncio.get_running_loop().time() + self._service.settings.grace
        while engine.is_alive:
            if self.force_exit or asyncio.get_running_loop().time() > grace:
                engine.stop_now()
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def serve(service: Service, app: ASGIApp, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends it immediately. ready: called once it answers."""
    sys.setswitchinterval(SWITCH_SECONDS)
    Connection.most = most_connections()
    service.engine.start()
    try:
        asyncio.run(Server(service, app, ready).serve([listener]))
    finally:
        service.engine.stop()
        service.engine.stop_now()
        service.engine.join()
