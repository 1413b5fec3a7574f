"""Fields of a request's JSON, checked. null counts as absent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..words import brief
from .problems import Refused

_MOST = (1 << 31) - 1
_VIEW = re.compile(r"<memory at \w*>?")  # see `bodies`
_NAMES = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}


def wrong(name: str, wanted: str, value: Any) -> Refused:
    """A field has a value of another kind."""
    shown = _VIEW.sub("text", brief(value))
    return Refused(400, f"{name} must be {wanted}, not {shown}", "invalid_value", name)


def get(body: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of one type. Raises Refused."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise wrong(name, _NAMES[kind], value)
    return value


def text(body: Mapping[str, Any], name: str, default: str = "") -> str:
    """A field that is a string."""
    found: str = get(body, name, str, default)
    return found


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A field that is true or false."""
    found: bool = get(body, name, bool, default)
    return found


def items(body: Mapping[str, Any], name: str) -> list[Any]:
    """A field that is a list, [] without it."""
    found: list[Any] = get(body, name, list, [])
    return found


def number(
    body: Mapping[str, Any], name: str, low: float = -math.inf, high: float = math.inf, where: str = ""
) -> float | None:
    """A field that is a number within bounds."""
    value = body.get(name)
    if value is None:
        return None
    shown = where + name
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(shown, "a number", value)
    if not low <= value <= high:
        raise wrong(shown, f"a number from {low:g} to {high:g}", value)
    return float(value)


def whole(
    body: Mapping[str, Any], name: str, low: int = -_MOST, high: int = _MOST, where: str = ""
) -> int | None:
    """A field that is a whole number; 8192.0 is one."""
    value = body.get(name)
    if value is None:
        return None
    shown = where + name
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise wrong(shown, "a whole number", value)
    if math.isinf(value) or value != int(value):
        raise wrong(shown, "a whole number", value)
    if not low <= value <= high:
        raise wrong(shown, f"a whole number from {low} to {high}", value)
    return int(value)


def stops(value: Any, name: str) -> list[str]:
    """Stop strings: a list, or one. Empty ones say nothing."""
    found = [value] if isinstance(value, str) else value
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise wrong(name, "a string or a list of strings", value)
    return [one for one in found if one]
