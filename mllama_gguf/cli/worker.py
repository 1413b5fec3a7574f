"""`mllama worker`: this machine's devices for others."""

from __future__ import annotations

import click

from ..settings import DEFAULTS, Precision
from .options import comma_list, setting_option
from .terminal import echo
from .verbose import verbose_option


@click.command(
    "worker",
    epilog="\b\nExamples:\n"
    "  mllama worker\n"
    "  mllama worker --host 192.168.1.5 --device CUDA0 --cache\n"
    "  mllama caption photo.jpg --rpc 192.168.1.5:50052 -ngl -1",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="IPv4 address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=50052, show_default=True, help="Port.")
@click.option(
    "--device",
    "devices",
    metavar="NAME,...",
    callback=comma_list,
    help="Devices to serve, named as in `mllama devices`.  [default: the GPUs, else the CPU]",
)
@setting_option("n_threads", default="all usable CPUs")
@click.option("--cache", is_flag=True, help="Keep large weights on disk for the next client.")
@setting_option("precision")
@verbose_option
def worker_command(
    host: str,
    port: int,
    devices: list[str] | None,
    n_threads: int | None,
    cache: bool,
    precision: Precision | None,
) -> None:
    """Serve this machine's devices over ggml's RPC protocol, until Ctrl-C.

    One client at a time. The protocol has no authentication and no encryption.
    """
    from platformdirs import user_cache_path

    from ..backend.rpc import find_address, is_loopback, serve
    from ..cpus import usable_cpus
    from .log import show_native_warnings

    show_native_warnings()

    address = find_address(host)
    if not is_loopback(address):
        echo(
            f"Warning: {address} is not loopback, and the protocol has no authentication: whoever reaches "
            "the port can use this process. Never open it to a network that you do not trust.",
            err=True,
        )
    serve(
        address,
        port,
        names=devices,
        n_threads=n_threads or usable_cpus(),
        cache_dir=user_cache_path("mllama_gguf") / "rpc" if cache else None,
        precision=precision or DEFAULTS["precision"],
    )
