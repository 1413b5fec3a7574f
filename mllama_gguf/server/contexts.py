"""The `context` of /api/generate: a conversation as whole numbers, which the client keeps and sends back.

It is the tokens of prompt and reply. After a token that stands for an image come eight words of 32 bits: the
key of the image's states. A later request finds the states by it, in memory or on disk. The server keeps
nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..vision.embedding import ImageEmbedding
from ..vision.preprocess import TiledImage
from .jobs import Usable
from .problems import Refused

logger = logging.getLogger(__name__)

WORDS = 8
_BITS = 32


def to_words(key: str) -> list[int]:
    """A key of 64 hexadecimal digits as eight whole numbers."""
    return [int(key[i : i + WORDS], 16) for i in range(0, WORDS * WORDS, WORDS)]


def to_key(words: Sequence[int]) -> str:
    """The key that eight whole numbers stand for. Raises ValueError."""
    if len(words) != WORDS or not all(0 <= word < 1 << _BITS for word in words):
        raise ValueError("no key of an image")
    return "".join(f"{word:08x}" for word in words)


def pack(
    loaded: Usable, tokens: Sequence[int], images: Sequence[TiledImage | ImageEmbedding], said: str
) -> tuple[int, ...]:
    """The context after a reply. said: its text."""
    reply = loaded.model.tokenize(said, add_bos=False, special=False)
    keys = iter([loaded.conversation.image_key(image) for image in images])
    packed: list[int] = []
    for token in tokens:
        packed.append(token)
        if token == loaded.model.image_token_id and images:
            packed += to_words(next(keys))
    end = loaded.model.tokenize("<|eot_id|>", add_bos=False)
    if len(end) == 1 and end[0] in loaded.model.stop_ids:
        reply = [*reply, *end]
    return (*packed, *reply)


def unpack(loaded: Usable, context: Sequence[int]) -> tuple[list[int], list[ImageEmbedding]]:
    """The tokens of a context and its images. An image that is gone is left out. Raises Refused."""
    tokens: list[int] = []
    images: list[ImageEmbedding] = []
    place = 0
    while place < len(context):
        token = context[place]
        place += 1
        if token != loaded.model.image_token_id or not loaded.model.hparams.has_vision:
            tokens.append(token)
            continue
        try:
            key = to_key(context[place : place + WORDS])
        except ValueError:
            raise Refused(400, "context is not from /api/generate with this model", None, "context") from None
        place += WORDS
        image = loaded.conversation.known_image(key)
        if image is None:
            logger.info("an image of a context is no longer known, and left out")
        else:
            tokens.append(token)
            images.append(image)
    return tokens, images
