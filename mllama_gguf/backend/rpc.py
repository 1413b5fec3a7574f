"""An RPC worker: this machine's devices for Mllama objects elsewhere, served by ggml's RPC backend."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from ..cpus import check_threads
from ..errors import BackendError, RequestError
from ..settings import Precision
from ..words import os_reason
from .library import load
from .local import choose_precision, device_index, devices

PROBE_SECONDS = 2.0
_HELLO = 14  # RPC_CMD_HELLO; its number and the first bytes of the answer are the same in all versions
_CAPS_BYTES = 24


def default_devices() -> list[str]:
    """The GPUs, or the CPU where there is none."""
    known = devices()
    gpus = [device.name for device in known if device.type in ("gpu", "igpu")]
    return gpus or [device.name for device in known if device.type == "cpu"]


def find_address(host: str) -> str:
    """The IPv4 address of a host name. Raises RequestError."""
    try:
        return socket.gethostbyname(host)
    except OSError as e:
        raise RequestError(f"host {host!r}: {os_reason(e)}; give an IPv4 address of this machine") from e


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    return ip_address(address).is_loopback


def serve(
    address: str,
    port: int,
    *,
    names: Sequence[str] | None = None,
    n_threads: int = 1,
    cache_dir: Path | None = None,
    precision: Precision = "fast",
) -> None:
    """Serve devices at an IPv4 address, to one client after the other, until the process ends.

    names:     of the devices; None: `default_devices`
    n_threads: for the CPU
    cache_dir: where weights of more than 10 MiB are kept for the next client; None: nowhere
    precision: of the GPUs, as of `Mllama`

    Never returns: raises BackendError if it cannot start, RequestError for a wrong device, and
    KeyboardInterrupt.
    """
    check_threads(n_threads)
    native = load()
    choose_precision(precision)
    indices = [device_index(name) for name in (default_devices() if names is None else names)]
    try:
        with socket.socket() as trial:  # for words that say why not
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((address, port))
    except OSError as e:
        raise BackendError(f"{address}:{port}: cannot listen there: {os_reason(e)}") from e
    if cache_dir is not None:
        cache_dir.mkdir(parents=True, exist_ok=True)
    failed: list[Exception] = []

    def run() -> None:
        status = native.lib.mllama_rpc_serve(
            f"{address}:{port}".encode(),
            native.ffi.NULL if cache_dir is None else os.fsencode(cache_dir),
            n_threads,
            len(indices),
            indices,
        )
        failed.append(native.error(status))

    # In a thread, so that Ctrl-C works.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    raise failed[0]


def probe(worker: str) -> str:
    """What is wrong with a worker, in a few words; "" if it answers."""
    host, _, port = worker.rpartition(":")
    request = bytes([_HELLO]) + _CAPS_BYTES.to_bytes(8, "little") + bytes(_CAPS_BYTES)
    try:
        with socket.create_connection((host, int(port)), PROBE_SECONDS) as connection:
            connection.settimeout(PROBE_SECONDS)
            connection.sendall(request)
            return "" if connection.recv(1) else "hangs up"
    except TimeoutError:
        return "does not answer"
    except ConnectionRefusedError:
        return "refuses the connection"
    except OSError as e:
        return os_reason(e)
