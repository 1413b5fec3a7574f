"""GGUF files of the shape of the 11B model: every tensor has its true size and type, but no real weights.

    python scripts/full_shape.py OUT.gguf       holes alone; enough for `mllama plan OUT.gguf`

The data is one block of bell-shaped values in each ggml type, repeated to the length of a tensor: it costs as
much to read and to multiply as real weights do. A sparse tensor is a hole of zeros that takes no disk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

from mllama_gguf.convert.quantize import TARGETS, block, is_text_matrix, mix, quantize_rows

N_LAYER = 40
CROSS = (3, 8, 13, 18, 23, 28, 33, 38)
D, FF, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
KV = KV_HEADS * HEAD_DIM
EXTRA_ROWS = 8  # of the embedding: the image token, and padding
VISION_D, VISION_FF, POSITIONS = 1280, 5120, 1601
VISION_LAYERS = (32, 8)  # local, global
FEW_VISION_LAYERS = (5, 1)  # the fewest: states of five local ones and the last global one are read
BLOCK = 1 << 20  # values
Shape = tuple[int, ...]  # slowest first
Tensor = tuple[str, Shape, str]  # name, shape, ggml type


def text_tensors(
    target: str = "q4_k_m",
    *,
    n_layer: int = N_LAYER,
    cross: Collection[int] = CROSS,
    extra_rows: int = EXTRA_ROWS,
) -> list[Tensor]:
    """The text of the 11B model, or its first layers, in one of the types of `mllama quantize`."""
    shapes: dict[str, Shape] = {
        "token_embd.weight": (VOCAB + extra_rows, D),
        "rope_freqs.weight": (HEAD_DIM // 2,),
    }
    for i in range(n_layer):
        names = ("attn_q", "attn_k", "attn_v", "attn_output")
        if i in cross:
            names = ("cross_attn_q_proj", "cross_attn_k_proj", "cross_attn_v_proj", "cross_attn_o_proj")
        layer: dict[str, Shape] = {"attn_norm": (D,)}
        layer |= dict(zip(names, ((D, D), (KV, D), (KV, D), (D, D)), strict=True))
        layer |= {"ffn_norm": (D,), "ffn_gate": (FF, D), "ffn_up": (FF, D), "ffn_down": (D, FF)}
        if i in cross:
            layer |= {f"cross_attn_{part}_norm": (HEAD_DIM,) for part in "qk"}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        if i in cross:
            shapes |= {f"blk.{i}.cross_attn_{part}_gate": (1,) for part in ("attn", "mlp")}
    shapes |= {"output_norm.weight": (D,), "output.weight": (VOCAB, D)}

    def kind(name: str, shape: Shape) -> str:
        if not is_text_matrix(name, shape):
            return "F32"
        return mix(name, TARGETS[target], n_layer, HEADS // KV_HEADS)

    return [(name, shape, kind(name, shape)) for name, shape in shapes.items()]


def as_llama(tensors: Iterable[Tensor], cross: Collection[int] = CROSS) -> list[Tensor]:
    """The same text for llama.cpp: without the cross-attention layers and the rows of the image token."""
    out: list[Tensor] = []
    place: dict[int, int] = {}
    for name, shape, kind in tensors:
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            if int(layer) in cross:
                continue
            name = f"blk.{place.setdefault(int(layer), len(place))}.{rest}"
        elif name == "token_embd.weight":
            shape = (VOCAB, D)
        out.append((name, shape, kind))
    return out


def vision_tensors(layers: tuple[int, int] = VISION_LAYERS) -> list[Tensor]:
    """Vision encoder and projector, the matrices in BF16. layers: local and global ones."""
    w, ff, tiles, ids = VISION_D, VISION_FF, 4, 9
    out: list[Tensor] = [("v.class_embd", (w,), "F32"), ("v.patch_embd.weight", (w, 3, 14, 14), "BF16")]
    out += [("v.position_embd.weight", (POSITIONS, w), "F32")]
    out += [("v.tile_position_embd.weight", (ids, tiles * POSITIONS * w), "BF16")]
    out += [(f"v.{n}_tile_position_embd.weight", (ids, tiles * w), "F32") for n in ("pre", "post")]
    tables = ("position_embd", "tile_position_embd", "pre_tile_position_embd", "post_tile_position_embd")
    out += [(f"v.{n}.gate", (1,), "F32") for n in tables]
    out += [(f"v.{n}_ln.{part}", (w,), "F32") for n in ("pre", "post") for part in ("weight", "bias")]
    for prefix, count in zip(("v.blk", "v.global.blk"), layers, strict=True):
        for i in range(count):
            norms = ("attn_norm.weight", "attn_norm.bias", "ffn_norm.weight", "ffn_norm.bias")
            out += [(f"{prefix}.{i}.{n}", (w,), "F32") for n in norms]
            out += [(f"{prefix}.{i}.attn_{n}.weight", (w, w), "BF16") for n in ("q", "k", "v", "output")]
            out += [
                (f"{prefix}.{i}.ffn_up.weight", (ff, w), "BF16"),
                (f"{prefix}.{i}.ffn_up.bias", (ff,), "F32"),
            ]
            out += [
                (f"{prefix}.{i}.ffn_down.weight", (w, ff), "BF16"),
                (f"{prefix}.{i}.ffn_down.bias", (w,), "F32"),
            ]
            if prefix == "v.global.blk":
                out += [(f"{prefix}.{i}.{n}_gate", (1,), "F32") for n in ("attn", "ffn")]
    return [*out, ("mm.0.weight", (D, 6 * w), "BF16"), ("mm.0.bias", (D,), "F32")]


def n_bytes(tensor: Tensor) -> int:
    """Size of a tensor's data."""
    size, bytes_of_block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor[2]]]
    return int(np.prod(tensor[1])) // size * bytes_of_block


# ---- keys --------------------------------------------------------------------------------------------------


def text_keys(arch: str, n_layer: int) -> dict[str, Any]:
    keys = {
        "block_count": n_layer, "context_length": 131072, "embedding_length": D, "feed_forward_length": FF,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": VOCAB,
        "rope.dimension_count": HEAD_DIM, "rope.freq_base": 500000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    return {f"{arch}.{name}": value for name, value in keys.items()}


def mllama_keys(
    n_layer: int = N_LAYER, cross: Collection[int] = CROSS, layers: tuple[int, int] = VISION_LAYERS
) -> dict[str, Any]:
    """Keys of text and vision. layers: local and global ones of the encoder."""
    taken = [3, 7, 15, 23, 30] if layers == VISION_LAYERS else list(range(5))
    vision = {
        "block_count": layers[0], "global.block_count": layers[1], "embedding_length": VISION_D,
        "feed_forward_length": VISION_FF, "attention.head_count": 16, "image_size": 560, "patch_size": 14,
        "max_num_tiles": 4, "num_channels": 3, "intermediate_layers_indices": taken,
    }  # fmt: skip
    return {
        **text_keys("mllama", n_layer),
        "mllama.attention.cross_attention_layers": sorted(cross),
        **{f"mllama.vision.{name}": value for name, value in vision.items()},
    }


def vocabulary(n_tokens: int) -> dict[str, Any]:
    """Keys of a vocabulary of n_tokens tokens, at least VOCAB: bytes, the words of the tiny models, the
    special tokens last, the image token after them."""
    arch = replace(tiny.ARCHS["gqa"], vocab_size=VOCAB)
    model = tiny.make_tokenizer(arch)["tokenizer.json"]["model"]
    tokens = [*model["vocab"], *tiny.SPECIAL_TOKENS, tiny.IMAGE_TOKEN][:n_tokens]
    types = [gguf.TokenType.NORMAL] * n_tokens
    for i in range(arch.special(tiny.SPECIAL_TOKENS[0]), n_tokens):
        types[i] = gguf.TokenType.CONTROL
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(t) for t in types],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": arch.special("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": arch.special("<|eot_id|>"),
        "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }  # fmt: skip


# ---- files -------------------------------------------------------------------------------------------------


class RandomBlocks:
    """Data for `write_gguf`: the same valid blocks again and again, made once for every type.

    Norms, RoPE factors and gates are ones, biases zeros. The tables of the tiles are holes: in the published
    models the rows of unused tiles are zero. sparse: of which other tensors nothing is written.
    """

    def __init__(self, sparse: Callable[[str], bool] = lambda name: False) -> None:
        self._sparse = sparse
        self._values = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * np.float32(0.02)
        self._blocks: dict[str, bytes] = {}

    def __call__(self, tensor: Tensor) -> bytes | None:
        """A block of the tensor's data; None: a hole."""
        name, shape, kind = tensor
        if "tile_position_embd.weight" in name or self._sparse(name):
            return None
        if kind == "F32" and name.endswith(("norm.weight", "ln.weight", "gate", "rope_freqs.weight")):
            return np.ones(int(np.prod(shape)), np.float32).tobytes()
        if name.endswith("bias"):
            return bytes(n_bytes(tensor))
        if kind not in self._blocks:
            # One block of the type less than whole rows, so that rows differ.
            data = quantize_rows(self._values, "F32", kind, D).tobytes()
            self._blocks[kind] = data[: -block(kind)[1]]
        return self._blocks[kind]


def write_gguf(
    path: Path,
    arch: str,
    keys: Mapping[str, Any],
    tensors: Iterable[Tensor],
    data: Callable[[Tensor], bytes | None] = lambda tensor: None,
) -> None:
    """Write a file. data: a block that is repeated to the tensor's length, or None for a hole of zeros."""
    tensors = list(tensors)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for tensor in tensors:
        name, shape, kind = tensor
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes(tensor), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        for tensor in tensors:
            start = -(-end // 32) * 32
            end = start + n_bytes(tensor)
            values = data(tensor)
            if values is not None:
                file.seek(start)
                fill(file, n_bytes(tensor), values)
        file.truncate(-(-end // 32) * 32)


def fill(file: IO[bytes], size: int, data: bytes) -> None:
    """Write the same again and again until the bytes are written."""
    for start in range(0, size, len(data)):
        file.write(data[: min(len(data), size - start)])


def write_mllama(
    path: Path,
    n_layer: int = N_LAYER,
    *,
    vision: bool,
    vision_layers: tuple[int, int] = VISION_LAYERS,
    target: str = "q4_k_m",
) -> list[Tensor]:
    """The 11B model, or its first layers; returns its text tensors. target: types as in `mllama quantize`.
    vision False: holes of zeros in place of the vision encoder's weights, for what does not run it."""
    cross = [i for i in CROSS if i < n_layer]
    text = text_tensors(target, n_layer=n_layer, cross=cross)
    keys = {**mllama_keys(n_layer, cross, vision_layers), **vocabulary(VOCAB + 1)}
    data = RandomBlocks(sparse=lambda name: not vision and name.startswith(("v.", "mm.")))
    write_gguf(path, "mllama", keys, [*text, *vision_tensors(vision_layers)], data)
    return text


def write_llama(path: Path, text: Iterable[Tensor]) -> list[Tensor]:
    """`as_llama` of these tensors as a file for llama.cpp; returns its tensors."""
    tensors = as_llama(text)
    n_layer = sum(name.endswith(".attn_q.weight") for name, _, _ in tensors)
    write_gguf(path, "llama", {**text_keys("llama", n_layer), **vocabulary(VOCAB)}, tensors, RandomBlocks())
    return tensors


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    every = {**mllama_keys(), **vocabulary(VOCAB + 1)}
    write_gguf(Path(sys.argv[1]), "mllama", every, [*text_tensors(), *vision_tensors()])
