"""The parts of a loaded model that all its conversations use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..backend.opening import Backend
from ..cache.disk import ImageCache
from ..cache.keys import Keys, KeySettings
from ..settings import Settings
from ..store.defaults import Defaults
from ..text.chat import LLAMA_3_2_TEMPLATE, ChatTemplate
from ..text.vocab import Vocab
from ..vision.images import Images
from ..vision.preprocess import PREPROCESS_VERSION


@dataclass(frozen=True)
class Shared:
    """Weights, vocabulary, chat template, images and their caches. All of it is safe from several threads.

    file_name:  of the model, for errors
    model_name: of the model, for replies
    disk:       the image cache; None: there is none
    defaults:   of replies
    """

    file_name: str
    model_name: str
    backend: Backend
    vocab: Vocab
    template: ChatTemplate
    images: Images
    keys: Keys
    disk: ImageCache | None
    defaults: Defaults


def share(
    backend: Backend,
    vocab: Vocab,
    model_path: Path,
    mmproj_path: Path | None,
    settings: Settings,
    defaults: Defaults,
) -> Shared:
    """The shared parts of a model that is open."""
    hparams = backend.model.hparams
    own_template = LLAMA_3_2_TEMPLATE if defaults.llama_template else vocab.chat_template
    template = ChatTemplate(
        settings.chat_template or own_template,
        bos=vocab.text(vocab.bos),
        eos=vocab.text(vocab.eos),
        image=vocab.text(hparams.image_token_id) if hparams.has_vision else "<|image|>",
        special=vocab.special,
    )
    disk = _image_cache(settings)
    keys = Keys(backend.model, model_path, mmproj_path, _key_settings(backend), disk)
    return Shared(
        file_name=model_path.name,
        model_name=str(vocab.metadata.get("general.name") or model_path.stem),
        backend=backend,
        vocab=vocab,
        template=template,
        images=Images(hparams, model_path.name, keys, disk, settings.max_tiles),
        keys=keys,
        disk=disk,
        defaults=defaults,
    )


def _image_cache(settings: Settings) -> ImageCache | None:
    if settings.image_cache is False:
        return None
    disk = ImageCache(None if settings.image_cache is True else settings.image_cache)
    return disk if disk.max_bytes > 0 else None


def _key_settings(backend: Backend) -> KeySettings:
    s = backend.settings
    return KeySettings(
        preprocess=PREPROCESS_VERSION,
        cpu_kernel=backend.cpu_kernel,
        flash_attn=s.flash_attn,
        precision=s.precision,
        type_k=s.type_k,
        type_v=s.type_v,
        offload_kqv=s.offload_kqv,
        repack=s.repack,
        n_batch=s.n_batch,
    )
