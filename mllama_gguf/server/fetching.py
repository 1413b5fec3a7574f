"""Images from the web, of hosts that the operator allows and of no others.

A request must not make this machine ask in a private network. So a host's addresses are looked up once, all
of them must be public, and the connection goes to one of these, whatever the name stands for a moment later.
An answer that leads elsewhere is refused.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

import httpx

from ..words import show_name
from .problems import Refused

MAX_BYTES = 10 << 20
SECONDS = 10.0


def fetch(url: str, where: str, hosts: Sequence[str]) -> bytes:
    """The bytes at an address. hosts: those that are allowed, a name alone for https. Raises Refused."""
    target = _checked(url, where, hosts)
    address = _public_address(target.host, target.port or (443 if target.scheme == "https" else 80), where)
    shown = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
    headers = {"Host": target.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
    limit = time.monotonic() + SECONDS
    try:
        with (
            httpx.Client(timeout=SECONDS, follow_redirects=False, trust_env=False) as client,
            client.stream(
                "GET",
                target.copy_with(host=shown.strip("[]")),
                headers=headers,
                extensions={"sni_hostname": target.host},
            ) as answer,
        ):
            if answer.status_code != 200:
                raise _failed(where, target, f"it answers with status {answer.status_code}")
            kind = answer.headers.get("content-type", "").lower()
            if not kind.startswith("image/"):
                raise _failed(where, target, f"it is {show_name(kind or 'of no type', 40)}, not an image")
            data = bytearray()
            for chunk in answer.iter_raw():
                data += chunk
                if len(data) > MAX_BYTES:
                    raise _failed(where, target, f"it has more than {MAX_BYTES} bytes")
                if time.monotonic() > limit:
                    raise _failed(where, target, f"it did not come within {SECONDS:g} s")
            return bytes(data)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as e:
        raise _failed(where, target, f"it cannot be fetched ({type(e).__name__})") from None


def is_allowed(url: str, hosts: Sequence[str]) -> bool:
    """Whether the host of an address is one of those."""
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        return False
    allowed = {one.lower() if "://" in one else f"https://{one.lower()}" for one in hosts}
    return f"{target.scheme}://{target.netloc.decode('ascii', 'replace').lower()}" in allowed


def _checked(url: str, where: str, hosts: Sequence[str]) -> httpx.URL:
    if "\\" in url or not url.isprintable() or url != url.strip() or not is_allowed(url, hosts):
        raise Refused(
            400,
            f"{where}: images are fetched only from hosts of --allow-image-host; send base64",
            "invalid_image_url",
            where,
        )
    target = httpx.URL(url)
    if target.userinfo:
        raise Refused(400, f"{where}: an address with a user's name is refused", "invalid_image_url", where)
    return target


def _public_address(host: str, port: int, where: str) -> IPv4Address | IPv6Address:
    """An address of a host, all of whose addresses are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise Refused(400, f"{where}: there is no host {show_name(host, 80)}", "invalid_image_url") from None
    addresses = [ip_address(str(one[4][0]).partition("%")[0]) for one in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused(400, f"{where}: {show_name(host, 80)} is in a private network", "invalid_image_url")
    return addresses[0]


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to the public internet."""
    inner = address.ipv4_mapped or address.sixtofour if isinstance(address, IPv6Address) else None
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)


def _failed(where: str, target: httpx.URL, words: str) -> Refused:
    return Refused(400, f"{where}: {show_name(target.host, 80)}: {words}", "invalid_image_url", where)
