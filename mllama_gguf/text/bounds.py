"""Numbers in JSON schemas, written so that llguidance and jsonschema agree about every reply.

llguidance compares decimal digits, jsonschema the floating-point numbers that Python reads. They agree if a
bound has at most 15 digits, and every number between the bounds is small enough to be exact.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any

from ..errors import RequestError

MAX_WHOLE = 2**53 - 1  # every JSON reader holds integers up to here
MAX_NUMBER = 10**15
MAX_MULTIPLE = 1000

_DIGITS = 15
_SMALLEST = Decimal(1).scaleb(-_DIGITS)
_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def bounds(schema: Mapping[str, Any], types: Sequence[str] | None) -> dict[str, Any]:
    """`minimum`, `maximum` and `multipleOf` of a schema, in place of its five keywords about numbers.

    types: what the schema allows, None: everything

    Integers get bounds in any case: without them a reply may be digits for ever. The bounds are never wider
    than asked, and narrower by less than one part in 10^14. Raises RequestError for what cannot be obeyed.
    """
    given = {name: schema[name] for name in _KEYWORDS if name in schema}
    for name, value in given.items():
        if isinstance(value, bool) and name.startswith("exclusive"):
            continue
        _check(name, value)
    if types is not None and "integer" not in types and "number" not in types:
        return {}
    if types is not None and "integer" in types and "number" not in types:
        return _whole(given)
    return _decimal(given) if given else {}


def exact(value: int | float) -> int | float:
    """A number of `const` or `enum`. Raises RequestError for one that has no exact short decimal form."""
    _check("a value", value)
    if abs(value) <= MAX_WHOLE and value == int(value):
        return int(value)
    if abs(value) < MAX_WHOLE:
        digits = Decimal(repr(float(value)))
        if len(digits.as_tuple().digits) <= _DIGITS and digits == digits.quantize(
            _SMALLEST, context=_exactly()
        ):
            return float(value)
    raise RequestError(f"{value!r} cannot be obeyed: {_DIGITS} digits are exact")


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"'{name}' must be a number, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"'{name}' is {value}, which is not a number of JSON")
    if abs(value) > sys.float_info.max:
        raise RequestError(f"'{name}' is larger than any number that Python reads from JSON as a float")


def _sides(given: Mapping[str, Any]) -> tuple[list[tuple[Any, bool]], list[tuple[Any, bool]]]:
    """The lower and the upper bounds; the flag says that the bound itself is out."""
    sides: list[list[tuple[Any, bool]]] = []
    for inner, outer in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        out = given.get(outer)
        found = [(given[inner], out is True)] if inner in given else []
        if out is not None and not isinstance(out, bool):
            found.append((out, True))
        sides.append(found)
    return sides[0], sides[1]


def _whole(given: Mapping[str, Any]) -> dict[str, Any]:
    lower, upper = _sides(given)
    low = max([math.floor(x) + 1 if out else math.ceil(x) for x, out in lower], default=-MAX_WHOLE)
    high = min([math.ceil(x) - 1 if out else math.floor(x) for x, out in upper], default=MAX_WHOLE)
    if low > MAX_WHOLE or high < -MAX_WHOLE:
        raise RequestError(f"integers beyond {MAX_WHOLE} cannot be obeyed")
    found: dict[str, Any] = {"minimum": max(low, -MAX_WHOLE), "maximum": min(high, MAX_WHOLE)}
    if "multipleOf" in given:
        step = _step(given["multipleOf"]).numerator
        _check_step(step)
        found["multipleOf"] = step
    return found


def _decimal(given: Mapping[str, Any]) -> dict[str, Any]:
    lower, upper = _sides(given)
    low = max([_inward(x, out) for x, out in lower], default=Decimal(-MAX_NUMBER))
    high = min([-_inward(-x, out) for x, out in upper], default=Decimal(MAX_NUMBER))
    if low > MAX_NUMBER or high < -MAX_NUMBER:
        raise RequestError(f"bounds beyond {MAX_NUMBER} cannot be obeyed")
    low, high = max(low, Decimal(-MAX_NUMBER)), min(high, Decimal(MAX_NUMBER))
    found: dict[str, Any] = {"minimum": _plain(low), "maximum": _plain(high)}
    if "multipleOf" in given:
        step = _step(given["multipleOf"])
        _check_step(step * step.denominator)
        if step.denominator > 8:
            raise RequestError(f"'multipleOf' {given['multipleOf']} cannot be obeyed: 1/8 is the finest step")
        found["multipleOf"] = _plain(Decimal(step.numerator) / step.denominator)
    return found


def _inward(bound: int | float, out: bool) -> Decimal:
    """The least short decimal that is allowed by a lower bound.

    A decimal from the shortest form of a float upwards is read as that float or a larger one.
    """
    if abs(bound) > 2 * MAX_NUMBER:  # compared with MAX_NUMBER only
        return Decimal(2 * MAX_NUMBER if bound > 0 else -2 * MAX_NUMBER)
    asked = Decimal(bound) if isinstance(bound, int) else Decimal(repr(bound))
    upwards = Context(prec=_DIGITS, rounding=ROUND_CEILING)
    found = upwards.plus(asked)
    if out and found == asked:
        found = upwards.next_plus(found)
    return found.quantize(_SMALLEST, rounding=ROUND_CEILING, context=_exactly())


def _exactly() -> Context:
    return Context(prec=60, rounding=ROUND_FLOOR)


def _plain(number: Decimal) -> int | float:
    return int(number) if number == int(number) else float(number)


def _step(step: int | float) -> Fraction:
    if step <= 0:
        raise RequestError(f"'multipleOf' must be above 0, not {step}")
    fraction = Fraction(repr(step))
    if fraction != Fraction(step):
        raise RequestError(
            f"'multipleOf' {step} cannot be obeyed: Python holds it only nearly, so that multiples of it fail"
        )
    return fraction


def _check_step(step: Fraction | int) -> None:
    if step > MAX_MULTIPLE:
        raise RequestError(f"'multipleOf' {step} cannot be obeyed: {MAX_MULTIPLE} is the most")
