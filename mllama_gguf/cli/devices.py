"""`mllama devices`: what can compute."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..words import show_size
from .options import setting_option
from .seen_devices import remember
from .terminal import echo, echo_json
from .verbose import verbose_option


@click.command("devices", epilog="\b\nExamples:\n  mllama devices\n  mllama devices --json")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each device, one a line.")
@setting_option("rpc_servers", help="List the devices of these workers too.")
@verbose_option
def devices_command(as_json: bool, rpc_servers: tuple[str, ...] | None) -> None:
    """List the devices of the installed ggml, which is llama-cpp-python's.

    The names are those that --device and --vision-device take. Each device is started once. One that cannot
    be used is listed with the reason, and nothing is offloaded to it.

    The line after the CPU says what computes each part there, and how fast the other instruction sets are
    beside the fastest one.
    """
    from ..backend.isolated import remote_devices
    from ..backend.kernels import describe
    from ..backend.local import devices
    from .log import show_native_warnings

    show_native_warnings()

    names = []
    for device in remote_devices(rpc_servers) if rpc_servers else devices(start=True):
        names += [device.name] if device.error is None else []
        kernel = describe() if device.type == "cpu" else None
        if as_json:
            echo_json(asdict(device) | ({"kernel": kernel.facts()} if kernel else {}))
        else:
            state = f"{show_size(device.memory_free)} of {show_size(device.memory_total)} free"
            if device.error is not None:
                state = f"cannot be used: {device.error}"
            echo(f"{device.name:10}  {device.type:5}  {device.description}, {state}")
            if kernel:
                echo(f"{'':10}  {'':5}  kernel {kernel.in_words()}")
    remember(names)
