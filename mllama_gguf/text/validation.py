"""Whether a reply is JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..errors import RequestError
from ..words import one_line


def check(text: str, schema: Any) -> None:
    """Raise RequestError if a text is not JSON of a schema, apart from its patterns."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"the reply is no JSON that Python reads: {one_line(e)}") from e
    if not isinstance(schema, dict):
        return
    try:
        wrong = next(_errors(value, schema), None)
    except RecursionError as e:
        raise RequestError("the reply is nested too much for Python") from e
    except Exception as e:  # OverflowError, say, over a number such as 1e400
        raise RequestError(f"the reply cannot be checked against the JSON schema: {one_line(e)}") from e
    if wrong is not None:
        raise RequestError(f"the reply does not fit the JSON schema: {one_line(wrong.message)}")


def _errors(value: Any, schema: dict[str, Any]) -> Iterator[Any]:
    from jsonschema.validators import extend, validator_for

    kind = validator_for(schema)
    without = {"pattern": _nothing, "patternProperties": _nothing}
    additional = kind.VALIDATORS["additionalProperties"]

    def additional_properties(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if "patternProperties" not in schema:
            yield from additional(validator, wanted, instance, schema) or ()

    without["additionalProperties"] = additional_properties
    errors: Iterator[Any] = extend(kind, without)(schema).iter_errors(value)
    return errors


def _nothing(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    return iter(())
