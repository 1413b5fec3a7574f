"""Tools that the assistant may call: what the model is told of them, and the calls in its replies.

Llama 3.2 calls a tool with a reply that is nothing but JSON: {"name": ..., "parameters": {...}}.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import Switch, checked
from ..errors import RequestError
from ..words import brief
from .grammar import Grammar, json_schema
from .pointers import is_list
from .validation import MAX_CHECKED, MAX_LOOKS, Work

MAX_TOOLS = 128
_CHOICES = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    told:     what the model is told, in OpenAI's shape
    required: the names of the tools of which the reply must call one; (): none must be called
    one_call: a reply calls one tool at most
    """

    told: tuple[Mapping[str, Any], ...] = ()
    required: tuple[str, ...] = ()
    one_call: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those that the model may call."""
        return self.required or tuple(tool["function"]["name"] for tool in self.told)

    def grammar(self) -> Grammar | None:
        """What a reply must follow that has to call a tool. Raises RequestError if the schema of a tool's
        parameters cannot be obeyed."""
        if not self.required:
            return None
        chosen = [tool["function"] for tool in self.told if tool["function"]["name"] in self.required]
        work = Work(values=10 * MAX_CHECKED, keywords=3 * MAX_LOOKS // 10)  # a second or two
        for function in chosen:
            try:
                json_schema(_parameters(function), work)
            except RequestError as e:
                raise RequestError(f"tool {brief(function['name'])}: its parameters: {e}") from e
        return json_schema(
            {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {
                            "name": {"const": function["name"]},
                            "parameters": _inner(function, f"#/anyOf/{index}/properties/parameters"),
                        },
                        "required": ["name", "parameters"],
                        "additionalProperties": False,
                    }
                    for index, function in enumerate(chosen)
                ]
            },
            work,
        )


def read_tools(tools: Any, tool_choice: Any = None, parallel_tool_calls: Any = None) -> Tools:
    """Tools in OpenAI's shapes: [{"type": "function", "function": {"name": ..., "description": ...,
    "parameters": JSON schema}}, ...]. Raises RequestError."""
    one_call = parallel_tool_calls is not None and not checked(
        "parallel_tool_calls", Switch(), parallel_tool_calls
    )
    if tools is None:
        tools = ()
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools must be a list, not {brief(tools)}")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: {len(tools)} are given; {MAX_TOOLS} are allowed")
    told = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in told]
    if len(set(names)) < len(names):
        raise RequestError("tools: two have the same name")
    required: tuple[str, ...] = ()
    if tool_choice == "required":
        if not names:
            raise RequestError('tool_choice "required" needs tools')
        required = tuple(names)
    elif isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if tool_choice.get("type") != "function" or not isinstance(name, str):
            raise RequestError(f"tool_choice must be {_CHOICES}, not {brief(tool_choice)}")
        if name not in names:
            raise RequestError(f"tool_choice: there is no tool {brief(name)}")
        required = (name,)
    elif tool_choice is not None and tool_choice not in ("none", "auto"):
        raise RequestError(f"tool_choice must be {_CHOICES}, not {brief(tool_choice)}")
    return Tools(() if tool_choice == "none" else told, required, one_call)


def _number(words: str) -> float:
    """A number that JSON can have. Raises ValueError for NaN and infinity, which Python would take."""
    number = float(words)
    if not math.isfinite(number):
        raise ValueError(words)
    return number


_JSON = json.JSONDecoder(parse_constant=_number, parse_float=_number)


def find_calls(text: str, names: Collection[str]) -> list[tuple[str, dict[str, Any]]]:
    """The calls that a whole reply consists of: names and arguments. []: it is not a call of these tools."""
    found: list[Any] = []
    rest = text.strip()
    while rest:
        try:
            value, end = _JSON.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(" \t\r\n;,")
    calls = [_call(value) for value in found]
    if any(name not in names for name, _ in calls):
        return []
    return calls


def may_be_call(text: str) -> bool:
    """Whether a reply that begins so may become a call."""
    return text.lstrip()[:1] in ("", "{", "[")


def call_id() -> str:
    """A name for a call, which the tool's answer repeats."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _call(value: Any) -> tuple[str, dict[str, Any]]:
    """The name, "" if this is not a call, and the arguments."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return "", {}
    arguments = value.get("parameters", value.get("arguments"))
    if isinstance(arguments, str):
        try:
            arguments = _JSON.decode(arguments)
        except (ValueError, RecursionError):
            return "", {}
    if arguments is None:
        arguments = {}
    return (value["name"], arguments) if isinstance(arguments, dict) else ("", {})


def _tool(where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise RequestError(
            f'{where}: expected {{"type": "function", "function": {{"name": ...}}}}, got {brief(tool)}'
        )
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"{where}: name must be a text that is not empty, not {brief(name)}")
    if not isinstance(function.get("description"), (str, type(None))):
        raise RequestError(f"{where}: description must be a text, not {brief(function['description'])}")
    if not isinstance(function.get("parameters"), (Mapping, type(None))):
        raise RequestError(f"{where}: parameters must be a JSON schema, not {brief(function['parameters'])}")
    return {**tool, "function": dict(function)}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object. Raises RequestError for another."""
    given = function.get("parameters")
    if not given:
        return {"type": "object", "additionalProperties": False}
    types = given.get("type", "object")
    if types != "object" and not (is_list(types) and "object" in types):
        raise RequestError(f"'type' must be 'object', not {brief(types)}")
    return {**given, "type": "object"}


def _inner(function: Mapping[str, Any], place: str) -> Any:
    """The schema of a tool's arguments, for that place of a larger one, which has the latest draft."""
    schema = _moved(_parameters(function), place)
    return {name: value for name, value in schema.items() if name != "$schema"}


# Keywords that hold values, and those that hold schemas by names, of which "$ref" may be one.
_VALUES = frozenset(("const", "enum", "default", "example", "examples"))
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))


def _moved(schema: Any, place: str) -> Any:
    """A schema for another place of a larger one: what it refers to moves with it."""
    if isinstance(schema, (list, tuple)):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[Any, Any] = {}
    for name, value in schema.items():
        if name == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[name] = f"{place}{value[1:]}"
        elif name in _NAMED and isinstance(value, Mapping):
            moved[name] = {key: _moved(one, place) for key, one in value.items()}
        else:
            moved[name] = value if name in _VALUES else _moved(value, place)
    return moved
