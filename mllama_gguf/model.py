"""`Mllama`: a model, one conversation's caches, and everything that can be done with them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, overload
from weakref import WeakSet

from . import cpus
from .backend.callbacks import Callbacks, Progress
from .backend.library import load as load_native
from .backend.opening import open_backend
from .backend.types import Floats, HParams, Memory, Tap
from .cache.disk import ImageCache
from .cache.keys import Keys, KeySettings
from .decode import openai
from .decode.reply import Reply, ReplyOptions
from .decode.session import Session
from .decode.slots import Slots
from .errors import BusyError, MllamaError, ModelError, RequestError
from .handles import OneProcess
from .settings import DEFAULT_PROMPT, KvType, Settings
from .store.resolve import resolve
from .text.chat import ChatTemplate
from .text.grammar import grammar_of
from .text.sampling import SamplingOptions
from .text.stream import stop_list
from .text.vocab import Vocab
from .vision.embedding import Encoding, ImageEmbedding, Picture
from .vision.encoder import ImageEncoder
from .vision.images import Images
from .vision.preprocess import PREPROCESS_VERSION, TiledImage

logger = logging.getLogger(__name__)

Messages: TypeAlias = Sequence[Mapping[str, Any]]


class Mllama(OneProcess):
    """A Llama 3.2 Vision model that answers about pictures.

        with Mllama("text.gguf", "mmproj.gguf") as model:
            print(model.caption("apple.png"))

    An object is used by one thread at a time; a second thread gets BusyError at once. Objects do not know of
    each other and work in parallel; `image_encoder` lets another thread encode pictures meanwhile. Ctrl-C
    stops a computation within a fraction of a second with KeyboardInterrupt; the object stays usable.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        mmproj_path: str | os.PathLike[str] | None = None,
        *,
        n_gpu_layers: int | Literal["auto"] = 0,
        vision_device: str = "auto",
        devices: Sequence[str] | None = None,
        tensor_split: Sequence[float] | None = None,
        main_gpu: int | None = None,
        offload_kqv: bool = True,
        rpc_servers: str | Sequence[str] = (),
        rpc_timeout: float = 300.0,
        isolate: bool = False,
        n_ctx: int | None = 4096,
        n_batch: int = 512,
        n_threads: int | None = None,
        type_k: KvType = "f16",
        type_v: KvType = "f16",
        flash_attn: bool = True,
        use_mmap: bool = True,
        repack: bool = False,
        allow_quantized_vision: bool = False,
        chat_template: str | None = None,
        image_cache: bool | str | os.PathLike[str] = True,
        verbose: bool = False,
        progress: Progress | None = None,
        abort: Callable[[], bool] | None = None,
    ) -> None:
        """Load a model.

        model_path:     GGUF with the text model, or with all of it
        mmproj_path:    GGUF with vision encoder and projector, if they are not in model_path
        n_gpu_layers:   how many of the last layers (the output counts as one) go to GPU devices; -1: all;
                        "auto": as many as fit with a margin, fewer if a device still refuses
        vision_device:  "auto": with the text's layers; "cpu"; or a device's name as `mllama devices` shows it
        devices:        names of the devices to offload to; None: every GPU
        tensor_split:   share of each device, as in (3, 1); None: by free memory
        main_gpu:       the number of the one device that takes everything, counted from 0; None: all share
        offload_kqv:    keep an offloaded layer's caches and attention on its device; False: on the CPU
        rpc_servers:    "host:port" of each `mllama worker` whose devices are used too, before this machine's
        rpc_timeout:    most seconds without a sign of life; a worker gives none while it computes one graph,
                        an image's encoding say
        isolate:        compute in a child process, so that ggml ending its process is a BackendError; always
                        so with rpc_servers
        n_ctx:          most tokens of a conversation; None or 0, or more than the model was trained with: as
                        trained
        n_batch:        most tokens that are computed at once
        n_threads:      CPU threads, 512 at most; None: all usable CPUs, fewer for a small model
        type_k, type_v: of the caches: "f32", "f16" (values up to 65504), or "q8_0" (self-attention only; V
                        needs flash_attn)
        use_mmap:       let the CPU read weights from the file's pages instead of copying them. The file must
                        then stay as it is: the system ends the process (SIGBUS) if another program cuts it
                        short, and overwritten weights give wrong words. With isolate that is a BackendError
        repack:         copy the text's quantized matrices to the layouts of ggml's special CPU kernels, if it
                        has some for this processor: a slower load, more memory, and perhaps faster text; see
                        docs/performance.md
        allow_quantized_vision: take a projector with quantized matrices, which ruin the captions
        chat_template:  Jinja source in place of the file's
        image_cache:    keep what is computed of pictures on disk, where the environment says or the platform
                        keeps caches; a path: there; False: in memory only. See cache/disk.py
        verbose:        the log to stderr
        progress:       called with "load", "encode" or "prompt", how much is done, and of how much
        abort:          called every 50 ms while something computes; True stops it with Aborted

        Raises ModelError, BackendError, RequestError, Aborted.
        """
        if verbose:
            _log_to_stderr()
        settings = Settings.checked(
            {
                "n_gpu_layers": n_gpu_layers,
                "vision_device": vision_device,
                "devices": devices,
                "tensor_split": tensor_split,
                "main_gpu": main_gpu,
                "offload_kqv": offload_kqv,
                "rpc_servers": rpc_servers,
                "rpc_timeout": rpc_timeout,
                "isolate": isolate,
                "n_ctx": n_ctx,
                "n_batch": n_batch,
                "n_threads": n_threads,
                "type_k": type_k,
                "type_v": type_v,
                "flash_attn": flash_attn,
                "use_mmap": use_mmap,
                "repack": repack,
                "allow_quantized_vision": allow_quantized_vision,
                "chat_template": chat_template,
                "image_cache": image_cache,
            }
        )
        self._lock = threading.Lock()
        self._turn = (
            0  # counts what changed the conversation; an open stream sees by it that it lost the caches
        )
        self._closed = False
        self.model_path = Path(model_path)
        self.mmproj_path = None if mmproj_path is None else Path(mmproj_path)

        callbacks = Callbacks(load_native(), progress, abort)
        self._backend = open_backend(model_path, mmproj_path, settings, callbacks)
        self._model = self._backend.model
        self.n_gpu_layers, self.n_threads = self._backend.n_gpu_layers, self._backend.n_threads
        try:
            self._context = self._backend.open_context(callbacks)
        except BaseException:
            self._model.close()
            raise
        # After the C library has checked the file.
        self._vocab = Vocab(model_path)
        needed = max(self.hparams.vocab_size, self.image_token_id + 1 if self.hparams.has_vision else 0)
        if self._vocab.n_tokens < needed:
            raise ModelError(
                f"{model_path}: the vocabulary has {self._vocab.n_tokens} tokens, the model needs {needed}"
            )
        trained = self.hparams.n_ctx_train
        if settings.n_ctx and settings.n_ctx > trained:
            words = "n_ctx %d is more than the model was trained with; %d is used"
            logger.warning(words, settings.n_ctx, trained)
        self._encoders: WeakSet[ImageEncoder] = WeakSet()
        self._disk: ImageCache | None = None
        if settings.image_cache is not False:
            disk = ImageCache(None if settings.image_cache is True else settings.image_cache)
            self._disk = disk if disk.max_bytes > 0 else None
        self._session = Session(
            self._context,
            callbacks,
            Slots(self._context, callbacks, self._disk),
            self._disk,
            self._prefix_key,
        )
        self._stop = abort or (lambda: False)
        self._keys = Keys(
            self._model,
            self.model_path,
            self.mmproj_path,
            KeySettings(
                PREPROCESS_VERSION,
                self._backend.cpu_kernel,
                settings.flash_attn,
                settings.type_k,
                settings.type_v,
                settings.offload_kqv,
                settings.repack,
                settings.n_batch,
                self.n_threads,
            ),
            self._disk,
        )
        self._images = Images(self.hparams, self.model_path.name, self._keys, self._disk)
        self._taps = 0  # open ones
        self._template = ChatTemplate(
            settings.chat_template or self._vocab.chat_template,
            bos=self._vocab.text(self._vocab.bos),
            eos=self._vocab.text(self._vocab.eos),
            image=self._vocab.text(self.image_token_id) if self.hparams.has_vision else "<|image|>",
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        mmproj_path: str | os.PathLike[str] | None = None,
        *,
        verify: bool = False,
        **kwargs: Any,
    ) -> Mllama:
        """Open a model by its name: `demo`, a path, `ollama:NAME[:TAG]`, `hf:OWNER/REPO/FILE`, or one in
        models.lock. It must be on this machine (`mllama pull NAME`).

        name:        None: $MLLAMA_MODEL, or else `demo`
        mmproj_path: a path or `hf:...`, in place of the model's own vision encoder
        verify:      check the files' sha256 first
        kwargs:      as for the class

        Raises ModelError, and what the class raises.
        """
        files = resolve(name, mmproj_path)
        if verify:
            from .store.verify import require_verified

            require_verified(files)
        return cls(files.text, files.mmproj, **{**files.parameters, **kwargs})

    # ---- facts ---------------------------------------------------------------------------------------------

    @property
    def hparams(self) -> HParams:
        """The shape of the model."""
        return self._model.hparams

    @property
    def layout(self) -> str:
        """How the files are laid out: "canonical", "A", "B", "text only" or "unknown"; see `ModelInfo`."""
        return self._model.layout

    @property
    def repairs(self) -> tuple[str, ...]:
        """What loading put right or filled in, a line each."""
        return self._model.repairs

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The keys of the text file, without the vocabulary's long arrays."""
        return self._vocab.metadata

    @property
    def n_ctx(self) -> int:
        """Most tokens of a conversation."""
        return self._session.n_ctx

    @property
    def encoder_threads(self) -> int:
        """CPU threads for an `image_encoder`: those that this model leaves free, up to as many as it has
        itself. 0: there are none, or its encoder is on another device, in another process or missing."""
        self._check_open()
        if not self._model.is_local or not self.hparams.has_vision:
            return 0
        here = {device.name for device in self._model.devices() if device.type == "cpu"}
        if any(tensor.is_vision and tensor.device not in here for tensor in self._model.tensors()):
            return 0
        return max(0, min(cpus.usable_cpus() - self.n_threads, self.n_threads))

    @property
    def vocab_size(self) -> int:
        """Logits a token. The image token comes after them."""
        return self.hparams.vocab_size

    @property
    def image_token_id(self) -> int:
        """The token that stands for a picture."""
        return self.hparams.image_token_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a reply."""
        return self._vocab.stop_ids

    def memory(self) -> Memory:
        """Bytes of the caches and compute buffers, now."""
        with self._exclusive(changes=False):
            return self._context.memory()

    # ---- text and tokens -----------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = True) -> list[int]:
        """Text to token ids.

        add_bos: begin with `<|begin_of_text|>`, if the model wants one
        special: read `<|image|>` and its like as the tokens that they name; else as plain text
        """
        self._check_open()
        return self._vocab.tokenize(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Token ids to text. special: show special tokens as well. Raises RequestError for an unknown id."""
        self._check_open()
        return self._vocab.detokenize(tokens, special=special)

    # ---- pictures ------------------------------------------------------------------------------------------

    def encode_image(self, image: Picture) -> ImageEmbedding:
        """Run the vision encoder on a picture. A picture whose states are in memory or in the image cache is
        not computed again.

        Raises ImageError, RequestError for a model without a vision encoder, Aborted.
        """
        with self._exclusive(changes=False):
            prepared = self._images.prepare(image)
            return self._images.embed(prepared, self._context, self._stop, fresh=self._taps > 0)

    def image_encoder(self, n_threads: int | None = None) -> ImageEncoder:
        """The vision encoder for another thread, see `ImageEncoder`; close it before this object, which else
        does so.

        n_threads: CPU threads; None: `encoder_threads`, one at least

        `abort` is then called in that thread too. Raises RequestError for a model without a vision encoder or
        in another process (isolate, rpc_servers), BackendError, Aborted.
        """
        self._images.check_vision()
        if not self._model.is_local:
            raise RequestError("image_encoder: this model computes in another process (isolate, rpc_servers)")
        if n_threads is not None:
            cpus.check_threads(n_threads)
        with self._exclusive(changes=False):
            encoder = ImageEncoder(
                self._backend,
                self._images,
                self._stop,
                n_threads=n_threads or self.encoder_threads or 1,
            )
            self._encoders.add(encoder)
            return encoder

    def _encoding(self, image: TiledImage | ImageEmbedding) -> Encoding:
        """A prepared image for the session."""
        return self._images.encode(image, self._context, self._stop, fresh=self._taps > 0)

    def _prefix_key(self, tokens: Sequence[int]) -> str:
        """Names what the text model computes of the first tokens of a prompt; "": that is not kept."""
        return "" if self._disk is None or self._taps else self._keys.prefix_kv(tokens)

    # ---- replies -------------------------------------------------------------------------------------------

    @overload
    def caption(
        self, image: Picture, prompt: str = ..., *, stream: Literal[False] = ..., **options: Any
    ) -> str: ...
    @overload
    def caption(
        self, image: Picture, prompt: str = ..., *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...

    def caption(
        self, image: Picture, prompt: str = DEFAULT_PROMPT, *, stream: bool = False, **options: Any
    ) -> str | Iterator[str]:
        """What the model says to a picture and a question about it.

        image:   a path, bytes, a file object, a data URI, a PIL image, an array, a TiledImage, an
                 ImageEmbedding
        stream:  True: an iterator of pieces of text
        options: max_tokens (256) and the others of `create_chat_completion`

        Raises what `create_chat_completion` raises.
        """
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        options.setdefault("max_tokens", 256)
        reply = self._reply([{"role": "user", "content": content}], **options)
        return iter(reply) if stream else "".join(reply)

    @overload
    def create_chat_completion(
        self, messages: Messages, *, stream: Literal[False] = ..., **options: Any
    ) -> dict[str, Any]: ...
    @overload
    def create_chat_completion(
        self, messages: Messages, *, stream: Literal[True], **options: Any
    ) -> Iterator[dict[str, Any]]: ...

    def create_chat_completion(
        self, messages: Messages, *, stream: bool = False, **options: Any
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The reply to a conversation, in OpenAI's shapes.

        messages: [{"role": "user", "content": "text" or [part, ...]}, ...]; a part is {"type": "text",
                  "text": ...}, {"type": "image_url", "image_url": {"url": ...}} or {"type": "image", "image":
                  ...} with whatever `caption` takes as a picture
        stream:   True: an iterator of chunks, of which the last has usage and timings
        options:
          max_tokens:      most tokens of the reply; None: until n_ctx is full (the default)
          temperature:     0 (the default): always the likeliest token
          top_k, top_p, min_p, repeat_penalty, seed: as in `SamplingOptions`
          stop:            a string, or some, that end the reply and are not shown; they do not end JSON
          response_format: {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {...}}},
                           {"type": "regex", "regex": ...} and others: see `text.grammar.grammar_of`
          grammar:         GBNF that the reply must follow

        What the caches hold already, of this conversation or the last one, is not computed again. Everything
        is checked before anything is computed. An open stream ends with an error once the object is used for
        something else; close it, or read it to its end.

        Raises ImageError, RequestError, ContextFullError, BusyError, BackendError, Aborted.
        """
        reply = self._reply(messages, **options)
        name = str(self.metadata.get("general.name") or self.model_path.stem)
        return openai.chunks(reply, name) if stream else openai.completion(reply, name)

    def _reply(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: str | None = None,
    ) -> Reply:
        if max_tokens == -1:  # llama_cpp's way to say None
            max_tokens = None
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
        ):
            raise RequestError(
                f"max_tokens must be a whole number of at least 1, or None, not {max_tokens!r}"
            )
        options = ReplyOptions(
            SamplingOptions(
                temperature, top_k, top_p, min_p, repeat_penalty, seed, grammar_of(response_format, grammar)
            ),
            max_tokens,
            stop_list(stop),
        )
        with self._exclusive(changes=False):
            prompt = self._template.render(messages)
            images = [self._images.prepare(image) for image in prompt.images]
            tokens = self._tokenize_prompt(prompt.pieces)
            if tokens.count(self.image_token_id) != len(images):
                raise RequestError("the chat template does not give every picture one image token")
            self._session.check_fits(len(tokens))
            turn = -1

            @contextmanager
            def exclusive(begins: bool) -> Iterator[None]:
                nonlocal turn
                with self._exclusive(changes=begins, turn=None if begins else turn):
                    turn = self._turn
                    yield

            return Reply(
                self._session,
                self._vocab,
                self.vocab_size,
                tokens,
                lambda: [self._encoding(image) for image in images],
                options,
                exclusive,
                self.stop_ids,
            )

    def _tokenize_prompt(self, pieces: Sequence[str]) -> list[int]:
        bos = self._vocab.text(self._vocab.bos)
        tokens: list[int] = []
        for piece in pieces:
            # Templates usually write the bos token themselves.
            add_bos = not tokens and not (bos and piece.startswith(bos))
            tokens += self._vocab.tokenize(piece, add_bos=add_bos)
        return tokens

    def logits(self, token_ids: Sequence[int], images: Sequence[Picture] = ()) -> Floats:
        """The logits at every position of a prompt, from an empty cache: float32 [n_tokens, vocab_size].

        token_ids: with one image token for each of `images`, in order

        The caches hold the prompt afterwards. Raises ImageError, RequestError, ContextFullError, Aborted.
        """
        tokens = [int(token) for token in token_ids]
        wrong = [token for token in tokens if not 0 <= token < self.hparams.n_token_embd]
        if wrong:
            raise RequestError(f"token {wrong[0]} is not in the vocabulary")
        with self._exclusive():
            encodings = [self._encoding(self._images.prepare(image)) for image in images]
            rows, _ = self._session.feed(tokens, encodings, logits="all")
            return rows

    # ---- the object's own life -----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the conversation and all pictures, except those on disk."""
        with self._exclusive():
            self._session.clear()
            self._images.clear()

    def tap(self, callback: Tap) -> AbstractContextManager[None]:
        """Look at intermediate tensors inside a with block; see `Context.tap`. For finding mistakes.
        Pictures are encoded there even if their states are known."""
        self._check_open()

        @contextmanager
        def tapped() -> Iterator[None]:
            self._taps += 1
            try:
                with self._context.tap(callback):
                    yield
            finally:
                self._taps -= 1

        return tapped()

    def close(self) -> None:
        """Free the model and its caches. Closing twice is fine. Raises BusyError while another thread
        computes. In a forked process nothing is freed."""
        if self._closed or self.is_inherited:
            self._closed = True
            return
        with self._exclusive():
            with suppress(MllamaError):  # a device was lost
                self._session.save()
            for encoder in list(self._encoders):
                encoder.close()
            self._closed = True
            self._context.close()
            self._model.close()
            self._vocab.close()

    def __enter__(self) -> Mllama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Mllama({str(self.model_path)!r}{', closed' if self._closed else ''})"

    def _check_open(self) -> None:
        self.check_process()
        if self._closed:
            raise MllamaError(f"{self.model_path.name}: this Mllama is closed")

    @contextmanager
    def _exclusive(self, *, changes: bool = True, turn: int | None = None) -> Iterator[None]:
        """Sole use of the object.

        changes: the conversation in the caches becomes another one
        turn:    the conversation that must still be the one in the caches
        """
        self.check_process()
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "this Mllama is in use, by another thread or a callback; open one for each thread"
            )
        try:
            self._check_open()
            if turn is not None and turn != self._turn:
                raise MllamaError("this reply cannot go on: its Mllama was used for something else meanwhile")
            self._turn += changes
            yield
        finally:
            self._lock.release()


def _log_to_stderr() -> None:
    log = logging.getLogger("mllama_gguf")
    log.setLevel(logging.DEBUG)
    if not any(isinstance(handler, logging.StreamHandler) for handler in log.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
