"""From a request, whatever API it came by, to the pieces of its replies. Runs in the engine's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..decode.options import PromptOptions, ReplyOptions
from ..decode.reply import Reply
from ..errors import ContextFullError, RequestError
from ..vision.embedding import ImageEmbedding, ImageInput, LimitedImage
from ..vision.preprocess import TiledImage
from .contexts import pack, unpack
from .images import ImageLimits, to_pixels
from .jobs import Ended, Event, Job, Piece, Usable
from .problems import Refused

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
Prepared: TypeAlias = "TiledImage | ImageEmbedding"
Stop: TypeAlias = Callable[[], bool]


@dataclass(frozen=True)
class Ask:
    """A question to a model.

    messages: with lists of parts; an image is {"type": "image", "image": bytes of a file}
    raw:      in place of messages, text that goes to the model as it is; its image tokens stand for `images`
    context:  what /api/generate gave for the conversation before, if there was one
    options:  of `ReplyOptions.checked`, those that the request or its API names
    fallback: the same, where neither the request nor the model says anything
    not_own:  options that the model brings along and that do not count
    n_ctx:    most tokens of prompt and reply; None: those of the model
    truncate: leave out the oldest messages of a conversation that is too long
    gives_context: /api/generate wants it
    n_bytes:  that all of it takes in memory, about
    """

    messages: Messages = ()
    raw: str | None = None
    images: tuple[bytes, ...] = ()
    context: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    fallback: Mapping[str, Any] = field(default_factory=dict)
    not_own: frozenset[str] = frozenset()
    n: int = 1
    n_ctx: int | None = None
    truncate: bool = False
    gives_context: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)

    n_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        # At once, for what is large is read in a thread of its own.
        everything = (self.messages, self.raw, self.images, self.context, self.options)
        object.__setattr__(self, "n_bytes", _size(everything))

    @property
    def has_images(self) -> bool:
        """Whether there are any."""
        return next(self.limited_images(None), None) is not None

    def limited_images(self, max_tiles: int | None) -> Iterator[tuple[bytes, int | None]]:
        """Files, and the most tiles of each. max_tiles: if it says nothing itself."""
        for data in self.images:
            yield data, max_tiles
        for message in self.messages:
            if isinstance(message["content"], list):
                for part in message["content"]:
                    if part["type"] == "image":
                        yield part["image"], _most(part, max_tiles)


def _size(value: Any) -> int:
    """Bytes of a value of JSON that may hold files. Lists and objects have 100 for each of their items."""
    size, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif isinstance(one, Mapping):
            size += 100 * len(one)
            rest += one.values()
        elif isinstance(one, (list, tuple)):
            size += 100 * len(one)
            rest += one
    return size


def answer(ask: Ask) -> Callable[[Usable, Job], Generator[Event, None, None]]:
    """The work of a job."""

    def work(loaded: Usable, job: Job) -> Generator[Event, None, None]:
        options = _options(ask, loaded)
        tokens, images = _prompt(ask, loaded, options, lambda: job.should_stop)
        room = _room(ask, loaded, len(tokens))
        if options.max_tokens is None or options.max_tokens > room:
            options = replace(options, max_tokens=room)
        loaded.choose(tokens, images)
        sources = tuple(_source(loaded, job, image) for image in images)
        for choice, reply in enumerate(loaded.conversation.replies_to(tokens, images, options, ask.n)):
            yield from _told(reply, choice, sources, ask, lambda said: pack(loaded, tokens, images, said))
            sources = ()

    return work


def encode_ahead(ask: Ask) -> Callable[[Usable, Job], None]:
    """What can be done for a job that waits: its images, unless their results are known."""

    def work(loaded: Usable, job: Job) -> None:
        conversation, max_tiles = loaded.conversation, _options(ask, loaded).prompt.max_tiles
        for data, most in ask.limited_images(max_tiles):
            image = _prepared(data, ask, loaded, most, lambda: job.should_stop)
            if conversation.image_source(image) == "encoded":
                job.encoded.add(conversation.encode_image(image).key)

    return work


def _source(loaded: Usable, job: Job, image: Prepared) -> str:
    """Where the states of an image come from; those that were computed ahead belong to this job."""
    is_ahead = bool(job.encoded) and loaded.conversation.image_key(image) in job.encoded
    return "encoded" if is_ahead else loaded.conversation.image_source(image)


def load_only(loaded: Usable, job: Job) -> Generator[Event, None, None]:
    """The work of a job that only wants the model in memory."""
    yield from ()


def _options(ask: Ask, loaded: Usable) -> ReplyOptions:
    """Those of the request, over those of the model, over those of the API."""
    own = {k: v for k, v in loaded.model.defaults.options.items() if k not in ask.not_own}
    return ReplyOptions.checked({**ask.fallback, **own, **ask.options})


def _told(
    reply: Reply,
    choice: int,
    sources: tuple[str, ...],
    ask: Ask,
    context_of: Callable[[str], tuple[int, ...]],
) -> Generator[Event, None, None]:
    said: list[str] = []
    n_told = 0  # logprobs
    for text in reply:
        if ask.gives_context:
            said.append(text)
        told = tuple(reply.logprobs[n_told:])
        n_told += len(told)
        yield Piece(text, choice, told)
    if len(reply.logprobs) > n_told:
        yield Piece("", choice, tuple(reply.logprobs[n_told:]))
    context = context_of("".join(said)) if ask.gives_context else ()
    yield Ended(reply.stats, choice, sources, context)


def _room(ask: Ask, loaded: Usable, n_tokens: int) -> int:
    """Tokens that a reply may have. Raises ContextFullError."""
    n_ctx = min(ask.n_ctx or loaded.context_length, loaded.context_length)
    if n_tokens >= n_ctx:
        raise ContextFullError(
            f"the input length exceeds the context length: the prompt has {n_tokens} tokens of {n_ctx}"
        )
    return n_ctx - n_tokens


# ---- prompts -----------------------------------------------------------------------------------------------


def _prompt(ask: Ask, loaded: Usable, options: ReplyOptions, stop: Stop) -> tuple[list[int], list[Prepared]]:
    """The tokens of a prompt and its images, decoded. Raises RequestError, ImageError, ContextFullError,
    Aborted."""
    if ask.raw is not None:
        tokens = loaded.model.tokenize(ask.raw, add_bos=not ask.context)
        images = [_prepared(data, ask, loaded, options.prompt.max_tiles, stop) for data in ask.images]
        n_marks = tokens.count(loaded.model.image_token_id)
        if n_marks != len(images):
            raise Refused(400, f"the prompt has {n_marks} image tokens for {len(images)} images")
    else:
        tokens, images = _chat(ask, loaded, options.prompt, stop)
    if ask.context:
        before, known = unpack(loaded, ask.context)
        bos = loaded.model.tokenize("", add_bos=True)
        if bos and tokens[: len(bos)] == bos:
            tokens = tokens[len(bos) :]
        tokens, images = [*before, *tokens], [*known, *images]
    return tokens, images


def _chat(ask: Ask, loaded: Usable, options: PromptOptions, stop: Stop) -> tuple[list[int], list[Prepared]]:
    """A conversation, without its oldest messages if it is too long and that is allowed."""
    messages = list(ask.messages)
    if not ask.context:
        messages = list(loaded.model.defaults.precede(messages))
    messages = [_decoded(message, ask, loaded, options.max_tiles, stop) for message in messages]
    n_ctx = min(ask.n_ctx or loaded.context_length, loaded.context_length) - len(ask.context)

    def prompt(n_left_out: int) -> tuple[list[int], tuple[ImageInput, ...]]:
        left_out = set(old[:n_left_out])
        kept = [message for i, message in enumerate(messages) if i not in left_out]
        return loaded.conversation.prompt(kept, options)

    def fits(n_left_out: int) -> bool:
        try:
            return len(prompt(n_left_out)[0]) < n_ctx
        except ContextFullError:  # so much that it cannot even be counted
            return False
        except RequestError:  # if so many must go, it is raised below
            return True

    old = _old(messages) if ask.truncate else []
    try:
        tokens, images = prompt(0)
        is_long = len(tokens) >= n_ctx
    except ContextFullError:
        if not old:
            raise
        is_long = True
    if old and is_long:
        n = fewest(len(old), fits)
        logger.info("the conversation has more than %d tokens: %d messages are left out", n_ctx - 1, n)
        tokens, images = prompt(n)
    return tokens, [loaded.conversation.prepare_image(image) for image in images]


def fewest(most: int, fits: Callable[[int], bool]) -> int:
    """The least number from 1 on that fits, `most` if none does. What fits one fits all above it, so that few
    are tried: of a conversation of thousands of messages each takes long."""
    low = high = 1
    while high < most and not fits(high):
        low, high = high + 1, 2 * high
    high = min(high, most)
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _old(messages: Messages) -> list[int]:
    """The places of the messages that may be left out, the oldest first: no system message, and not the last
    ones."""
    last = len(messages) - 1
    if messages and messages[-1]["role"] == "assistant":
        last -= 1  # it is continued, and answers the one before
    return [i for i in range(last) if messages[i]["role"] != "system"]


def _decoded(
    message: Mapping[str, Any], ask: Ask, loaded: Usable, max_tiles: int | None, stop: Stop
) -> Mapping[str, Any]:
    """A message whose images are decoded and cut into tiles: a few megabytes, however large they were."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image", "image": _prepared(part["image"], ask, loaded, _most(part, max_tiles), stop)}
        if part["type"] == "image"
        else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _most(part: Mapping[str, Any], max_tiles: int | None) -> int | None:
    """The most tiles of an image; None: as the model's setting says."""
    return 1 if part.get("detail") == "low" else max_tiles


def _prepared(image: ImageInput, ask: Ask, loaded: Usable, max_tiles: int | None, stop: Stop) -> Prepared:
    """An image as tiles. Files are decoded within the limits of requests.

    A request may ask for fewer tiles than the server's setting allows, not for more. Raises ImageError,
    RequestError, Aborted.
    """
    pixels = to_pixels(image, ask.limits, stop) if isinstance(image, bytes) else image
    if max_tiles is not None and not isinstance(pixels, LimitedImage):
        pixels = LimitedImage(pixels, min(max_tiles, loaded.model.max_tiles))
    return loaded.conversation.prepare_image(pixels)
