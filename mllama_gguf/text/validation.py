"""Whether a schema is one, and whether a reply is JSON of it: by jsonschema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..reading import parse_json
from ..words import brief, one_line
from .pointers import is_list

MAX_CHECKED = 1000  # values in a schema; jsonschema takes 0.1 ms for each
# Keywords that jsonschema looks at, at most: a second or so. A few references that each name the next one
# twice are looked at in more ways than can be counted.
MAX_LOOKS = 100_000
_DEEPEST = 60


@dataclass
class Work:
    """What jsonschema may still do, for one schema or for several of one request.

    values:   of schemas that it may compare with their draft
    keywords: that it may look at
    """

    values: int = MAX_CHECKED
    keywords: int = MAX_LOOKS // 10


class _TooMuch(Exception):
    """More than that."""


def check_schema(schema: Mapping[str, Any], work: Work | None = None) -> None:
    """Raise RequestError for a schema that its draft does not allow, as `jsonschema.validate` does before it
    looks at anything: also for keywords without effect on a reply. Of one that takes jsonschema seconds
    nothing is said.

    schema: lists may be tuples
    work:   is counted down; None: as much as for one schema
    """
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    work = work or Work()
    rest = [min(work.values, MAX_CHECKED)]
    work.values -= rest[0]
    try:
        plain = _plain(schema, rest, 0)
    except OverflowError:
        return
    work.values += rest[0]
    try:
        # A default of its own: else a draft that is not known is a warning.
        kind = validator_for(plain, default=Draft202012Validator)
        kind.check_schema(plain)
        for _ in _bounded(kind, work)(plain).iter_errors(None):  # addresses that cannot be read
            break
    except SchemaError as e:
        where = "/".join(["#", *map(str, e.absolute_path)])
        raise RequestError(f"JSON schema at {brief(where, 120)}: is not valid: {one_line(e.message)}") from e
    except (RecursionError, _TooMuch):
        return
    except Exception as e:  # of no common class
        raise RequestError(f"JSON schema: cannot be used by jsonschema: {one_line(e)}") from e


def _plain(value: Any, rest: list[int], depth: int) -> Any:
    """A copy of dicts and lists. rest: how many values it may have, counted down. Raises OverflowError."""
    rest[0] -= 1
    if rest[0] < 0 or depth > _DEEPEST:
        raise OverflowError
    if isinstance(value, Mapping):
        return {name: _plain(item, rest, depth + 1) for name, item in value.items()}
    if is_list(value):
        return [_plain(item, rest, depth + 1) for item in value]
    return value


def check(text: str, schema: Any) -> None:
    """Raise RequestError if a text is not JSON of a schema, apart from its patterns."""
    try:
        value = parse_json(text)
    except ValueError as e:
        raise RequestError(f"the reply is not JSON that Python reads: {one_line(e)}") from e
    if not isinstance(schema, dict):
        return
    try:
        wrong = next(_errors(value, schema), None)
    except RecursionError as e:
        raise RequestError("the reply is nested too much for Python") from e
    except _TooMuch as e:
        raise RequestError("the reply cannot be checked against the JSON schema: that takes too long") from e
    except Exception as e:  # OverflowError, say, over a number such as 1e400
        raise RequestError(f"the reply cannot be checked against the JSON schema: {one_line(e)}") from e
    if wrong is not None:
        raise RequestError(f"the reply does not fit the JSON schema: {one_line(wrong.message)}")


def _errors(value: Any, schema: dict[str, Any]) -> Iterator[Any]:
    from jsonschema.validators import Draft202012Validator, extend, validator_for

    kind = validator_for(schema, default=Draft202012Validator)
    without = {"pattern": _nothing, "patternProperties": _nothing}
    additional = kind.VALIDATORS["additionalProperties"]

    def additional_properties(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if "patternProperties" not in schema:
            yield from additional(validator, wanted, instance, schema) or ()

    without["additionalProperties"] = additional_properties
    bounded = _bounded(extend(kind, without), Work(keywords=MAX_LOOKS))
    errors: Iterator[Any] = bounded(schema).iter_errors(value)
    return errors


def _bounded(kind: Any, work: Work) -> Any:
    """A class of validators that raises _TooMuch once no keywords are left."""
    from jsonschema.validators import extend

    def counted(function: Any) -> Any:
        def call(validator: Any, wanted: Any, instance: Any, schema: Any) -> Any:
            work.keywords -= 1
            if work.keywords < 0:
                raise _TooMuch
            return function(validator, wanted, instance, schema)

        return call

    made = extend(kind, {name: counted(function) for name, function in kind.VALIDATORS.items()})
    evolve = made.evolve

    def evolved(self: Any, **changes: Any) -> Any:
        # A part with a draft of its own would get a class that does not count.
        schema = changes.get("schema")
        if isinstance(schema, dict) and "$schema" in schema:
            changes["schema"] = {name: value for name, value in schema.items() if name != "$schema"}
        return evolve(self, **changes)

    made.evolve = evolved
    return made


def _nothing(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    return iter(())
