"""One picture of many: its caption, as a batch or a cluster's worker asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..decode.options import ReplyOptions
from ..decode.writer import FinishReason
from ..errors import RequestError
from ..model import Mllama
from ..reading import read_text
from ..settings import DEFAULT_PROMPT
from ..vision.embedding import Picture
from ..words import one_line


@dataclass(frozen=True)
class CaptionOptions:
    """How every picture is captioned.

    max_tokens:     most tokens of a caption
    temperature, seed: as in `create_chat_completion`
    schema:         a JSON schema; every caption is JSON of that schema
    prefix, suffix: put around every caption; not around JSON

    Raises RequestError for values that cannot be used.
    """

    prompt: str = DEFAULT_PROMPT
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.schema is not None and (self.prefix or self.suffix):
            raise RequestError("a JSON schema leaves no room for prefix and suffix")
        _ = self.reply_options

    @cached_property
    def reply_options(self) -> ReplyOptions:
        """For `Mllama.reply`, checked once."""
        options: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.schema is not None:
            options["response_format"] = {"type": "json_schema", "json_schema": {"schema": self.schema}}
        return ReplyOptions.checked(options)

    @cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import validator_for

        assert self.schema is not None
        return validator_for(self.schema)(self.schema)

    def check(self, text: str, finish_reason: FinishReason | None) -> None:
        """Raise RequestError if a schema is wanted and the text is not JSON of it."""
        if self.schema is None:
            return
        if finish_reason == "length":
            raise RequestError(
                f"the caption was cut off before its JSON was complete ({self.max_tokens} tokens, or n_ctx); "
                "raise max_tokens or n_ctx"
            )
        try:
            wrong = next(self._validator.iter_errors(json.loads(text)), None)
        except ValueError as e:
            raise RequestError(f"the caption is not JSON: {e}") from e
        if wrong is not None:
            raise RequestError(f"the caption does not fit the JSON schema: {one_line(wrong.message)}")


@dataclass(frozen=True)
class Caption:
    """seconds: encode, prompt and decode, as in `Stats`."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    seconds: Mapping[str, float]


def caption_picture(model: Mllama, image: Picture, options: CaptionOptions) -> Caption:
    """The caption of an image. Raises what `create_chat_completion` raises, and RequestError for a reply that
    does not fit the schema."""
    reply = model.reply(image=image, prompt=options.prompt, options=options.reply_options)
    text, stats = reply.read(), reply.stats
    options.check(text, stats.finish_reason)
    assert stats.finish_reason is not None  # it was read to its end
    return Caption(
        options.prefix + text + options.suffix,
        stats.finish_reason,
        stats.prompt_tokens,
        stats.cached_tokens,
        stats.completion_tokens,
        stats.seconds,
    )


def load_schema(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON schema from a file. Raises RequestError for a file that is none."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = json.loads(read_text(path))
    except OSError as e:
        raise RequestError(f"{os.fspath(path)}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise RequestError(f"{os.fspath(path)}: is not JSON: {one_line(e)}") from e
    if not isinstance(schema, dict):
        raise RequestError(f"{os.fspath(path)}: is not a JSON schema: {type(schema).__name__}, not an object")
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as e:
        raise RequestError(f"{os.fspath(path)}: is not a JSON schema: {one_line(e.message)}") from e
    return schema
