"""JSON schemas: from what a user gives to one that llguidance obeys to the letter.

Every complete reply must pass `jsonschema.validate(json.loads(reply), schema)`. llguidance obeys most
keywords, but not all of them in all cases, and understands some in another way than jsonschema. So a schema
is read keyword by keyword. What can be obeyed is written again in one plain dialect, perhaps a little
narrower. What cannot is refused by its name, before anything is computed. Words that are not keywords have no
effect, as JSON schema demands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from ..errors import RequestError
from ..words import brief
from .bounds import bounds, exact
from .formats import PASSED_ON, REFUSED, WRITTEN
from .pattern import named, searched
from .pointers import Pointers, is_list

MAX_DEPTH = 40  # schemas, or values in enum, within each other
MAX_WEIGHT = 10_000  # of all schemas (2 each) and values (1 each, lists and objects 10) together
MAX_TEXT = 200_000  # characters of all names and values together
MAX_STRING = 4096  # characters of one name or value
MAX_PROPERTIES = 1000  # of one object
MAX_OPTIONAL = 30  # properties of an object of which at least one must be there; patterns of names
MAX_COUNT = 1_000_000  # of items, properties and characters

Schema = dict[str, Any] | bool

_LATEST = 2020
_DRAFTS = {
    "http://json-schema.org/draft-03/schema": 3,
    "http://json-schema.org/draft-04/schema": 4,
    "http://json-schema.org/draft-06/schema": 6,
    "http://json-schema.org/draft-07/schema": 7,
    "https://json-schema.org/draft/2019-09/schema": 2019,
    "https://json-schema.org/draft/2020-12/schema": _LATEST,
}
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
# Keywords that cannot be obeyed, with the values of them that ask for nothing.
_NOT_OBEYED: dict[str, tuple[object, ...]] = {
    "uniqueItems": (False,),
    "contains": (),
    "not": (False,),
    "if": (),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "propertyNames": ({}, True),
    "unevaluatedItems": ({}, True),
    "unevaluatedProperties": ({}, True),
    "$dynamicRef": (),
    "$recursiveRef": (),
}
_TEXTS = ("$schema", "$comment", "title", "description", "contentMediaType", "contentEncoding")
_ONE_LETTER_ESCAPES = "\b\f\n\r\t"


def readable(schema: Any) -> dict[str, Any]:
    """The schema as llguidance obeys it.

    schema: a dict, or True for any JSON; lists may be tuples

    Raises RequestError for what is not a schema, what is too large, and what cannot be obeyed.
    """
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise RequestError(f"a JSON schema is an object, not {brief(schema)}")
    return _Reader(schema).read()


class _Reader:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._weight = self._text = 0
        self._draft = _draft(root, _LATEST)
        self._id_keyword = "id" if self._draft == 4 else "$id"
        address = root.get(self._id_keyword)
        self._pointers = Pointers(root, address.rstrip("#") if isinstance(address, str) else "")
        self._here = "#"  # the path whose target is read
        self._at: list[str] = []  # where in it; after an error it still says where that was
        self._has_inner_address = False

    def read(self) -> dict[str, Any]:
        try:
            return self._read()
        except RequestError as e:
            where = f" at {brief('/'.join([self._here, *self._at]), 120)}" if self._at else ""
            raise RequestError(f"JSON schema{where}: {e}") from e

    def _read(self) -> dict[str, Any]:
        if self._draft < 4:
            raise RequestError("draft 3 cannot be obeyed")
        result = self._schema(self._root, True)
        assert isinstance(result, dict)
        definitions: dict[str, Schema] = {}
        while target := self._pointers.next():
            self._here, key = target
            definitions[key] = self._schema(self._pointers.find(self._here), True)
        if self._has_inner_address and self._pointers:
            raise RequestError(f"{self._id_keyword!r} inside of a schema with '$ref' cannot be obeyed")
        self._pointers.check_circles()
        return {**result, "$defs": definitions} if definitions else result

    def _schema(self, node: Any, same: bool) -> Schema:
        """A schema, rewritten. same: it is about the same value as the target that is being read."""
        if isinstance(node, bool):
            return node
        if not isinstance(node, Mapping):
            raise RequestError(f"{brief(node)} is not a schema")
        self._weigh(2)
        if len(self._at) > MAX_DEPTH:
            raise RequestError(f"nested more than {MAX_DEPTH} times")
        if "$ref" in node and self._draft <= 7:  # what stands beside it has no effect
            return {"$ref": self._pointers.add(node["$ref"], self._here, same)}
        self._check_keywords(node)
        types = self._types(node)
        result: dict[str, Any] = {} if types is None else {"type": types if len(types) > 1 else types[0]}
        for name, value in node.items():
            if name in _SAME_VALUE:
                result[name] = self._choices(name, value, same)
            elif name == "$ref":
                result[name] = self._pointers.add(value, self._here, same)
            elif name in _KEYWORDS:
                _KEYWORDS[name](self, node, result)
        self._add_patterns(node, types, result)
        result.update(bounds(node, types))
        return result

    def _check_keywords(self, node: Mapping[str, Any]) -> None:
        for name, value in node.items():
            if not isinstance(name, str):
                raise RequestError(f"{brief(name)} is not a name")
            if name in _NOT_OBEYED and not any(value == harmless for harmless in _NOT_OBEYED[name]):
                raise RequestError(f"{name!r} cannot be obeyed")
            if name in _TEXTS and not isinstance(value, str):
                raise RequestError(f"{name!r} must be a text, not {brief(value)}")
        if node is not self._root and _draft(node, self._draft) != self._draft:
            raise RequestError("'$schema' of another draft than the whole schema's cannot be obeyed")
        address = node.get(self._id_keyword)
        if isinstance(address, str) and not address.startswith("#") and node is not self._root:
            self._has_inner_address = True

    def _types(self, node: Mapping[str, Any]) -> list[str] | None:
        if "type" not in node:
            return None
        types = [node["type"]] if isinstance(node["type"], str) else node["type"]
        if not is_list(types) or not types or not all(isinstance(t, str) and t in _TYPES for t in types):
            raise RequestError(f"'type' cannot be {brief(node['type'])}")
        if len(set(types)) < len(types):
            raise RequestError("'type' has the same name twice")
        return list(types)

    # ---- about the same value ------------------------------------------------------------------------------

    def _choices(self, name: str, choices: Any, same: bool) -> list[Schema]:
        if not is_list(choices) or not choices:
            raise RequestError(f"{name!r} must be a list of schemas, not {brief(choices)}")
        found = [self._inside(f"{name}/{i}", choice, same) for i, choice in enumerate(choices)]
        if name == "oneOf":
            # llguidance sees that choices exclude each other only if they are written out. It writes out a
            # reference that has another keyword beside it.
            for i, choice in enumerate(found):
                if isinstance(choice, dict) and choice.keys() == {"$ref"}:
                    kind = self._kind(choices[i]["$ref"])
                    found[i] = {"type": kind, **choice} if kind else choice
        return found

    def _kind(self, reference: str) -> str | None:
        target = self._pointers.find(self._pointers.path(reference))
        kind = target.get("type") if isinstance(target, Mapping) else None
        return kind if isinstance(kind, str) and kind in _TYPES else None

    # ---- values --------------------------------------------------------------------------------------------

    def _const(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        result["const"] = self._value(node["const"], 0)

    def _enum(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        if not is_list(node["enum"]) or not node["enum"]:
            raise RequestError(f"'enum' must be a list of values, not {brief(node['enum'])}")
        result["enum"] = [self._value(value, 0) for value in node["enum"]]

    def _value(self, value: Any, depth: int) -> Any:
        if depth + len(self._at) > MAX_DEPTH:
            raise RequestError(f"nested more than {MAX_DEPTH} times")
        self._weigh(10 if isinstance(value, Mapping) or is_list(value) else 1)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            wrong = [
                c for c in self._string(value) if (c < " " and c not in _ONE_LETTER_ESCAPES) or c == "\x7f"
            ]
            if wrong:
                raise RequestError(f"{brief(value)}: the character {wrong[0]!r} cannot be written")
            return value
        if isinstance(value, (int, float)):
            return exact(value)
        if is_list(value):
            return [self._value(item, depth + 1) for item in value]
        if isinstance(value, Mapping):
            return {self._string(name): self._value(item, depth + 1) for name, item in value.items()}
        raise RequestError(f"{brief(value)} is not a value of JSON")

    def _string(self, text: Any) -> str:
        if not isinstance(text, str):
            raise RequestError(f"{brief(text)} is not a name")
        self._text += len(text)
        if len(text) > MAX_STRING or self._text > MAX_TEXT:
            raise RequestError(
                f"{brief(text)}: names and values of {MAX_STRING} characters, {MAX_TEXT} all together, are "
                "allowed"
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError(f"{brief(text)} has half of a surrogate pair")
        return text

    def _add_patterns(self, node: Mapping[str, Any], types: list[str] | None, result: dict[str, Any]) -> None:
        """`pattern` and `format`, of texts."""
        expressions = []
        if "pattern" in node:
            expressions.append(self._expression(node["pattern"], searched))
        name = node.get("format", "")
        if not isinstance(name, str):
            raise RequestError(f"'format' must be a text, not {brief(name)}")
        if types is None or "string" in types:
            if name in WRITTEN:
                expressions.append(self._expression(WRITTEN[name], searched))
            elif name in PASSED_ON:
                result["format"] = name
            elif name in REFUSED:
                raise RequestError(f"'format' {name!r} cannot be obeyed")
        if expressions:
            result["pattern"] = expressions[0]
        if len(expressions) > 1:
            result["allOf"] = [*result.get("allOf", []), {"pattern": expressions[1]}]

    def _expression(self, expression: Any, translate: Callable[[str], str]) -> str:
        if not isinstance(expression, str):
            raise RequestError(f"a pattern must be a text, not {brief(expression)}")
        self._weigh(1)
        self._text += len(expression)
        return f"^(?:{translate(expression)})$"

    def _number_of(self, node: Mapping[str, Any], name: str) -> int:
        value = node[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"{name!r} must be a whole number, not {brief(value)}")
        if value > MAX_COUNT and name.startswith("min"):
            raise RequestError(f"{name!r} is {value}; {MAX_COUNT} is the most")
        return min(value, MAX_COUNT)

    # ---- lists and objects ---------------------------------------------------------------------------------

    def _items(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        items = node["items"]
        if not is_list(items):
            result["items"] = self._inside("items", items)
            return
        if self._draft == _LATEST:
            raise RequestError("'items' must be a schema; a list of them is 'prefixItems'")
        result["prefixItems"] = [self._inside(f"items/{i}", item) for i, item in enumerate(items)]
        if "additionalItems" in node:
            result["items"] = self._inside("additionalItems", node["additionalItems"])

    def _prefix_items(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        if self._draft < _LATEST:  # there it is not a keyword
            return
        items = node["prefixItems"]
        if not is_list(items) or not items:
            raise RequestError("'prefixItems' must be a list of schemas")
        result["prefixItems"] = [self._inside(f"prefixItems/{i}", item) for i, item in enumerate(items)]

    def _properties(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        properties = node["properties"]
        if not isinstance(properties, Mapping) or len(properties) > MAX_PROPERTIES:
            raise RequestError(f"'properties' must be an object of at most {MAX_PROPERTIES} schemas")
        result["properties"] = {
            self._string(name): self._inside(f"properties/{name}", one) for name, one in properties.items()
        }

    def _pattern_properties(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        properties = node["patternProperties"]
        if not isinstance(properties, Mapping) or len(properties) > MAX_OPTIONAL:
            raise RequestError(f"'patternProperties' must be an object of at most {MAX_OPTIONAL} schemas")
        result["patternProperties"] = {
            self._expression(name, named): self._inside(f"patternProperties/{name}", one)
            for name, one in properties.items()
        }

    def _additional_properties(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        result["additionalProperties"] = self._inside("additionalProperties", node["additionalProperties"])

    def _required(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        names = node["required"]
        if not is_list(names) or len(names) > MAX_PROPERTIES:
            raise RequestError(f"'required' must be a list of at most {MAX_PROPERTIES} names")
        result["required"] = [self._string(name) for name in names]
        if len(set(result["required"])) < len(names):
            raise RequestError("'required' has the same name twice")

    def _min_properties(self, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        least = self._number_of(node, "minProperties")
        required, properties = node.get("required"), node.get("properties")
        known = len(required) if is_list(required) else 0
        if least > known + 1:
            # llguidance does not see whether two of the other names are the same.
            raise RequestError(f"'minProperties' {least} cannot be obeyed with {known} required properties")
        if least > known and isinstance(properties, Mapping) and len(properties) > MAX_OPTIONAL:
            raise RequestError(f"'minProperties' cannot be obeyed with more than {MAX_OPTIONAL} properties")
        result["minProperties"] = least

    # ---- bookkeeping ---------------------------------------------------------------------------------------

    def _inside(self, where: str, node: Any, same: bool = False) -> Schema:
        self._at.append(where)
        found = self._schema(node, same)
        self._at.pop()
        return found

    def _weigh(self, weight: int) -> None:
        self._weight += weight
        if self._weight > MAX_WEIGHT:
            raise RequestError("too many schemas and values")


def _draft(schema: Mapping[str, Any], default: int) -> int:
    """The draft that a schema names, read as jsonschema reads it; else the default."""
    name = schema.get("$schema")
    if not isinstance(name, str):
        return default
    try:
        return _DRAFTS.get(urlsplit(name).geturl(), default)
    except ValueError as e:
        raise RequestError(f"'$schema' {brief(name)} is not an address") from e


def _counted(name: str) -> Callable[[_Reader, Mapping[str, Any], dict[str, Any]], None]:
    def read(reader: _Reader, node: Mapping[str, Any], result: dict[str, Any]) -> None:
        result[name] = reader._number_of(node, name)

    return read


_SAME_VALUE = ("allOf", "anyOf", "oneOf")
_KEYWORDS: dict[str, Callable[[_Reader, Mapping[str, Any], dict[str, Any]], None]] = {
    "const": _Reader._const,
    "enum": _Reader._enum,
    "items": _Reader._items,
    "prefixItems": _Reader._prefix_items,
    "properties": _Reader._properties,
    "patternProperties": _Reader._pattern_properties,
    "additionalProperties": _Reader._additional_properties,
    "required": _Reader._required,
    "minProperties": _Reader._min_properties,
    **{name: _counted(name) for name in ("minLength", "maxLength", "minItems", "maxItems", "maxProperties")},
}
