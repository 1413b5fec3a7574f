"""`LoadedModel`: weights, vocabulary and images, once in memory for any number of conversations and
threads."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

from . import cpus
from .backend.callbacks import Callbacks, Progress
from .backend.library import load as load_native
from .backend.opening import open_backend
from .backend.types import HParams
from .checks import File, check_function, checked
from .decode.conversation import Conversation
from .decode.scheduler import Scheduler
from .decode.shared import share
from .errors import MllamaError, ModelError, RequestError
from .handles import OneProcess
from .settings import Settings
from .store.defaults import Defaults
from .store.resolve import resolve
from .text.vocab import Vocab
from .vision.encoder import ImageEncoder

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="LoadedModel")


class LoadedModel(OneProcess):
    """A model that several conversations use, in as many threads.

        with LoadedModel("text.gguf", "mmproj.gguf") as model:
            with model.conversation() as one, model.conversation() as two:
                print(one.caption("apple.png"), two.caption("pear.png"))

    The weights are in memory once, and an image is encoded once for all. The object itself is safe from
    several threads.
    """

    _given: frozenset[str]  # names of the arguments that the caller gave, beside paths

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        made = super().__new__(cls, *args, **kwargs)
        made._given = frozenset(kwargs)
        return made

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        mmproj_path: str | os.PathLike[str] | None = None,
        *,
        defaults: Defaults | None = None,
        verbose: bool = False,
        progress: Progress | None = None,
        abort: Callable[[], bool] | None = None,
        **settings: Any,
    ) -> None:
        """Load a model. All arguments are those of `Mllama`. progress and abort are those of the load; a
        conversation that names no others has them too. Raises ModelError, BackendError, RequestError,
        Aborted."""
        model_path = checked("model_path", File(), model_path)
        mmproj_path = checked("mmproj_path", File(), mmproj_path, or_none=True)
        check_function("progress", progress)
        check_function("abort", abort)
        if verbose:
            _log_to_stderr()
        if _is_name(model_path):
            files = resolve(model_path, mmproj_path)
            model_path, mmproj_path = files.text, files.mmproj
            own = {name: value for name, value in files.parameters.items() if name not in self._given}
            settings = {**settings, **own}
            defaults = files.defaults if defaults is None else defaults
        self.defaults = Defaults() if defaults is None else defaults
        for note in self.defaults.notes:
            warnings.warn(note, stacklevel=3)
        self.model_path = Path(model_path)
        self.mmproj_path = None if mmproj_path is None else Path(mmproj_path)
        self.settings = Settings.checked(settings)
        self._progress, self._abort = progress, abort
        self._lock = threading.RLock()  # of what follows
        self._conversations: WeakSet[Conversation] = WeakSet()
        self._encoders: WeakSet[ImageEncoder] = WeakSet()
        self._schedulers: WeakSet[Scheduler] = WeakSet()
        self._closed = False
        callbacks = Callbacks(load_native(), progress, abort)
        self._backend = open_backend(model_path, mmproj_path, self.settings, callbacks)
        with ExitStack() as undo:
            undo.callback(self._backend.model.close)
            # After the C library has checked the file.
            self._vocab = Vocab(model_path)
            undo.callback(self._vocab.close)
            self._check_sizes()
            self._shared = share(
                self._backend, self._vocab, self.model_path, self.mmproj_path, self.settings, self.defaults
            )
            undo.pop_all()

    def _check_sizes(self) -> None:
        hparams, n_ctx, n_tokens = self.hparams, self.settings.n_ctx, self._vocab.n_tokens
        needed = max(hparams.vocab_size, hparams.image_token_id + 1 if hparams.has_vision else 0)
        if n_tokens < needed:
            raise ModelError(
                f"{self.model_path}: the vocabulary has {n_tokens} tokens, the model needs {needed}"
            )
        if n_ctx and n_ctx > hparams.n_ctx_train:
            words = "n_ctx %d is more than the model was trained with; %d is used"
            logger.warning(words, n_ctx, hparams.n_ctx_train)

    @classmethod
    def from_pretrained(
        cls: type[T],
        name: str | os.PathLike[str] | None = None,
        mmproj_path: str | os.PathLike[str] | None = None,
        *,
        verify: bool = False,
        **kwargs: Any,
    ) -> T:
        """Open a model by its name: `demo`, a path, `ollama:NAME[:TAG]`, `hf:OWNER/REPO/FILE`, or one in
        models.lock. It must be on this machine (`mllama pull NAME`).

        name:        None: $MLLAMA_MODEL, or else `demo`
        mmproj_path: a path or `hf:...`, in place of the model's own vision encoder
        verify:      check the files' sha256 first
        kwargs:      as for the class

        Raises ModelError, and what the class raises.
        """
        name = checked("name", File(), name, or_none=True)
        mmproj_path = checked("mmproj_path", File(), mmproj_path, or_none=True)
        files = resolve(name, mmproj_path)
        if verify:
            from .store.verify import require_verified

            require_verified(files)
        return cls(files.text, files.mmproj, **{"defaults": files.defaults, **files.parameters, **kwargs})

    # ---- facts ---------------------------------------------------------------------------------------------

    @property
    def hparams(self) -> HParams:
        """The shape of the model."""
        return self._backend.model.hparams

    @property
    def layout(self) -> str:
        """How the files are laid out: "canonical", "A", "B", "text only" or "unknown"; see `ModelInfo`."""
        return self._backend.model.layout

    @property
    def repairs(self) -> tuple[str, ...]:
        """What loading repaired or filled in, a line each."""
        return self._backend.model.repairs

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The keys of the text file, without the vocabulary's long arrays."""
        return self._vocab.metadata

    @property
    def n_gpu_layers(self) -> int:
        """How many layers are offloaded, as the setting says or as "auto" found; -1: all."""
        return self._backend.n_gpu_layers

    @property
    def n_threads(self) -> int:
        """CPU threads of a conversation that names no other number."""
        return self._backend.n_threads

    @property
    def encoder_threads(self) -> int:
        """CPU threads for an `image_encoder`: those that one conversation leaves free, up to as many as it
        has itself. 0: there are none, or the encoder is on another device, in another process or
        missing."""
        self._check_open()
        model = self._backend.model
        if not model.is_local or not self.hparams.has_vision:
            return 0
        here = {device.name for device in model.devices() if device.type == "cpu"}
        if any(tensor.is_vision and tensor.device not in here for tensor in model.tensors()):
            return 0
        return max(0, min(cpus.usable_cpus() - self.n_threads, self.n_threads))

    @property
    def max_tiles(self) -> int:
        """Most tiles of an image for which no other number is named; 0 for a model without a vision
        encoder."""
        known = self.hparams.max_tiles if self.hparams.has_vision else 0
        return min(self.settings.max_tiles or known, known)

    @property
    def vocab_size(self) -> int:
        """Logits a token. The image token comes after them."""
        return self.hparams.vocab_size

    @property
    def image_token_id(self) -> int:
        """The token that stands for an image."""
        return self.hparams.image_token_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a reply."""
        return self._vocab.stop_ids

    # ---- text and tokens -----------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = True) -> list[int]:
        """Text to token ids.

        add_bos: begin with `<|begin_of_text|>`, if the model wants one
        special: read `<|image|>` and its like as the tokens that they name; else as plain text
        """
        self._check_open()
        return self._vocab.tokenize(text, add_bos=add_bos, special=special, abort=self._abort)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Token ids to text. special: show special tokens as well. Raises RequestError for an unknown id."""
        self._check_open()
        return self._vocab.detokenize(tokens, special=special)

    # ---- who uses it ---------------------------------------------------------------------------------------

    def conversation(
        self,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        progress: Progress | None = None,
        abort: Callable[[], bool] | None = None,
        scheduler: Scheduler | None = None,
    ) -> Conversation:
        """A new conversation, with caches of its own. Several compute at the same time, each in a thread;
        their CPU threads should be as many as there are CPUs together. With isolate or rpc_servers they
        take turns.

        n_ctx:     most tokens; None: as the model's setting says
        n_threads: CPU threads; None: `n_threads`
        progress, abort: called in the thread that uses the conversation; None: those of the model
        scheduler: of this model; the conversation then computes together with its others, in steps that read
                   the weights once for all. `abort` is then called in their threads too, and there is no
                   progress

        Raises RequestError, BackendError, MllamaError for a closed model.
        """
        if scheduler is not None and n_threads is not None:
            raise RequestError("n_threads is the scheduler's for conversations that compute together")
        return self._open_conversation(
            "conversation",
            n_ctx=n_ctx,
            n_threads=n_threads,
            progress=progress,
            abort=abort,
            scheduler=scheduler,
        )

    def scheduler(self, *, n_threads: int | None = None) -> Scheduler:
        """Lets several conversations, each used by a thread, compute together:

            scheduler = model.scheduler()
            one, two = (model.conversation(scheduler=scheduler) for _ in range(2))

        n_threads: CPU threads of all together; None: `n_threads`

        Raises BackendError, MllamaError for a closed model. Closed with the model.
        """
        with self._lock:
            self._check_open()
            scheduler = Scheduler(self._backend, self._shared.disk, n_threads=n_threads)
            self._schedulers.add(scheduler)
            return scheduler

    def _open_conversation(
        self,
        noun: str,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        progress: Progress | None = None,
        abort: Callable[[], bool] | None = None,
        scheduler: Scheduler | None = None,
    ) -> Conversation:
        check_function("progress", progress)
        check_function("abort", abort)
        with self._lock:
            self._check_open()
            conversation = Conversation(
                self._shared,
                n_ctx=None
                if n_ctx is None
                else self.settings.replace(n_ctx=n_ctx).context_length(self.hparams.n_ctx_train),
                n_threads=n_threads,
                progress=progress or self._progress,
                abort=abort or self._abort,
                noun=noun,
                scheduler=scheduler,
            )
            self._conversations.add(conversation)
            return conversation

    def image_encoder(self, n_threads: int | None = None) -> ImageEncoder:
        """The vision encoder for another thread, see `ImageEncoder`; close it before this object, which else
        does so.

        n_threads: CPU threads; None: `encoder_threads`, one at least

        `abort` is then called in that thread too. Raises RequestError for a model without a vision encoder or
        in another process (isolate, rpc_servers), BackendError, Aborted.
        """
        self._shared.images.check_vision()
        if not self._backend.model.is_local:
            raise RequestError("image_encoder: this model computes in another process (isolate, rpc_servers)")
        if n_threads is not None:
            cpus.check_threads(n_threads)
        with self._lock:
            self._check_open()
            encoder = ImageEncoder(
                self._backend,
                self._shared.images,
                self._abort or (lambda: False),
                n_threads=n_threads or self.encoder_threads or 1,
            )
            self._encoders.add(encoder)
            return encoder

    # ---- its own life --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the model, its conversations and encoders. Closing twice is fine. Raises BusyError while a
        conversation computes in another thread. In a forked process nothing is freed."""
        if self._closed or self.is_inherited:
            self._closed = True
            return
        with self._lock, ExitStack() as held:
            conversations = list(self._conversations)
            for conversation in conversations:
                held.enter_context(conversation.locked())
            for conversation in conversations:
                conversation.save()
            for encoder in list(self._encoders):
                encoder.close()
            for scheduler in list(self._schedulers):
                scheduler.close()
            self._closed = True
            # The weights stay until the last context is freed. A child process ends now, whatever its
            # workers do.
            self._backend.model.close()
            for conversation in conversations:
                conversation.free()
            self._vocab.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.model_path)!r}{', closed' if self._closed else ''})"

    def _check_open(self) -> None:
        self.check_process()
        if self._closed:
            raise MllamaError(f"{self.model_path.name}: this {type(self).__name__} is closed")


def _is_name(model: str | os.PathLike[str]) -> bool:
    """Whether this is the name of a model in a store rather than a path."""
    return isinstance(model, str) and model.startswith(("ollama:", "hf:")) and not os.path.exists(model)


def _log_to_stderr() -> None:
    log = logging.getLogger("mllama_gguf")
    log.setLevel(logging.DEBUG)
    if not any(isinstance(handler, logging.StreamHandler) for handler in log.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
