"""`$ref` in JSON schemas: which part of the schema it points to. Nothing is ever fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard
from urllib.parse import unquote

from ..errors import RequestError
from ..words import brief


class Pointers:
    """The references of one schema.

    Each gets a short name, "#/$defs/1", under which its target stands in the schema that is made of this one.
    """

    def __init__(self, root: Mapping[str, Any], address: str) -> None:
        """address: what the schema calls itself; a reference may begin with it"""
        self._root = root
        self._address = address
        self._names = {"#": "#"}
        self._pending: list[str] = []
        self._leads_to: dict[str, set[str]] = {}

    def add(self, reference: Any, at: str, same: bool) -> str:
        """The short name of a reference.

        at:   the path of the reference under whose target this one stands
        same: both are about the same value

        Raises RequestError for a reference that points to nothing in this schema.
        """
        path = self.path(reference)
        self.find(path)
        others = self._leads_to.setdefault(at, set())
        if same:
            others.add(path)
        if path not in self._names:
            self._names[path] = f"#/$defs/{len(self._names)}"
            self._pending.append(path)
        return self._names[path]

    def __bool__(self) -> bool:
        """Whether there are references."""
        return bool(self._leads_to)

    def next(self) -> tuple[str, str] | None:
        """Path and key in `$defs` of a target that was not asked for yet; None: all were."""
        if not self._pending:
            return None
        path = self._pending.pop()
        return path, self._names[path].rpartition("/")[2]

    def path(self, reference: Any) -> str:
        """The reference as "#" or "#/...". Raises RequestError for others."""
        if not isinstance(reference, str):
            raise RequestError(f"'$ref' must be a text, not {brief(reference)}")
        rest = reference
        if self._address and reference.startswith(self._address):
            rest = reference.removeprefix(self._address) or "#"
        path = unquote(rest[1:])
        if not rest.startswith("#") or (path and not path.startswith("/")):
            raise RequestError(f"'$ref' {brief(reference)} must begin with #/: nothing is fetched")
        return f"#{path}"

    def find(self, path: str) -> Any:
        """What a path points to. Raises RequestError for nothing."""
        node: Any = self._root
        for part in path.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and name in node:
                node = node[name]
            elif is_list(node) and name.isascii() and name.isdigit() and int(name[:9]) < len(node):
                node = node[int(name)]
            else:
                raise RequestError(f"'$ref' {brief(path)} points to nothing")
        return node

    def check_circles(self) -> None:
        """Raise RequestError if a value is described by a reference that leads back to itself: jsonschema
        would never come to an end."""
        done: set[str] = set()
        for start in self._leads_to:
            path = [start]
            branches = [iter(self._leads_to[start])]
            while path:
                following = next((other for other in branches[-1] if other not in done), None)
                if following is None:
                    done.add(path.pop())
                    branches.pop()
                elif following in path:
                    raise RequestError(f"'$ref' {brief(following)} leads back to itself")
                else:
                    path.append(following)
                    branches.append(iter(self._leads_to.get(following, ())))


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
