"""`Mllama`: the simple face of one model with one conversation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

from .backend.callbacks import Progress
from .backend.types import Floats, Memory, Tap
from .decode.answers import Answers
from .decode.openai import Messages
from .decode.options import ReplyOptions
from .decode.reply import Reply
from .loaded import LoadedModel
from .settings import KvType, Precision, VisionPrecision
from .store.defaults import Defaults
from .vision.embedding import ImageEmbedding, ImageInput


class Mllama(LoadedModel, Answers):
    """A Llama 3.2 Vision model that answers about images.

        with Mllama("text.gguf", "mmproj.gguf") as model:
            print(model.caption("apple.png"))

    It is a `LoadedModel` with one conversation of its own. That is used by one thread at a time; a second
    thread gets BusyError immediately. For more threads there are more conversations (`conversation`), and
    `image_encoder` lets another thread encode images. Ctrl-C stops a computation within a fraction of a
    second with KeyboardInterrupt; the object stays usable.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        mmproj_path: str | os.PathLike[str] | None = None,
        *,
        n_gpu_layers: int | Literal["auto"] = "auto",
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
        precision: Precision = "fast",
        vision_precision: VisionPrecision = "exact",
        use_mmap: bool = True,
        repack: bool = False,
        max_tiles: int | None = None,
        allow_quantized_vision: bool = False,
        chat_template: str | None = None,
        image_cache: bool | str | os.PathLike[str] = True,
        defaults: Defaults | None = None,
        verbose: bool = False,
        progress: Progress | None = None,
        abort: Callable[[], bool] | None = None,
    ) -> None:
        """Load a model.

        model_path:     GGUF with the text model, or with all of it; or ollama:NAME[:TAG], hf:OWNER/REPO/FILE
        mmproj_path:    GGUF with vision encoder and projector, if they are not in model_path
        n_gpu_layers:   how many of the last layers (the output counts as one) go to GPU devices; -1: all;
                        0: none; "auto": as many as fit with a margin, fewer if a device still refuses; none
                        without GPUs and workers
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
        n_batch:        most tokens that are computed in one step
        n_threads:      CPU threads, 512 at most; None: all usable CPUs, fewer for a small model
        type_k, type_v: of the caches: "f32", "f16" (values up to 65504), or "q8_0" (self-attention only; V
                        needs flash_attn)
        precision:      of GPUs: "fast" rounds the factors of products, as docs/gpu.md tells; "exact" computes
                        them in F32, as the CPU does, which takes longer. One process has one precision
        vision_precision: of an encoder with F16 weights on the CPU: "exact" computes in F32; "bf16" rounds
                        weights and what they multiply to BF16, as with a BF16 file, where the processor has
                        instructions for that and they are faster. See docs/exactness.md for the error
        use_mmap:       let the CPU read weights from the file's pages instead of copying them. The file must
                        then stay as it is: the system ends the process (SIGBUS) if another program cuts it
                        short, and overwritten weights give wrong words. With isolate that is a BackendError
        repack:         copy the text's quantized matrices to the layouts of ggml's special CPU kernels, if it
                        has some for this processor: a slower load, more memory, and perhaps faster text; see
                        docs/performance-log.md
        max_tiles:      most tiles of an image; None: as many as the model knows (4). Every tile costs the
                        same time; with fewer of them small text and details of large images get lost
        allow_quantized_vision: take a projector with quantized matrices, which ruin the captions
        chat_template:  Jinja source in place of the file's
        image_cache:    keep the results of images on disk, where the environment says or the platform
                        keeps caches; a path: there; False: in memory only. See the module `cache.disk`
        defaults:       options, system message and first messages of replies, used where a call says
                        nothing; None: of ollama:NAME those of its manifest, else nothing
        verbose:        the log to stderr
        progress:       called with "load", "encode" or "prompt", how much is done, and of how much
        abort:          called every 50 ms while something computes; True stops it with Aborted

        Raises ModelError, BackendError, RequestError, Aborted.
        """
        super().__init__(
            model_path,
            mmproj_path,
            n_gpu_layers=n_gpu_layers,
            vision_device=vision_device,
            devices=devices,
            tensor_split=tensor_split,
            main_gpu=main_gpu,
            offload_kqv=offload_kqv,
            rpc_servers=rpc_servers,
            rpc_timeout=rpc_timeout,
            isolate=isolate,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_threads=n_threads,
            type_k=type_k,
            type_v=type_v,
            flash_attn=flash_attn,
            precision=precision,
            vision_precision=vision_precision,
            use_mmap=use_mmap,
            repack=repack,
            max_tiles=max_tiles,
            allow_quantized_vision=allow_quantized_vision,
            chat_template=chat_template,
            image_cache=image_cache,
            defaults=defaults,
            verbose=verbose,
            progress=progress,
            abort=abort,
        )
        try:
            self._conversation = self._open_conversation("Mllama")
        except BaseException:
            self.close()
            raise

    @property
    def n_ctx(self) -> int:
        """Most tokens of the conversation."""
        return self._conversation.n_ctx

    def memory(self) -> Memory:
        """Bytes of the weights, caches and compute buffers, now."""
        return self._conversation.memory()

    def encode_image(self, image: ImageInput, *, max_tiles: int | None = None) -> ImageEmbedding:
        """Run the vision encoder on an image. An image whose states are in memory or in the image cache is
        not computed again.

        max_tiles: most tiles of the image; None: as the setting says

        Raises ImageError, RequestError for a model without a vision encoder, Aborted.
        """
        return self._conversation.encode_image(image, max_tiles=max_tiles)

    @property
    def _model_name(self) -> str:
        return self._shared.model_name

    @property
    def _defaults(self) -> Defaults:
        return self.defaults

    def _begin_replies(self, messages: Messages, options: ReplyOptions, n: int) -> list[Reply]:
        return self._conversation._begin_replies(messages, options, n)

    def logits(self, token_ids: Sequence[int], images: Sequence[ImageInput] = ()) -> Floats:
        """The logits at every position of a prompt, from an empty cache: float32 [n_tokens, vocab_size].

        token_ids: with one image token for each of `images`, in order

        The caches hold the prompt afterwards. Raises ImageError, RequestError, ContextFullError, Aborted.
        """
        return self._conversation.logits(token_ids, images)

    def reset(self) -> None:
        """Clear the conversation and the states of all images, except those on disk."""
        self._conversation.reset()
        self._shared.images.clear()

    def tap(self, callback: Tap) -> AbstractContextManager[None]:
        """Look at intermediate tensors inside a with block; see `Context.tap`. For finding mistakes. Images
        are encoded there even if their states are known."""
        return self._conversation.tap(callback)
