"""Random Mllama checkpoints of a few hundred kilobytes, as Hugging Face directories, made with numpy alone.

Each architecture stresses something that the published models do not vary. The weights are such that every
part of the model matters: gates from 0.3 to 1.5, norms away from 1, biases away from 0, attention that is not
flat. They depend on nothing but the name of the architecture and the seed: they come from the raw bits of
PCG64, whose stream numpy promises to keep, by exact arithmetic.

    python tests/tiny.py DIR    writes every architecture to DIR/<name>

The number of positions of a tile (patches of a square, and the class token) modulo 8 can only be 1, 2 or 5.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The special tokens of Llama 3.2 in their order; they are the last ones of the vocabulary.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
IMAGE_TOKEN = "<|image|>"
WORDS = (
    "the user assistant system describe this image a apple is of picture red cat dog blue on left to right"
    " and what in green one two three there it you are see I can black white under over with house tree bird"
)
# In the manner of Llama 3.2 Vision's template: an image part becomes one token.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def _llama3(original: int = 8192, factor: float = 8.0, low: float = 1.0, high: float = 4.0) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


@dataclass(frozen=True, eq=False)
class Arch:
    """One architecture. The names are those of config.json where it has them."""

    name: str
    # vision
    image_size: int
    patch_size: int
    vision_width: int
    vision_heads: int
    vision_ff: int
    local_layers: int
    global_layers: int
    intermediate: tuple[int, ...]
    # text
    width: int
    heads: int
    kv_heads: int
    ff: int
    layers: int
    cross_layers: tuple[int, ...]
    vocab_size: int
    max_tiles: int = 4
    rms_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict[str, Any] = field(default_factory=_llama3)
    max_positions: int = 131072
    dtype: str = "F32"  # of the checkpoint
    vision_scale: float = 1.0  # of what enters the first LayerNorm: when small, its epsilon shows

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def n_positions(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of the aspect ratio ids 1, 2, ..."""
        n = range(1, self.max_tiles + 1)
        return [(rows, columns) for rows in n for columns in n if rows * columns <= self.max_tiles]

    @property
    def image_token(self) -> int:
        return self.vocab_size

    def special(self, token: str) -> int:
        return self.vocab_size - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(token)


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        # Square heads; 17 positions (% 8 = 1); the last layer cross-attends; intermediate layer 0.
        Arch(
            "square",
            image_size=28,
            patch_size=7,
            vision_width=32,
            vision_heads=4,
            vision_ff=64,
            local_layers=4,
            global_layers=2,
            intermediate=(0, 1, 3),
            width=64,
            heads=4,
            kv_heads=4,
            ff=96,
            layers=4,
            cross_layers=(1, 3),
            vocab_size=320,
        ),
        # GQA of 3; 10 positions (% 8 = 2); the first layer cross-attends; FFNs that are no multiple of the
        # width; the first and the last intermediate layer; RoPE factors that act within a short prompt;
        # vision inputs so small that the epsilon of LayerNorm shows.
        Arch(
            "gqa",
            image_size=30,
            patch_size=10,
            vision_width=48,
            vision_heads=3,
            vision_ff=100,
            local_layers=5,
            global_layers=1,
            intermediate=(0, 3, 4),
            width=96,
            heads=6,
            kv_heads=2,
            ff=200,
            layers=5,
            cross_layers=(0, 3),
            vocab_size=333,
            rope_theta=10000.0,
            rope_scaling=_llama3(original=64),
            vision_scale=0.05,
        ),
        # 37 positions (% 8 = 5); vision head 40, text head 64, one KV head; three cross-attention layers, two
        # adjacent.
        Arch(
            "wide",
            image_size=24,
            patch_size=4,
            vision_width=80,
            vision_heads=2,
            vision_ff=120,
            local_layers=3,
            global_layers=3,
            intermediate=(0, 2),
            width=128,
            heads=2,
            kv_heads=1,
            ff=144,
            layers=6,
            cross_layers=(1, 2, 5),
            vocab_size=400,
            rms_eps=1e-3,
            rope_scaling=_llama3(original=256, factor=32.0, low=1.0, high=8.0),
        ),
        # Two tiles, three grids; 26 positions (% 8 = 2); vision head 20; no RoPE scaling; one intermediate
        # layer.
        Arch(
            "twotiles",
            image_size=20,
            patch_size=4,
            vision_width=40,
            vision_heads=2,
            vision_ff=72,
            local_layers=2,
            global_layers=1,
            intermediate=(1,),
            width=64,
            heads=2,
            kv_heads=2,
            ff=112,
            layers=3,
            cross_layers=(0, 1),
            vocab_size=300,
            max_tiles=2,
            rope_theta=100000.0,
            rope_scaling={"rope_type": "default"},
            max_positions=2048,
        ),
        # Three tiles, five grids; 5 positions (% 8 = 5); heads of 80 and 128 as in the published models; a
        # bfloat16 checkpoint.
        Arch(
            "threetiles",
            image_size=12,
            patch_size=6,
            vision_width=160,
            vision_heads=2,
            vision_ff=200,
            local_layers=3,
            global_layers=2,
            intermediate=(1, 2),
            width=256,
            heads=2,
            kv_heads=1,
            ff=272,
            layers=3,
            cross_layers=(2,),
            vocab_size=512,
            max_tiles=3,
            dtype="BF16",
        ),
        # Every row of a text matrix is a multiple of 256 long, so that all quantized types can hold them.
        Arch(
            "quant",
            image_size=32,
            patch_size=8,
            vision_width=64,
            vision_heads=2,
            vision_ff=128,
            local_layers=3,
            global_layers=1,
            intermediate=(0, 1, 2),
            width=256,
            heads=8,
            kv_heads=4,
            ff=512,
            layers=4,
            cross_layers=(1, 3),
            vocab_size=384,
            rope_scaling=_llama3(original=128),
        ),
    )
}


class Stream:
    """Random numbers that are the same on every machine and with every version of numpy."""

    def __init__(self, *key: int | str) -> None:
        seed = [zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key]
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def uniform(self, *shape: int) -> npt.NDArray[np.float64]:
        """In [0, 1), multiples of 2**-24."""
        n = int(np.prod(shape, dtype=np.int64))
        raw = np.asarray(self._bits.random_raw(n), dtype=np.uint64)
        return np.asarray((raw >> np.uint64(40)).astype(np.float64) * 2.0**-24).reshape(shape)

    def noise(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> npt.NDArray[np.float32]:
        """Uniform, of the given mean and standard deviation."""
        values = mean + scale * (self.uniform(*shape) - 0.5) * 12.0**0.5
        return np.asarray(values, dtype=np.float32)

    def integers(self, below: int, n: int) -> list[int]:
        return [int(x) for x in (self.uniform(n) * below).astype(np.int64)]


def make_weights(arch: Arch, seed: int = 0) -> Weights:
    """The state dict under the names of transformers up to 4.51, in a fixed order."""
    stream = Stream("weights", arch.name, seed)
    w: Weights = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        w[f"{name}.weight"] = stream.noise(rows, columns, scale=gain * columns**-0.5)

    def norm(name: str, n: int, bias: bool = False) -> None:
        w[f"{name}.weight"] = stream.noise(n, scale=0.25, mean=1.0)
        if bias:
            w[f"{name}.bias"] = stream.noise(n, scale=0.25)

    def gate(name: str) -> None:
        size, sign = stream.uniform(2)
        w[name] = np.array([(0.3 + 1.2 * size) * (1 if sign < 0.5 else -1)], dtype=np.float32)

    d, q, kv = arch.width, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    text = "language_model.model"
    w[f"{text}.embed_tokens.weight"] = stream.noise(arch.vocab_size + 8, d)
    for i in range(arch.layers):
        layer = f"{text}.layers.{i}"
        norm(f"{layer}.input_layernorm", d)
        if i in arch.cross_layers:
            matrix(f"{layer}.cross_attn.q_proj", q, d)
            matrix(f"{layer}.cross_attn.k_proj", kv, d)
            matrix(f"{layer}.cross_attn.v_proj", kv, d)
            matrix(f"{layer}.cross_attn.o_proj", d, q)
            norm(f"{layer}.cross_attn.q_norm", arch.head_dim)
            norm(f"{layer}.cross_attn.k_norm", arch.head_dim)
            gate(f"{layer}.cross_attn_attn_gate")
            gate(f"{layer}.cross_attn_mlp_gate")
        else:
            matrix(f"{layer}.self_attn.q_proj", q, d, gain=1.3)
            matrix(f"{layer}.self_attn.k_proj", kv, d, gain=1.3)
            matrix(f"{layer}.self_attn.v_proj", kv, d)
            matrix(f"{layer}.self_attn.o_proj", d, q)
        norm(f"{layer}.post_attention_layernorm", d)
        matrix(f"{layer}.mlp.gate_proj", arch.ff, d)
        matrix(f"{layer}.mlp.up_proj", arch.ff, d)
        matrix(f"{layer}.mlp.down_proj", d, arch.ff)
    norm(f"{text}.norm", d)
    matrix("language_model.lm_head", arch.vocab_size, d)

    vd, ids, scale = arch.vision_width, len(arch.grids) + 1, arch.vision_scale
    w["vision_model.class_embedding"] = stream.noise(vd, scale=scale)
    patch = (vd, 3, arch.patch_size, arch.patch_size)
    w["vision_model.patch_embedding.weight"] = stream.noise(
        *patch, scale=scale * (3 * arch.patch_size**2) ** -0.5
    )
    table = "vision_model.gated_positional_embedding"
    w[f"{table}.embedding"] = stream.noise(arch.n_positions, vd, scale=scale)
    gate(f"{table}.gate")
    w[f"{table}.tile_embedding.weight"] = stream.noise(
        ids, arch.max_tiles * arch.n_positions * vd, scale=scale
    )
    for which in ("pre", "post"):
        table = f"vision_model.{which}_tile_positional_embedding"
        w[f"{table}.embedding.weight"] = stream.noise(
            ids, arch.max_tiles * vd, scale=scale if which == "pre" else 1.0
        )
        gate(f"{table}.gate")
    norm("vision_model.layernorm_pre", vd, bias=True)
    norm("vision_model.layernorm_post", vd, bias=True)
    for group, n in (("transformer", arch.local_layers), ("global_transformer", arch.global_layers)):
        for i in range(n):
            layer = f"vision_model.{group}.layers.{i}"
            norm(f"{layer}.input_layernorm", vd, bias=True)
            matrix(f"{layer}.self_attn.q_proj", vd, vd, gain=1.3)
            matrix(f"{layer}.self_attn.k_proj", vd, vd, gain=1.3)
            matrix(f"{layer}.self_attn.v_proj", vd, vd)
            matrix(f"{layer}.self_attn.o_proj", vd, vd)
            norm(f"{layer}.post_attention_layernorm", vd, bias=True)
            matrix(f"{layer}.mlp.fc1", arch.vision_ff, vd)
            w[f"{layer}.mlp.fc1.bias"] = stream.noise(arch.vision_ff, scale=0.25)
            matrix(f"{layer}.mlp.fc2", vd, arch.vision_ff)
            w[f"{layer}.mlp.fc2.bias"] = stream.noise(vd, scale=0.25)
            if group == "global_transformer":
                gate(f"{layer}.gate_attn")
                gate(f"{layer}.gate_ffn")
    matrix("multi_modal_projector", d, vd * (1 + len(arch.intermediate)))
    w["multi_modal_projector.bias"] = stream.noise(d, scale=0.25)
    return w


def unused_tiles_zero(arch: Arch, weights: Weights) -> Weights:
    """The weights with tile tables as the published models have them: zero for the tiles that a grid does not
    use. Changes them in place."""
    for name in (
        "gated_positional_embedding.tile_embedding.weight",
        "pre_tile_positional_embedding.embedding.weight",
        "post_tile_positional_embedding.embedding.weight",
    ):
        table = weights[f"vision_model.{name}"].reshape(len(arch.grids) + 1, arch.max_tiles, -1)
        for i, (rows, columns) in enumerate(arch.grids, 1):
            table[i, rows * columns :] = 0.0
    return weights


def make_config(arch: Arch) -> dict[str, Any]:
    ids = {
        "bos_token_id": arch.special("<|begin_of_text|>"),
        "eos_token_id": arch.special("<|eot_id|>"),
        "pad_token_id": arch.special("<|finetune_right_pad_id|>"),
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": arch.image_token,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[arch.dtype],
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": arch.vocab_size,
            "hidden_size": arch.width,
            "hidden_act": "silu",
            "intermediate_size": arch.ff,
            "num_hidden_layers": arch.layers,
            "num_attention_heads": arch.heads,
            "num_key_value_heads": arch.kv_heads,
            "cross_attention_layers": list(arch.cross_layers),
            "max_position_embeddings": arch.max_positions,
            "rms_norm_eps": arch.rms_eps,
            "rope_theta": arch.rope_theta,
            "rope_scaling": arch.rope_scaling,
            "tie_word_embeddings": False,
            **ids,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": arch.vision_width,
            "hidden_act": "gelu",
            "intermediate_size": arch.vision_ff,
            "num_hidden_layers": arch.local_layers,
            "num_global_layers": arch.global_layers,
            "attention_heads": arch.vision_heads,
            "num_channels": 3,
            "vision_output_dim": arch.vision_width * (1 + len(arch.intermediate)),
            "image_size": arch.image_size,
            "patch_size": arch.patch_size,
            "norm_eps": 1e-5,
            "max_num_tiles": arch.max_tiles,
            "intermediate_layers_indices": list(arch.intermediate),
            "supported_aspect_ratios": [list(grid) for grid in arch.grids],
        },
    }


def byte_tokens() -> list[str]:
    """The character that stands for each byte in byte-level BPE: printable ones for themselves, the rest from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(rest)) for b in range(256)]


def make_tokenizer(arch: Arch) -> dict[str, dict[str, Any]]:
    """tokenizer.json and the files beside it: all bytes, as many words as there is room for, the special
    tokens."""
    characters = byte_tokens()
    n_plain = arch.vocab_size - len(SPECIAL_TOKENS)
    tokens, merges = list(characters), []
    known = set(tokens)
    for word in WORDS.split(" "):
        for text in (" " + word, word):
            parts = [characters[b] for b in text.encode()]
            left = parts[0]
            for right in parts[1:]:
                if left + right not in known and len(tokens) < n_plain:
                    tokens.append(left + right)
                    known.add(left + right)
                    merges.append([left, right])
                left += right
    tokens += [f"<unused{i}>" for i in range(n_plain - len(tokens))]
    added = {arch.special(token): token for token in SPECIAL_TOKENS} | {arch.image_token: IMAGE_TOKEN}
    bos, eos, pad = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    first, text_a, text_b = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        *({"Sequence": {"id": s, "type_id": 0}} for s in "AB"),
    )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, "special": True, **plain} for i, token in added.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": LLAMA3_SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [
                byte_level,
                {
                    "type": "TemplateProcessing",
                    "single": [first, text_a],
                    "pair": [first, text_a, first, text_b],
                    "special_tokens": {bos: {"id": bos, "ids": [arch.special(bos)], "tokens": [bos]}},
                },
            ],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "chat_template": CHAT_TEMPLATE,
            "model_input_names": ["input_ids", "attention_mask"],
            "added_tokens_decoder": {
                str(i): {"content": t, "special": True, **plain} for i, t in added.items()
            },
        },
        "special_tokens_map.json": {"bos_token": bos, "eos_token": eos, "pad_token": pad},
        "generation_config.json": {
            "bos_token_id": arch.special(bos),
            "eos_token_id": [arch.special(t) for t in ("<|end_of_text|>", "<|eom_id|>", eos)],
            "pad_token_id": arch.special(pad),
        },
        "preprocessor_config.json": {
            "image_processor_type": "MllamaImageProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_image_tiles": arch.max_tiles,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": arch.image_size, "width": arch.image_size},
        },
    }


def new_name(name: str) -> str:
    """A tensor's name with the prefixes of transformers from 4.52 on."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_model.", "model.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(name)


def encode(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian bytes of a safetensors type, rounded to nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bytes(rounded.astype("<u2").tobytes())
    return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: Weights, dtype: str = "F32") -> None:
    """https://github.com/huggingface/safetensors: length of the header, the header in JSON, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, blobs = 0, []
    for name, values in tensors.items():
        blob = encode(values, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def make_checkpoint(
    arch: Arch,
    directory: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    new_names: bool = False,
    dtype: str | None = None,
    weights: Weights | None = None,
) -> Path:
    """Write a checkpoint directory as transformers would. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = dtype or arch.dtype
    weights = make_weights(arch, seed) if weights is None else weights
    if new_names:
        weights = {new_name(name): values for name, values in weights.items()}
    if shards == 1:
        write_safetensors(directory / "model.safetensors", weights, dtype)
    else:
        names, weight_map = list(weights), {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: weights[name] for name in names[i::shards]}
            write_safetensors(directory / file, part, dtype)
            weight_map.update(dict.fromkeys(part, file))
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", make_config(arch))
    for name, value in make_tokenizer(arch).items():
        write_json(directory / name, value)
    return directory


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def make_pixels(arch: Arch, aspect_ratio_id: int, *key: int | str) -> npt.NDArray[np.float32]:
    """Random normalised pixels [max_tiles, 3, S, S]; the tiles beyond the grid are zero as the preprocessor
    leaves them."""
    rows, columns = arch.grids[aspect_ratio_id - 1]
    pixels = np.zeros((arch.max_tiles, 3, arch.image_size, arch.image_size), dtype=np.float32)
    used = Stream("pixels", arch.name, aspect_ratio_id, *key).noise(rows * columns, *pixels.shape[1:])
    pixels[: rows * columns] = used
    return pixels


def main() -> None:
    for arch in ARCHS.values():
        print(make_checkpoint(arch, Path(sys.argv[1]) / arch.name))


if __name__ == "__main__":
    main()
