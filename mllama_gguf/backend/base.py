"""What a model and a context are, wherever they compute: in this process (`local`) or in a child
(`isolated`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from ..errors import MllamaError
from ..settings import KvType
from .callbacks import Callbacks
from .types import Bytes, Device, Floats, HParams, Memory, Tap, TensorInfo

Logits: TypeAlias = Literal["none", "last", "all"]

# The calls that return a handle, and the call that gives it back: for a caller that is interrupted before it
# gets the handle.
RELEASES = {"image_fill": "image_free", "image_map": "image_free", "sequence_new": "sequence_free"}


# Most tokens of prompts in a step with others, so that a running reply never waits for more than these.
# A prompt that fits takes one step. Each further one reads the weights again and waits for the others.
CHUNK = 128


@dataclass(frozen=True)
class Item:
    """Tokens of one sequence, for `SharedContext.decode_many`; as `Context.decode` takes them."""

    sequence: int
    tokens: Sequence[int]
    slot: int
    n_visible: int
    logits: Logits = "last"


class Model(Protocol):
    """The weights. Safe from several threads; contexts that are made from it keep it in memory."""

    @property
    def is_local(self) -> bool:
        """Whether it is in this process."""

    @property
    def hparams(self) -> HParams:
        """The shape of the model."""

    @property
    def layout(self) -> str:
        """How the files are laid out: canonical, A, B, text only or unknown, see mllama.h."""

    @property
    def repairs(self) -> tuple[str, ...]:
        """What loading puts right or fills in, a line each."""

    @property
    def size(self) -> int:
        """Bytes of all weights."""

    def devices(self) -> list[Device]:
        """All devices of the process that it is in."""

    def tensors(self) -> Iterable[TensorInfo]:
        """All weights, and where they are."""

    def open_context(
        self,
        callbacks: Callbacks,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_threads: int = 0,
        type_k: KvType = "f16",
        type_v: KvType = "f16",
        flash_attn: bool = True,
        offload_kqv: bool = True,
        cpu_kernel: str = "",
    ) -> SharedContext:
        """A context of its own. n_ctx, n_batch: tokens; n_threads 0: ggml's default; cpu_kernel "": as
        $MLLAMA_CPU_KERNEL says. Raises RequestError, BackendError."""

    def close(self) -> None:
        """Free it, or let the last of its contexts do so. Twice is fine."""


class ImageSlots(Protocol):
    """Where the keys and values of images are. One thread at a time."""

    def image_fill(self, states: Sequence[Floats | int]) -> int:
        """Put one image, or a group of adjacent ones, into a new slot; each states [n_tiles, n_positions,
        n_embd], or n_tiles: `image_set` brings the image."""

    def image_mapped_size(self, n_tiles: int) -> int:
        """How many bytes `image_map` needs for an image with n_tiles tiles; 0: it cannot be mapped."""

    def image_map(self, n_tiles: int, path: Path, offset: int) -> int:
        """Put one image into a new slot that has the bytes of a file, as `image_get` gives them, from there
        on. Raises ModelError for a file that is not there or too short."""

    def image_free(self, slot: int) -> None:
        """Give a slot back."""

    def image_size(self, slot: int, image: int) -> int:
        """How many bytes `image_get` gives of a slot's image, counted from 0 in its group."""

    def image_get(self, slot: int, image: int, offset: int, n_bytes: int) -> Bytes:
        """Some bytes of what a slot holds of an image: uint8 [n_bytes]."""

    def image_set(self, slot: int, image: int, offset: int, data: Bytes) -> None:
        """Put them into another slot."""


class Context(ImageSlots, Protocol):
    """The caches and the computation of one conversation. One thread at a time."""

    @property
    def hparams(self) -> HParams:
        """The shape of its model."""

    @property
    def n_ctx(self) -> int:
        """Most tokens."""

    @property
    def n_past(self) -> int:
        """Tokens in the self-attention cache."""

    @property
    def epoch(self) -> int:
        """Changes when the caches were lost with their process."""

    def memory(self) -> Memory:
        """Bytes in use now."""

    def reserve(self, n_tiles: Sequence[int]) -> None:
        """Make room for a full context and one group of images with these tiles; of a model opened with
        no_alloc, measure it. Raises OutOfMemoryError."""

    def encode(self, pixels: Floats, aspect_ratio_id: int) -> Floats:
        """pixels float32 [n_tiles, 3, image_size, image_size] -> states float32 [n_tiles, n_positions,
        n_embd]."""

    def decode(self, tokens: Sequence[int], slot: int, n_visible: int, logits: Logits = "last") -> Floats:
        """Append tokens that all see the first n_visible images of a slot (-1: no image yet).

        Returns float32 [0, 1 or n_tokens, vocab_size].
        """

    def truncate(self, n_past: int) -> None:
        """Keep the first n_past tokens."""

    def prefix_kv_size(self, n_tokens: int) -> int:
        """How many bytes `prefix_kv_get` gives."""

    def prefix_kv_get(self, n_tokens: int) -> Bytes:
        """What the first tokens left in the self-attention cache: uint8 [prefix_kv_size]."""

    def prefix_kv_set(self, n_tokens: int, data: Bytes) -> None:
        """Let the self-attention cache hold these tokens, and no others."""

    def clear(self) -> None:
        """Drop all tokens and images."""

    def tap(self, callback: Tap) -> AbstractContextManager[None]:
        """Inside the block callback(name, None) is asked for every intermediate tensor whether its values are
        wanted, and if so callback(name, values) gets them: float32, slowest dimension first, valid during the
        call."""

    def close(self) -> None:
        """Free it, or let the thread that uses it do so when it is done. Twice is fine."""


class SharedContext(Context, Protocol):
    """A context that can have more sequences: conversations of their own that share its weights, buffers and
    image slots. Number 0 is the context's own."""

    def sequence_new(self, n_ctx: int) -> int:
        """One more sequence of tokens, which shares the image slots; its number. n_ctx: most tokens."""

    def sequence_free(self, sequence: int) -> None:
        """Give it back."""

    def sequence_n_past(self, sequence: int) -> int:
        """Its tokens."""

    def sequence_truncate(self, sequence: int, n_past: int) -> None:
        """As `truncate`."""

    def sequence_prefix_kv_get(self, sequence: int, n_tokens: int) -> Bytes:
        """As `prefix_kv_get`."""

    def sequence_prefix_kv_set(self, sequence: int, n_tokens: int, data: Bytes) -> None:
        """As `prefix_kv_set`."""

    def decode_many(self, items: Sequence[Item]) -> list[Floats | MllamaError]:
        """Append tokens to several sequences in one step, n_batch tokens at most.

        Returns for each item what `decode` returns, or its error: a ModelError if its results are not finite,
        and its sequence is then empty; a BackendError if its sequence was lost with its process. After an
        error of the whole call no sequence has changed.
        """


def open_encoder(
    model: Model, callbacks: Callbacks, *, n_threads: int, flash_attn: bool, cpu_kernel: str = ""
) -> Context:
    """A context that only encodes images. Raises BackendError."""
    # A context always has a cache of tokens; here it is as small as possible.
    return model.open_context(
        callbacks, n_ctx=1, n_batch=1, n_threads=n_threads, flash_attn=flash_attn, cpu_kernel=cpu_kernel
    )
