"""Writes the random models of tests/tiny.py in every layout that is in use, straight from their weights.

Nothing of the package is used, the converter least of all: this follows the description of the layouts, so
that converter, loader and this file check each other. The `gguf` package writes the files, split ones too.

    canonical  text and projector in two files, or one
    A          two files (Ollama 0.4 to 0.6, Hugging Face hub): ln1, ln2, attn_out; ffn_down is fc1
    B          one file (Ollama since 0.7): rows of q and k of the vision layers and of the cross-attention
               are in RoPE order

    python tests/layouts.py DIR    writes small models of all layouts to DIR, the corpus of native/fuzz
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import tiny

Layout = Literal["canonical", "A", "B"]
Array = npt.NDArray[Any]
Keys = dict[str, Any]

EPSILON_KEY = "mllama.vision.attention.layer_norm_epsilon"
CHANNELS_KEY = "mllama.vision.num_channels"
CONVERTER_KEY = "mllama.converter"


def write(
    arch: tiny.Arch,
    directory: Path,
    layout: Layout,
    *,
    one_file: bool = False,
    swap_ffn: bool | None = None,
    without: Collection[str] = (),
    keys: Mapping[str, Any] | None = None,
    f16: Collection[str] = (),
    split: int = 0,
    big_endian: bool = False,
) -> list[Path]:
    """Write a model and return what to open: the text file and the projector, or one file.

    one_file: canonical only; A always has two files, B one
    swap_ffn: exchange the names ffn_up and ffn_down in the vision layers; None: as the layout does
    without: keys and tensors to leave out
    keys: to add, or to put in place of others
    f16: ends of names of tensors to round to F16
    split: most tensors in a file; 0: do not split
    """
    weights = stored_weights(arch)
    swap = layout == "A" if swap_ffn is None else swap_ffn
    text = text_tensors(arch, weights, permute_cross=layout == "B")
    vision = vision_tensors(arch, weights, a_names=layout == "A", swap_ffn=swap, permute=layout == "B")
    text_head, vision_head = text_keys(arch), vision_keys(arch)
    if layout == "A":
        vision_head["mllama.vision.projection_dim"] = arch.width
    if layout == "canonical":
        text_head[CONVERTER_KEY] = vision_head[CONVERTER_KEY] = "tests/layouts.py"
    if layout == "B" or one_file:
        parts = [(f"{layout}.gguf", text_head | vision_head, text | vision)]
    else:
        parts = [
            (f"{layout}.text.gguf", {"general.type": "model"} | text_head, text),
            (f"{layout}.mmproj.gguf", {"general.type": "projector"} | vision_head, vision),
        ]
    directory.mkdir(parents=True, exist_ok=True)
    return [
        save(
            directory / name,
            {key: value for key, value in (head | dict(keys or {})).items() if key not in without},
            {
                name: value.astype(np.float16) if name.endswith(tuple(f16)) else value
                for name, value in tensors.items()
                if name not in without
            },
            split,
            big_endian,
        )
        for name, head, tensors in parts
    ]


def save(path: Path, keys: Keys, tensors: dict[str, Array], split: int = 0, big_endian: bool = False) -> Path:
    """Write one GGUF, or its parts; returns the file to open."""
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "mllama", endianess=order, split_max_tensors=split)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split else []
    return parts[-1] if parts else path


def stored_weights(arch: tiny.Arch) -> tiny.Weights:
    """The weights as the checkpoint of the architecture holds them."""
    weights = tiny.make_weights(arch)
    if arch.dtype != "BF16":
        return weights
    return {
        name: (np.frombuffer(tiny.encode(values, "BF16"), "<u2").astype("<u4") << 16)
        .view("<f4")
        .reshape(values.shape)
        for name, values in weights.items()
    }


def rope_order(rows: Array, head_dim: int) -> Array:
    """The rows of each head, from halves (0 ... d/2-1, d/2 ... d-1) to pairs (0, d/2, 1, d/2+1, ...)."""
    pairs = [half * (head_dim // 2) + i for i in range(head_dim // 2) for half in (0, 1)]
    order = [first + i for first in range(0, len(rows), head_dim) for i in pairs]
    return rows[order]


def rope_freqs(arch: tiny.Arch) -> Array | None:
    """What ggml divides the frequencies of RoPE by: long waves are stretched, with a ramp between."""
    s = arch.rope_scaling
    if s["rope_type"] != "llama3":
        return None
    original = s["original_max_position_embeddings"]
    wave = 2 * np.pi * arch.rope_theta ** (np.arange(0, arch.head_dim, 2) / arch.head_dim)
    ramp = (original / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    ramp = np.clip(ramp, 0, 1)
    return np.asarray(1 / ((1 - ramp) / s["factor"] + ramp), np.float32)


def text_tensors(arch: tiny.Arch, w: tiny.Weights, permute_cross: bool) -> dict[str, Array]:
    """The text model's tensors. permute_cross: make B's mistake, with q and k of the cross-attention but not
    with their norms."""
    old = "language_model.model"
    tensors: dict[str, Array] = {"token_embd.weight": w[f"{old}.embed_tokens.weight"]}
    freqs = rope_freqs(arch)
    if freqs is not None:
        tensors["rope_freqs.weight"] = freqs
    for i in range(arch.layers):
        for new, name in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            tensors[f"blk.{i}.{new}.weight"] = w[f"{old}.layers.{i}.{name}.weight"]
        if i in arch.cross_layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
                values = w[f"{old}.layers.{i}.cross_attn.{name}.weight"]
                if permute_cross and name in ("q_proj", "k_proj"):
                    values = rope_order(values, arch.head_dim)
                tensors[f"blk.{i}.cross_attn_{name}.weight"] = values
            for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                tensors[f"blk.{i}.{name}"] = w[f"{old}.layers.{i}.{name}"]
        else:
            for new, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
                values = w[f"{old}.layers.{i}.self_attn.{name}.weight"]
                tensors[f"blk.{i}.attn_{new}.weight"] = (
                    rope_order(values, arch.head_dim) if new in "qk" else values
                )
    tensors["output_norm.weight"] = w[f"{old}.norm.weight"]
    tensors["output.weight"] = w["language_model.lm_head.weight"]
    return tensors


def vision_tensors(
    arch: tiny.Arch, w: tiny.Weights, *, a_names: bool, swap_ffn: bool, permute: bool
) -> dict[str, Array]:
    """Encoder and projector. permute: rows of q and k in RoPE order, which changes nothing there."""

    def tanh(name: str) -> Array:
        return np.tanh(w[name].astype(np.float64)).astype(np.float32)

    v, positions = "vision_model", "vision_model.gated_positional_embedding"
    tensors: dict[str, Array] = {
        "v.class_embd": w[f"{v}.class_embedding"],
        "v.patch_embd.weight": w[f"{v}.patch_embedding.weight"],
        "v.position_embd.weight": w[f"{positions}.embedding"],
        "v.position_embd.gate": 1 - tanh(f"{positions}.gate"),
        "v.tile_position_embd.weight": w[f"{positions}.tile_embedding.weight"],
        "v.tile_position_embd.gate": tanh(f"{positions}.gate"),
    }
    for which in ("pre", "post"):
        table = f"{v}.{which}_tile_positional_embedding"
        tensors[f"v.{which}_tile_position_embd.weight"] = w[f"{table}.embedding.weight"]
        tensors[f"v.{which}_tile_position_embd.gate"] = tanh(f"{table}.gate")
        for kind in ("weight", "bias"):
            tensors[f"v.{which}_ln.{kind}"] = w[f"{v}.layernorm_{which}.{kind}"]
    norm1, norm2, out = ("ln1", "ln2", "attn_out") if a_names else ("attn_norm", "ffn_norm", "attn_output")
    fc1, fc2 = ("ffn_down", "ffn_up") if swap_ffn else ("ffn_up", "ffn_down")
    head_dim = arch.vision_width // arch.vision_heads
    for prefix, group, n in (
        ("v.blk", "transformer", arch.local_layers),
        ("v.global.blk", "global_transformer", arch.global_layers),
    ):
        for i in range(n):
            old, new = f"{v}.{group}.layers.{i}", f"{prefix}.{i}"
            for kind in ("weight", "bias"):
                tensors[f"{new}.{norm1}.{kind}"] = w[f"{old}.input_layernorm.{kind}"]
                tensors[f"{new}.{norm2}.{kind}"] = w[f"{old}.post_attention_layernorm.{kind}"]
                tensors[f"{new}.{fc1}.{kind}"] = w[f"{old}.mlp.fc1.{kind}"]
                tensors[f"{new}.{fc2}.{kind}"] = w[f"{old}.mlp.fc2.{kind}"]
            for letter in "qkv":
                values = w[f"{old}.self_attn.{letter}_proj.weight"]
                permuted = permute and letter != "v" and head_dim % 2 == 0
                tensors[f"{new}.attn_{letter}.weight"] = rope_order(values, head_dim) if permuted else values
            tensors[f"{new}.{out}.weight"] = w[f"{old}.self_attn.o_proj.weight"]
            if group == "global_transformer":
                tensors[f"{new}.attn_gate"] = tanh(f"{old}.gate_attn")
                tensors[f"{new}.ffn_gate"] = tanh(f"{old}.gate_ffn")
    tensors["mm.0.weight"] = w["multi_modal_projector.weight"]
    tensors["mm.0.bias"] = w["multi_modal_projector.bias"]
    return tensors


def text_keys(arch: tiny.Arch) -> Keys:
    """What a text file says about itself, vocabulary included."""
    tokenizer = tiny.make_tokenizer(arch)["tokenizer.json"]
    by_id = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    normal, control = 1, 3
    return {
        "general.name": arch.name,
        "mllama.block_count": arch.layers,
        "mllama.context_length": arch.max_positions,
        "mllama.embedding_length": arch.width,
        "mllama.feed_forward_length": arch.ff,
        "mllama.attention.head_count": arch.heads,
        "mllama.attention.head_count_kv": arch.kv_heads,
        "mllama.attention.layer_norm_rms_epsilon": arch.rms_eps,
        "mllama.attention.cross_attention_layers": list(arch.cross_layers),
        "mllama.rope.freq_base": arch.rope_theta,
        "mllama.rope.dimension_count": arch.head_dim,
        "mllama.vocab_size": arch.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [(by_id | special)[i] for i in range(arch.vocab_size + 1)],
        "tokenizer.ggml.token_type": [
            control if i in special else normal for i in range(arch.vocab_size + 1)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": arch.special("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": arch.special("<|eot_id|>"),
        "tokenizer.ggml.padding_token_id": arch.special("<|finetune_right_pad_id|>"),
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }


def vision_keys(arch: tiny.Arch) -> Keys:
    """What a projector says about itself."""
    return {
        "mllama.vision.block_count": arch.local_layers,
        "mllama.vision.global.block_count": arch.global_layers,
        "mllama.vision.embedding_length": arch.vision_width,
        "mllama.vision.feed_forward_length": arch.vision_ff,
        "mllama.vision.attention.head_count": arch.vision_heads,
        EPSILON_KEY: 1e-5,
        "mllama.vision.image_size": arch.image_size,
        "mllama.vision.patch_size": arch.patch_size,
        "mllama.vision.max_num_tiles": arch.max_tiles,
        CHANNELS_KEY: 3,
        "mllama.vision.intermediate_layers_indices": list(arch.intermediate),
    }


def read_parts(first: Path) -> list[Path]:
    """All files of a model that may be split."""
    return sorted(first.parent.glob(first.name.replace("-00001-of-", "-*-of-")))


def corpus(directory: Path) -> list[list[Path]]:
    """Small models in all layouts, whole and split, and a text model alone; each list is what to open
    together."""
    small = replace(
        tiny.ARCHS["square"],
        name="small",
        image_size=14,
        vision_width=16,
        vision_heads=2,
        vision_ff=24,
        local_layers=2,
        global_layers=1,
        intermediate=(0, 1),
        width=16,
        heads=2,
        kv_heads=1,
        ff=24,
        layers=2,
        cross_layers=(1,),
        max_tiles=2,
        vocab_size=290,
    )
    return [
        write(small, directory, "canonical"),
        write(small, directory, "canonical", one_file=True),
        write(small, directory, "A", without=(EPSILON_KEY, CHANNELS_KEY)),
        write(small, directory, "B", f16=("norm.weight", "gate")),
        write(small, directory / "split", "B", split=30),
        write(small, directory / "split", "A", split=20),
        write(small, directory / "text", "canonical")[:1],
    ]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rows = []
    for opened in corpus(folder):
        parts = [part for file in opened for part in read_parts(file)]
        rows.append(
            [opened[0], opened[1] if len(opened) > 1 else "-", *(p for p in parts if p not in opened)]
        )
    lines = (" ".join(str(f.relative_to(folder) if isinstance(f, Path) else f) for f in row) for row in rows)
    (folder / "models").write_text("".join(line + "\n" for line in lines))
