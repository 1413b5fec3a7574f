"""What a report may show to everybody: neither keys nor the names of user, machine and home directory."""

from __future__ import annotations

import getpass
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

# Of a variable whose value nobody else may know. PASS: not PASSED or BYPASS.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^\s/@]+@")  # of an address
# Names that say nothing about a person or a machine, and that other words of a report may be.
_COMMON = frozenset(
    (
        *("root", "user", "admin", "dev", "pi", "runner", "vagrant", "nvidia", "jetson", "ollama", "python"),
        *("linux", "debian", "ubuntu", "fedora", "localhost"),
    )
)


def home_folders() -> list[str]:
    """The home directory, of $HOME and of the system's list of users, also with its links followed; the
    longest first."""
    found = {os.path.expanduser("~")}
    with suppress(KeyError, ImportError):  # a user without a name, as in a container
        import pwd

        found.add(pwd.getpwuid(os.getuid()).pw_dir)
    found |= {os.path.realpath(path) for path in found if os.path.isabs(path)}
    return sorted((path.rstrip("/") for path in found if path.startswith("/")), key=len, reverse=True)


def own_names() -> dict[str, str]:
    """The names of the user and of the machine, and what stands for them."""
    found = {}
    with suppress(KeyError, OSError):  # a user without a name
        found[getpass.getuser()] = "USER"  # of the environment
    with suppress(KeyError, ImportError):
        import pwd

        found[pwd.getpwuid(os.getuid()).pw_name] = "USER"
    host = socket.gethostname()
    for name in (host, host.partition(".")[0]):
        found.setdefault(name, "HOST")
    return {name: words for name, words in found.items() if name and name.lower() not in _COMMON}


def private(words: str) -> str:
    """Words without the home directory, which becomes `~`, and without the names of user and machine."""
    words = _LOGIN.sub("...@", words)
    for path in home_folders():
        if path:
            words = re.sub(re.escape(path) + r"(?=$|[/\s'\":,;)\]}])", "~", words)
    for name, instead in sorted(own_names().items(), key=lambda item: -len(item[0])):
        pattern = rf"(?<![^\W_]){re.escape(name)}(?![^\W_])"
        if len(name) < 3:  # it is part of many words, and counts only as a folder's or a file's name
            pattern = rf"(?<=/){re.escape(name)}(?=$|[/\s'\":,;)])"
        # The machine's as it is written: h100 is no H100.
        words = re.sub(pattern, instead, words, flags=re.IGNORECASE if instead == "USER" else 0)
    return words


def private_value(value: Any) -> Any:
    """The same for every text in a value of JSON."""
    if isinstance(value, str):
        return private(value)
    if isinstance(value, Mapping):
        return {private(str(name)): private_value(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [private_value(one) for one in value]
    return value


def variable(name: str, value: str) -> str:
    """The value of a variable of the environment; of a key only that it is set."""
    return "(set)" if value and _SECRET.search(name) else private(value)


class _Private(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = private(record.getMessage()), None
        if record.exc_info:
            record.exc_text = private(logging.Formatter().formatException(record.exc_info))
        return True


@contextmanager
def private_log() -> Iterator[None]:
    """In the block, the same is taken out of the messages and tracebacks of the log."""
    handlers = [handler for handler in (*logging.getLogger().handlers, logging.lastResort) if handler]
    log_filter = _Private()
    for handler in handlers:
        handler.addFilter(log_filter)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(log_filter)
