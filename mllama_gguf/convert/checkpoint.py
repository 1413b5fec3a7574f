"""Read what a Hugging Face Mllama checkpoint says of itself: tensors, configuration, tokenizer. No weights
yet.

Everything is read directly from safetensors headers and JSON files, so neither torch nor transformers nor
tokenizers is needed. Whatever is wrong is a `ModelError` that names the file and the value.

References
- safetensors: https://github.com/huggingface/safetensors (README, "Format")
- Llama 3 RoPE factors: https://github.com/meta-llama/llama-models, ``apply_scaling``
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..vision.preprocess import IMAGE_MEAN, IMAGE_STD, supported_grids

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<|image|>"
SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 as its bits

# Split pattern of Llama 3's tokenizer (tokenizer.json, pre_tokenizer), which llama.cpp knows as "llama-bpe".
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ------------------------------------------------------------------------------------------------------------
# The directory and its tensors


@dataclass(frozen=True)
class Source:
    """Where one tensor of the checkpoint lies."""

    file: Path
    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file

    @property
    def item_size(self) -> int:
        return np.dtype(SAFETENSORS_TYPES[self.dtype]).itemsize


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ModelError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _read_safetensors_header(path: Path) -> dict[str, Source]:
    """The tensors of one safetensors file, with every offset checked against the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise ModelError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e}") from e
    except ValueError as e:
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"{path}: not a safetensors file: {e}") from e
    if not isinstance(header, dict):
        raise ModelError(f"{path}: not a safetensors file: the header is no JSON object")

    sources = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
            begin, end = (int(n) for n in info["data_offsets"])
        except (KeyError, TypeError, ValueError) as e:
            raise ModelError(f"{path}: tensor {name}: broken entry in the header: {info}") from e
        if dtype not in SAFETENSORS_TYPES:
            # Only an error for a tensor that we need; recorded with its type and found out then.
            sources[name] = Source(path, name, dtype, shape, 8 + length + begin)
            continue
        source = Source(path, name, dtype, shape, 8 + length + begin)
        n_bytes = math.prod(shape) * source.item_size
        if any(n < 0 for n in shape) or begin < 0 or end - begin != n_bytes:
            raise ModelError(
                f"{path}: tensor {name}: {end - begin} bytes for {dtype} {list(shape)}, {n_bytes} needed"
            )
        if 8 + length + end > size:
            raise ModelError(f"{path}: truncated: tensor {name} ends at byte {8 + length + end} of {size}")
        sources[name] = source
    return sources


def _old_name(name: str) -> str | None:
    """The name of a tensor with the prefixes of transformers up to 4.51 (None: not a weight).

    Newer versions write ``model.language_model.``, ``model.vision_model.``, ``model.multi_modal_projector.``
    and ``lm_head.``.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return None
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return old + name[len(new) :]
    return name


class Checkpoint:
    """A Hugging Face checkpoint directory: its JSON files and where its tensors lie. Holds no weights."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ModelError(f"{self.directory}: not a directory")
        self.config_file = self.directory / "config.json"
        self.config = _read_json(self.config_file)
        self.sources: dict[str, Source] = {}  # by old name
        for source in self._all_sources():
            name = _old_name(source.name)
            if name is None:
                continue
            if name in self.sources:
                raise ModelError(f"{source.file}: tensor {source.name} is also in {self.sources[name].file}")
            self.sources[name] = source

    def _all_sources(self) -> Iterator[Source]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index}: no weight_map")
            headers: dict[str, dict[str, Source]] = {}
            for name, file in weight_map.items():
                file = str(file)
                if Path(file).name != file:
                    raise ModelError(f"{index}: tensor {name}: {file!r} is not a plain file name")
                if file not in headers:
                    headers[file] = _read_safetensors_header(self.directory / file)
                if name not in headers[file]:
                    raise ModelError(
                        f"{self.directory / file}: tensor {name} is missing (it is named in {index.name})"
                    )
                yield headers[file][name]
        elif single.exists():
            yield from _read_safetensors_header(single).values()
        else:
            raise ModelError(f"{self.directory}: neither {single.name} nor {index.name}")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory, {} if it does not exist."""
        path = self.directory / name
        return _read_json(path) if path.exists() else {}


# ------------------------------------------------------------------------------------------------------------
# The configuration


@dataclass(frozen=True)
class Shape:
    """What the converter needs to know of config.json."""

    vocab_size: int
    image_token_id: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ctx: int
    rms_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    cross_layers: tuple[int, ...]
    vision_embd: int
    vision_layers: int
    vision_global_layers: int
    vision_head: int
    vision_ff: int
    vision_eps: float
    image_size: int
    patch_size: int
    channels: int
    max_tiles: int
    n_ratios: int
    intermediate: tuple[int, ...]

    @property
    def n_positions(self) -> int:
        """Patches of a tile and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


def read_shape(checkpoint: Checkpoint) -> Shape:
    """Read and check config.json. What it leaves out has the default of transformers, as it does there."""
    file, config = checkpoint.config_file, checkpoint.config

    def fail(key: str, value: object, why: str) -> ModelError:
        return ModelError(f"{file}: {key} = {value!r}: {why}")

    if config.get("model_type") != "mllama":
        raise fail("model_type", config.get("model_type"), "only mllama (Llama 3.2 Vision) is supported")
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict):
        raise fail("text_config", text, "an object is expected")
    if not isinstance(vision, dict):
        raise fail("vision_config", vision, "an object is expected")

    def count(section: dict[str, Any], name: str, key: str, default: int) -> int:
        value = section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise fail(f"{name}.{key}", value, "a positive whole number is expected")
        return value

    def real(section: dict[str, Any], name: str, key: str, default: float) -> float:
        value = section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise fail(f"{name}.{key}", value, "a positive number is expected")
        return float(value)

    def indices(
        section: dict[str, Any], name: str, key: str, below: int, default: list[int]
    ) -> tuple[int, ...]:
        value = section.get(key, default)
        if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < below for i in value):
            raise fail(f"{name}.{key}", value, f"a list of layers below {below} is expected")
        if not value or value != sorted(set(value)):
            # Meta's encoder goes through its layers and keeps those named: order and repetition mean nothing.
            raise fail(f"{name}.{key}", value, "different layers in rising order are expected")
        return tuple(value)

    t, v = "text_config", "vision_config"
    vocab_size = count(text, t, "vocab_size", 128256)
    n_embd, n_layer = count(text, t, "hidden_size", 4096), count(text, t, "num_hidden_layers", 40)
    n_head = count(text, t, "num_attention_heads", 32)
    n_head_kv = count(text, t, "num_key_value_heads", 8)
    head_dim = count(text, t, "head_dim", n_embd // n_head)
    if n_head % n_head_kv:
        raise fail(f"{t}.num_key_value_heads", n_head_kv, f"does not divide the {n_head} heads")
    if head_dim % 2:
        raise fail(f"{t}.head_dim", head_dim, "RoPE needs an even number")
    if text.get("hidden_act", "silu") != "silu":
        raise fail(f"{t}.hidden_act", text["hidden_act"], "only silu is supported")
    # transformers 5 keeps theta and scaling together in rope_parameters.
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if rope is not None and not isinstance(rope, dict):
        raise fail(f"{t}.rope_scaling", rope, "an object is expected")
    theta_section = rope if rope and "rope_theta" in rope else text
    cross = indices(text, t, "cross_attention_layers", n_layer, [3, 8, 13, 18, 23, 28, 33, 38])

    image_token_id = config.get("image_token_index", config.get("image_token_id", vocab_size))
    if (
        isinstance(image_token_id, bool)
        or not isinstance(image_token_id, int)
        or not 0 <= image_token_id <= vocab_size
    ):
        raise fail("image_token_index", image_token_id, f"a token up to {vocab_size} is expected")

    if vision.get("hidden_act", "gelu") != "gelu":
        raise fail(f"{v}.hidden_act", vision["hidden_act"], "only gelu is supported")
    vision_eps = real(vision, v, "norm_eps", 1e-5)
    if vision_eps != 1e-5:
        # layernorm_pre and layernorm_post have 1e-5 whatever norm_eps says; the file has one key for all.
        raise fail(f"{v}.norm_eps", vision_eps, "only 1e-5 is supported")
    vision_embd = count(vision, v, "hidden_size", 1280)
    # HF writes num_attention_heads or, as the attribute is named in its class, attention_heads.
    vision_head = count(
        vision, v, "attention_heads" if "attention_heads" in vision else "num_attention_heads", 16
    )
    if vision_embd % vision_head:
        raise fail(f"{v}.num_attention_heads", vision_head, f"does not divide the width {vision_embd}")
    image_size, patch_size = count(vision, v, "image_size", 448), count(vision, v, "patch_size", 14)
    if image_size % patch_size:
        raise fail(f"{v}.patch_size", patch_size, f"does not divide the image size {image_size}")
    max_tiles = count(vision, v, "max_num_tiles", 4)
    if max_tiles > 64:
        raise fail(f"{v}.max_num_tiles", max_tiles, "at most 64 are supported")
    grids = [list(grid) for grid in supported_grids(max_tiles)]
    ratios = vision.get("supported_aspect_ratios")
    if ratios is not None and ratios != grids:
        raise fail(f"{v}.supported_aspect_ratios", ratios, f"{grids} are expected for {max_tiles} tiles")
    vision_layers = count(vision, v, "num_hidden_layers", 32)
    channels = count(vision, v, "num_channels", 3)
    if channels != 3:
        raise fail(f"{v}.num_channels", channels, "only 3 is supported")

    return Shape(
        vocab_size=vocab_size,
        image_token_id=image_token_id,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=count(text, t, "intermediate_size", 14336),
        n_ctx=count(text, t, "max_position_embeddings", 131072),
        rms_eps=real(text, t, "rms_norm_eps", 1e-5),
        rope_theta=real(theta_section, t, "rope_theta", 500000.0),
        rope_scaling=rope,
        cross_layers=cross,
        vision_embd=vision_embd,
        vision_layers=vision_layers,
        vision_global_layers=count(vision, v, "num_global_layers", 8),
        vision_head=vision_head,
        vision_ff=count(vision, v, "intermediate_size", 5120),
        vision_eps=vision_eps,
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        max_tiles=max_tiles,
        n_ratios=len(grids),
        intermediate=indices(vision, v, "intermediate_layers_indices", vision_layers, [3, 7, 15, 23, 30]),
    )


def rope_factors(shape: Shape, file: Path) -> npt.NDArray[np.float32] | None:
    """What each RoPE frequency is divided by, [head_dim / 2]; None if there is no scaling.

    Long waves are slowed down by ``factor``, short ones are kept, those between are interpolated: Meta's
    ``apply_scaling``.
    """
    scaling = shape.rope_scaling
    kind = "default" if not scaling else scaling.get("rope_type", scaling.get("type", "default"))
    if not scaling or kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"{file}: text_config.rope_scaling.rope_type = {kind!r}: only llama3 is supported")
    values = {}
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ModelError(
                f"{file}: text_config.rope_scaling.{key} = {value!r}: a positive number is expected"
            )
        values[key] = float(value)
    factor, low, high, n_orig = values.values()
    if high <= low:
        raise ModelError(
            f"{file}: text_config.rope_scaling.high_freq_factor = {high}: not above low_freq_factor = {low}"
        )
    half = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    turns = n_orig / (2 * np.pi * shape.rope_theta**half)  # full turns within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def check_preprocessor(checkpoint: Checkpoint, shape: Shape) -> None:
    """Refuse a model whose pictures are prepared otherwise than ours: the file has no keys for that."""
    settings = checkpoint.json("preprocessor_config.json")
    file = checkpoint.directory / "preprocessor_config.json"
    size = {"height": shape.image_size, "width": shape.image_size}
    for key, expected in (("size", size), ("max_image_tiles", shape.max_tiles)):
        if settings.get(key, expected) != expected:
            raise ModelError(f"{file}: {key} = {settings[key]!r}: {expected!r} expected from config.json")
    for key, numbers in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        value = settings.get(key, list(numbers))
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not np.allclose(value, numbers, rtol=0, atol=1e-6)
        ):
            raise ModelError(f"{file}: {key} = {value!r}: only CLIP's {list(numbers)} is supported")


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer as GGUF stores it."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    add_bos: bool
    special: dict[str, int]  # bos, eos, eot, eom, padding: token ids
    eos_ids: list[int]
    chat_template: str | None


_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type


def read_tokenizer(checkpoint: Checkpoint, shape: Shape) -> Tokenizer:
    """Read tokenizer.json and the small JSON files beside it."""
    file = checkpoint.directory / "tokenizer.json"
    data = _read_json(file)
    model = data.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        raise ModelError(f"{file}: model.type: only a BPE vocabulary is supported")
    n_tokens = shape.vocab_size + 1
    tokens: list[str | None] = [None] * n_tokens
    types = [_UNUSED] * n_tokens

    def put(token: object, i: object, kind: int) -> None:
        if (
            not isinstance(token, str)
            or isinstance(i, bool)
            or not isinstance(i, int)
            or not 0 <= i < n_tokens
        ):
            raise ModelError(
                f"{file}: token {token!r} has id {i!r}: an id up to {shape.vocab_size} is expected"
            )
        if tokens[i] not in (None, token):
            raise ModelError(f"{file}: tokens {tokens[i]!r} and {token!r} have the same id {i}")
        tokens[i], types[i] = token, kind

    for token, i in model["vocab"].items():
        put(token, i, _NORMAL)
    for entry in data.get("added_tokens") or []:
        if not isinstance(entry, dict):
            raise ModelError(f"{file}: added_tokens: an object is expected, not {entry!r}")
        put(entry.get("content"), entry.get("id"), _CONTROL if entry.get("special", True) else _USER_DEFINED)
    if tokens[shape.image_token_id] is None:
        tokens[shape.image_token_id] = IMAGE_TOKEN
    if tokens[shape.image_token_id] != IMAGE_TOKEN:
        other = tokens[shape.image_token_id]
        raise ModelError(
            f"{file}: token {shape.image_token_id} is {other!r}: the configuration says {IMAGE_TOKEN!r}"
        )
    types[shape.image_token_id] = _CONTROL
    names = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(names)}
    if len(ids) != n_tokens:
        double = next(token for i, token in enumerate(names) if ids[token] != i)
        raise ModelError(f"{file}: token {double!r} occurs twice")

    merges = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(s, str) and s and " " not in s for s in pair)
        ):
            raise ModelError(f"{file}: merge {merge!r}: a pair of byte-level tokens is expected")
        merges.append(f"{pair[0]} {pair[1]}")

    settings = checkpoint.json("tokenizer_config.json")
    special_map = checkpoint.json("special_tokens_map.json")
    generation = checkpoint.json("generation_config.json")
    text_config = checkpoint.config["text_config"]

    def token_id(role: str) -> int | None:
        for section in (settings, special_map):
            value = section.get(f"{role}_token")
            content = value.get("content") if isinstance(value, dict) else value
            if content is not None:
                if content not in ids:
                    raise ModelError(
                        f"{checkpoint.directory}: {role}_token {content!r} is not in {file.name}"
                    )
                return ids[content]
        for section in (generation, checkpoint.config, text_config):
            value = section.get(f"{role}_token_id")
            value = value[-1] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < n_tokens:
                return value
        return None

    special: dict[str, int] = {}
    for name, found in (
        ("bos", token_id("bos")),
        ("eos", token_id("eos")),
        ("eot", ids.get("<|eot_id|>")),
        ("eom", ids.get("<|eom_id|>")),
        ("padding", token_id("pad")),
    ):
        if found is not None:
            special[name] = found
    if "bos" not in special or "eos" not in special:
        raise ModelError(f"{checkpoint.directory}: tokenizer_config.json: bos_token or eos_token is missing")
    ends = generation.get("eos_token_id", text_config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    eos_ids = {i for i in ends if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < n_tokens}
    eos_ids.add(special["eos"])

    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = _template_adds(data.get("post_processor"), names[special["bos"]])
    if not model.get("ignore_merges", False):
        logger.info(
            "%s: model.ignore_merges is off, llama.cpp always treats llama-bpe as if it were on", file
        )
    return Tokenizer(
        pre=_pre_tokenizer(file, data.get("pre_tokenizer")),
        tokens=names,
        types=types,
        merges=merges,
        add_bos=add_bos,
        special=special,
        eos_ids=sorted(eos_ids),
        chat_template=_chat_template(checkpoint, settings),
    )


def _parts(node: object, key: str) -> list[dict[str, Any]]:
    """The members of a tokenizers' Sequence, or the one that is there."""
    if not isinstance(node, dict):
        return []
    members = node.get(key) if node.get("type") == "Sequence" else [node]
    return [m for m in members or [] if isinstance(m, dict)]


def _template_adds(post_processor: object, token: str) -> bool:
    for part in _parts(post_processor, "processors"):
        first = (part.get("single") or [None])[0] if part.get("type") == "TemplateProcessing" else None
        if isinstance(first, dict) and isinstance(first.get("SpecialToken"), dict):
            return bool(first["SpecialToken"].get("id") == token)
    return False


def _pre_tokenizer(file: Path, node: object) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    parts = _parts(node, "pretokenizers")
    if any(part.get("type") == "ByteLevel" for part in parts):
        splits = [part.get("pattern") for part in parts if part.get("type") == "Split"]
        if splits == [{"Regex": LLAMA3_SPLIT}]:
            return "llama-bpe"
        if not splits and any(part.get("use_regex", True) for part in parts):
            return "gpt-2"
    raise ModelError(f"{file}: pre_tokenizer: only Llama 3's and GPT-2's are supported")


def _chat_template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    """The chat template: the processor's own file first, as transformers does."""
    path = checkpoint.directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ModelError(f"{path}: cannot be read: {e}") from e
    for template in (
        checkpoint.json("chat_template.json").get("chat_template"),
        settings.get("chat_template"),
    ):
        if isinstance(template, list):  # named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default", next(iter(named.values()), None))
        if isinstance(template, str) and template:
            return template
    return None
