"""One image of many: its caption, as a batch or a cluster's worker asks for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..backend.types import HParams
from ..checks import Seconds, checked
from ..decode.answers import CAPTION_TOKENS
from ..decode.conversation import Conversation
from ..decode.options import ReplyOptions
from ..decode.reply import Reply
from ..decode.writer import FinishReason
from ..errors import Aborted, RequestError, TimeLimitError
from ..model import Mllama
from ..reading import parse_json, read_text
from ..settings import DEFAULT_PROMPT
from ..store.defaults import Defaults
from ..text.grammar import grammar_of, json_schema
from ..vision.decoding import pixel_limit
from ..vision.embedding import ImageEmbedding, ImageInput, LimitedImage
from ..vision.loading import ImageSource
from ..vision.preprocess import TiledImage, preprocess_image
from ..words import one_line, os_reason


@dataclass(frozen=True)
class CaptionOptions:
    """How every image is captioned.

    max_tokens:     most tokens of a caption; None: the model's own, or 256
    temperature, seed: as in `create_chat_completion`; None: the model's own, or 0 and a fresh one
    schema:         a JSON schema; every caption is JSON of that schema
    form:           a `response_format` of `create_chat_completion`, in place of a schema
    prefix, suffix: put around every caption; not around JSON
    system:         the system message; "": none; None: the model's own, or none
    begin:          how every caption begins; the model continues from there
    sampling:       other options of `create_chat_completion`: top_k, stop and so on
    time_limit:     most seconds for a caption: to encode its image, read the prompt and write
    max_pixels, allow_truncated: as in `load_image`

    Raises RequestError for values that cannot be used.
    """

    prompt: str = DEFAULT_PROMPT
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    prefix: str = ""
    suffix: str = ""
    form: Mapping[str, Any] | None = None
    system: str | None = None
    begin: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    time_limit: float | None = None
    max_pixels: int | None = None
    allow_truncated: bool = False
    _checked: tuple[Defaults, ReplyOptions] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.schema is not None and self.form is not None:
            raise RequestError("a JSON schema and another form exclude each other")
        grammar = grammar_of(self.response_format, None)
        if grammar is not None and grammar.is_json and (self.prefix or self.suffix):
            raise RequestError("prefix and suffix cannot be used with a JSON schema")
        if self.begin and grammar is not None:
            raise RequestError("begin cannot be used with a schema, a grammar or a regex")
        self.reply_options(Defaults())
        checked("time_limit", Seconds(), self.time_limit, or_none=True)
        pixel_limit(self.max_pixels)

    @property
    def response_format(self) -> Mapping[str, Any] | None:
        """The form of every caption, as `Mllama.reply` takes it."""
        if self.schema is None:
            return self.form
        return {"type": "json_schema", "json_schema": {"schema": self.schema}}

    def reply_options(self, defaults: Defaults) -> ReplyOptions:
        """For `Mllama.reply`, with the model's own values where nothing is asked for. Checked once for a
        model."""
        if self._checked is None or self._checked[0] is not defaults:
            asked = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
            given = {name: value for name, value in asked.items() if value is not None}
            options = {"max_tokens": CAPTION_TOKENS, **defaults.options, **self.sampling, **given}
            found = ReplyOptions.checked({**options, "response_format": self.response_format})
            object.__setattr__(self, "_checked", (defaults, found))
        assert self._checked is not None
        return self._checked[1]

    def prepare(self, image: ImageSource, shape: HParams, max_tiles: int) -> TiledImage:
        """An image cut into at most max_tiles tiles for a model of that shape. Raises ImageError,
        RequestError."""
        tiled = preprocess_image(
            image,
            tile_size=shape.image_size,
            max_tiles=max_tiles,
            model_tiles=shape.max_tiles,
            max_pixels=self.max_pixels,
            allow_truncated=self.allow_truncated,
        )
        return tiled.for_model(shape.max_tiles)

    def messages(self, image: ImageInput, defaults: Defaults) -> list[dict[str, Any]]:
        """The conversation about an image, as `Mllama.reply` takes it. defaults: the model's."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        # An empty message has work to do only where the model has one of its own.
        if self.system or (self.system is not None and defaults.system):
            messages.insert(0, {"role": "system", "content": self.system})
        if self.begin:
            messages.append({"role": "assistant", "content": self.begin})
        return messages

    def check(self, finish_reason: FinishReason | None) -> None:
        """Raise RequestError if a caption that must have a form was cut."""
        kind = str((self.response_format or {}).get("type", "text"))
        if finish_reason == "length" and kind != "text":
            what = "its JSON" if "json" in kind else "its form"
            raise RequestError(
                f"the caption was cut off before {what} was complete "
                f"({self.max_tokens or CAPTION_TOKENS} tokens, or n_ctx); raise max_tokens or n_ctx"
            )


@dataclass(frozen=True)
class Caption:
    """seconds: encode, prompt and decode, as in `Stats`."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    seconds: Mapping[str, float]


def begin_caption(
    model: Mllama, image: ImageInput, options: CaptionOptions, talk: Conversation | None = None
) -> Reply:
    """The caption of an image, which is still to be read: see `within`. talk: who answers; None: the model's
    own conversation. Raises what `create_chat_completion` raises."""
    if not isinstance(image, (ImageEmbedding, TiledImage, LimitedImage)) and model.hparams.has_vision:
        image = options.prepare(image, model.hparams, model.max_tiles)
    messages = options.messages(image, model.defaults)
    return (talk or model).reply(messages, options=options.reply_options(model.defaults))


def too_late(seconds: float) -> TimeLimitError:
    """The error for a caption that takes longer than that."""
    return TimeLimitError(f"took longer than {seconds:g} seconds (the time limit)")


@contextmanager
def within(reply: Reply, seconds: float | None, spent: float = 0.0) -> Iterator[None]:
    """A block that reads a reply, and ends with TimeLimitError once it has taken so long. None: no limit;
    spent: seconds that are gone already."""
    if seconds is None:
        yield
        return
    late = threading.Event()

    def stop() -> None:
        late.set()
        reply.cancel()

    if spent >= seconds:
        stop()
    timer = threading.Timer(min(max(seconds - spent, 0.0), threading.TIMEOUT_MAX), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Aborted as e:
        if not late.is_set():
            raise
        raise too_late(seconds) from e
    finally:
        timer.cancel()
        timer.join()


def caption_image(
    model: Mllama,
    image: ImageInput,
    options: CaptionOptions,
    *,
    spent: float = 0.0,
    talk: Conversation | None = None,
) -> Caption:
    """The caption of an image. spent: seconds of the time limit that are gone already; talk: as in
    `begin_caption`.

    Raises what `create_chat_completion` raises, RequestError for a reply that was cut before its form was
    complete, TimeLimitError.
    """
    reply = begin_caption(model, image, options, talk)
    with within(reply, options.time_limit, spent):
        text, stats = reply.read(), reply.stats
    options.check(stats.finish_reason)
    assert stats.finish_reason is not None  # it was read to its end
    return Caption(
        options.prefix + options.begin + text + options.suffix,
        stats.finish_reason,
        stats.prompt_tokens,
        stats.cached_tokens,
        stats.completion_tokens,
        stats.seconds,
    )


def load_schema(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON schema from a file. Raises RequestError for a file without one, and for a schema that cannot be
    obeyed."""
    name = os.fspath(path)
    try:
        schema = parse_json(read_text(path))
    except OSError as e:
        raise RequestError(f"{name}: cannot be read: {os_reason(e)}") from e
    except ValueError as e:
        raise RequestError(f"{name}: is not JSON: {one_line(e)}") from e
    if not isinstance(schema, dict):
        raise RequestError(f"{name}: is not a JSON schema: {type(schema).__name__}, not an object")
    try:
        json_schema(schema)
    except RequestError as e:
        raise RequestError(f"{name}: {e}") from e
    return schema


def load_grammar(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A `response_format` from a file with a grammar: Lark if it is called *.lark, else GBNF.

    Raises RequestError for a file that cannot be read, and for a grammar that cannot be obeyed.
    """
    name = os.fspath(path)
    try:
        text = read_text(path)
    except OSError as e:
        raise RequestError(f"{name}: cannot be read: {os_reason(e)}") from e
    except UnicodeDecodeError as e:
        raise RequestError(f"{name}: is not UTF-8") from e
    form = {"type": "lark" if name.lower().endswith(".lark") else "gbnf", "grammar": text}
    try:
        grammar_of(form, None)
    except RequestError as e:
        raise RequestError(f"{name}: {e}") from e
    return form
