"""What the programs of tests/clients ask, and some of tests/server."""

from __future__ import annotations

from typing import Any

MODEL = "llama3.2-vision"
KEY = "the key of the tests"
TAGGED = "llama3.2-vision:latest"
QUESTION = "Describe this image."
GREEDY = {"temperature": 0.0}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint something.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
