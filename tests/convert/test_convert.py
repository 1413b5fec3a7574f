"""The converter: names, shapes, types, rows, gates, keys, tokenizer, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from click.testing import CliRunner

from mllama_gguf.cli.convert import convert_command
from mllama_gguf.convert import values as values_module
from mllama_gguf.convert.checkpoint import Checkpoint, Source
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.convert.shape import read_shape, rope_factors
from mllama_gguf.convert.tensors import Tensor, plan
from mllama_gguf.convert.tokenizer import read_tokenizer
from mllama_gguf.convert.values import bf16_to_f32, f32_to_bf16, permute_rope_rows, piece_jobs
from mllama_gguf.errors import MllamaError, ModelError
from mllama_gguf.gguf.reader import read_gguf

GQA = tiny.ARCHS["gqa"]


class File:
    """A GGUF as gguf's own reader sees it."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: t for t in reader.tensors}

    def type(self, name: str) -> str:
        return str(self.tensors[name].tensor_type.name)

    def shape(self, name: str) -> list[int]:
        """In the order of ggml."""
        return [int(n) for n in self.tensors[name].shape]

    def values(self, name: str) -> npt.NDArray[np.float32]:
        t = self.tensors[name]
        return gguf.dequantize(t.data, t.tensor_type).reshape(self.shape(name)[::-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, File]:
    """Every architecture as one F32 file."""
    folder = tmp_path_factory.mktemp("made")
    files = {}
    for name, arch in tiny.ARCHS.items():
        tiny.make_checkpoint(arch, folder / name)
        convert(folder / name, folder / f"{name}.gguf", single_file=True, type="f32")
        files[name] = File(folder / f"{name}.gguf")
    return files


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.make_checkpoint(GQA, tmp_path / "checkpoint")


def pieces_of(tensor: Tensor) -> Iterator[Any]:
    return (job() for job in piece_jobs(tensor))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value))  # in ASCII, which has half characters too


# ------------------------------------------------------------------------------------------------------------
# Tensors


def test_two_files_split_one_file(checkpoint: Path, tmp_path: Path) -> None:
    text, vision = convert(checkpoint, tmp_path / "t.gguf", mmproj=tmp_path / "v.gguf", type="f32")
    (one,) = convert(checkpoint, tmp_path / "one.gguf", single_file=True, type="f32")
    assert (text, vision, one) == (tmp_path / "t.gguf", tmp_path / "v.gguf", tmp_path / "one.gguf")
    t, v, both = File(text), File(vision), File(one)
    assert not t.tensors.keys() & v.tensors.keys()
    assert t.tensors.keys() | v.tensors.keys() == both.tensors.keys()
    assert all(name.startswith(("v.", "mm.")) for name in v.tensors)
    for name in both.tensors:
        np.testing.assert_array_equal((v if name in v.tensors else t).values(name), both.values(name))
    assert t.keys["general.type"] == both.keys["general.type"] == "model"
    assert v.keys["general.type"] == "projector"
    assert not any(key.startswith("mllama.vision") for key in t.keys)
    assert not any(key.startswith("tokenizer") for key in v.keys)
    for file in (t, v, both):
        assert file.keys["general.architecture"] == "mllama"
        assert file.keys["mllama.converter"].startswith("mllama_gguf ")


def test_name(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "m.gguf", name="My model")
    assert File(tmp_path / "m.gguf").keys["general.name"] == "My model"
    assert File(tmp_path / "m-mmproj.gguf").keys["general.name"] == "My model"


def test_default_name_of_the_projector_file(checkpoint: Path, tmp_path: Path) -> None:
    assert convert(checkpoint, tmp_path / "m.gguf") == [tmp_path / "m.gguf", tmp_path / "m-mmproj.gguf"]


def rope_rows(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Written out row by row: row j of the first half goes to 2j, of the second half to 2j + 1."""
    out, d = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for j in range(d // 2):
            out[head * d + 2 * j] = weight[head * d + j]
            out[head * d + 2 * j + 1] = weight[head * d + d // 2 + j]
    return out


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_every_tensor(made: dict[str, File], name: str) -> None:
    arch, file, weights = tiny.ARCHS[name], made[name], tiny.make_weights(tiny.ARCHS[name])
    if arch.dtype == "BF16":
        weights = {n: bf16_to_f32(f32_to_bf16(w)) for n, w in weights.items()}
    expected: dict[str, npt.NDArray[Any]] = {}

    def take(new: str, old: str, suffixes: tuple[str, ...] = ("weight",)) -> None:
        for suffix in suffixes:
            expected[f"{new}.{suffix}"] = weights.pop(f"{old}.{suffix}")

    both = ("weight", "bias")
    text = "language_model.model"
    take("token_embd", f"{text}.embed_tokens")
    take("output_norm", f"{text}.norm")
    take("output", "language_model.lm_head")
    for i in range(arch.layers):
        new, old = f"blk.{i}", f"{text}.layers.{i}"
        take(f"{new}.attn_norm", f"{old}.input_layernorm")
        take(f"{new}.ffn_norm", f"{old}.post_attention_layernorm")
        for part in ("gate", "up", "down"):
            take(f"{new}.ffn_{part}", f"{old}.mlp.{part}_proj")
        if i in arch.cross_layers:
            for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
                take(f"{new}.cross_attn_{part}", f"{old}.cross_attn.{part}")
            for part in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                expected[f"{new}.{part}"] = weights.pop(f"{old}.{part}")
        else:
            for part, heads in (("q", arch.heads), ("k", arch.kv_heads)):
                take(f"{new}.attn_{part}", f"{old}.self_attn.{part}_proj")
                expected[f"{new}.attn_{part}.weight"] = rope_rows(
                    expected[f"{new}.attn_{part}.weight"], heads
                )
            take(f"{new}.attn_v", f"{old}.self_attn.v_proj")
            take(f"{new}.attn_output", f"{old}.self_attn.o_proj")
    if arch.rope_scaling["rope_type"] == "llama3":
        expected["rope_freqs.weight"] = llama3_factors(arch).astype(np.float32)

    def gate(old: str) -> npt.NDArray[np.float64]:
        return np.tanh(weights.pop(old).astype(np.float64))

    vision = "vision_model"
    expected["v.class_embd"] = weights.pop(f"{vision}.class_embedding")
    take("v.patch_embd", f"{vision}.patch_embedding")
    table = f"{vision}.gated_positional_embedding"
    expected["v.position_embd.weight"] = weights.pop(f"{table}.embedding")
    take("v.tile_position_embd", f"{table}.tile_embedding")
    expected["v.tile_position_embd.gate"] = gate(f"{table}.gate")
    expected["v.position_embd.gate"] = 1 - expected["v.tile_position_embd.gate"]
    for which in ("pre", "post"):
        table = f"{vision}.{which}_tile_positional_embedding"
        take(f"v.{which}_tile_position_embd", f"{table}.embedding")
        expected[f"v.{which}_tile_position_embd.gate"] = gate(f"{table}.gate")
        take(f"v.{which}_ln", f"{vision}.layernorm_{which}", both)
    for new_group, group, n in (
        ("v.blk", "transformer", arch.local_layers),
        ("v.global.blk", "global_transformer", arch.global_layers),
    ):
        for i in range(n):
            new, old = f"{new_group}.{i}", f"{vision}.{group}.layers.{i}"
            take(f"{new}.attn_norm", f"{old}.input_layernorm", both)
            take(f"{new}.ffn_norm", f"{old}.post_attention_layernorm", both)
            take(f"{new}.ffn_up", f"{old}.mlp.fc1", both)
            take(f"{new}.ffn_down", f"{old}.mlp.fc2", both)
            for part in "qkv":
                take(f"{new}.attn_{part}", f"{old}.self_attn.{part}_proj")
            take(f"{new}.attn_output", f"{old}.self_attn.o_proj")
            if group == "global_transformer":
                expected[f"{new}.attn_gate"] = gate(f"{old}.gate_attn")
                expected[f"{new}.ffn_gate"] = gate(f"{old}.gate_ffn")
    take("mm.0", "multi_modal_projector", both)

    assert not weights, "the test forgot these"
    assert file.tensors.keys() == expected.keys()
    for tensor, values in expected.items():
        assert file.type(tensor) == "F32"
        assert file.shape(tensor) == list(values.shape[::-1]), tensor
        # Gates are rounded once, from double precision.
        np.testing.assert_array_equal(file.values(tensor), values.astype(np.float32), err_msg=tensor)


def llama3_factors(arch: tiny.Arch) -> npt.NDArray[np.float64]:
    """By cases, as Meta's code has it."""
    s, factors = arch.rope_scaling, []
    original = s["original_max_position_embeddings"]
    for i in range(0, arch.head_dim, 2):
        wave = 2 * np.pi * arch.rope_theta ** (i / arch.head_dim)
        if wave < original / s["high_freq_factor"]:
            factors.append(1.0)
        elif wave > original / s["low_freq_factor"]:
            factors.append(s["factor"])
        else:
            smooth = (original / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / s["factor"] + smooth))
    return np.array(factors)


def test_rope_factors_of_the_published_model(checkpoint: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    shape = dataclasses.replace(
        read_shape(Checkpoint(checkpoint)), head_dim=128, rope_theta=500000.0, rope_scaling=scaling
    )
    factors = rope_factors(shape, checkpoint)
    assert factors is not None and factors.shape == (64,)
    assert (factors[:29] == 1).all() and (factors[35:] == 8).all()
    assert (np.diff(factors[28:36]) > 0).all()
    np.testing.assert_allclose(factors[30], 1.5534150, rtol=1e-6)


@pytest.mark.parametrize(
    ("tensor", "g", "expected"),
    [
        ("v.position_embd.gate", -1.328125, 1.8687903),
        ("v.tile_position_embd.gate", -1.328125, -0.8687903),
        ("v.pre_tile_position_embd.gate", 0.75, 0.6351490),
        ("v.post_tile_position_embd.gate", -0.197265625, -0.1947460),
    ],
)
def test_gates_of_the_published_model(tmp_path: Path, tensor: str, g: float, expected: float) -> None:
    sources = {
        "v.position_embd.gate": "gated_positional_embedding.gate",
        "v.tile_position_embd.gate": "gated_positional_embedding.gate",
        "v.pre_tile_position_embd.gate": "pre_tile_positional_embedding.gate",
        "v.post_tile_position_embd.gate": "post_tile_positional_embedding.gate",
    }
    weights = tiny.make_weights(GQA)
    weights[f"vision_model.{sources[tensor]}"][:] = g
    tiny.make_checkpoint(GQA, tmp_path / "c", weights=weights, dtype="BF16")
    convert(tmp_path / "c", tmp_path / "c.gguf", single_file=True)
    (value,) = File(tmp_path / "c.gguf").values(tensor)
    assert value == pytest.approx(expected, abs=6e-8)


def test_permute_rope_rows() -> None:
    rows = np.arange(2 * 6)[:, None] * np.ones(3)
    assert permute_rope_rows(rows, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


# ------------------------------------------------------------------------------------------------------------
# Types


def test_which_tensors_take_the_type(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "m.gguf", single_file=True, type="f16", vision_type="bf16")
    file = File(tmp_path / "m.gguf")
    tables = {"v.position_embd.weight", "v.pre_tile_position_embd.weight", "v.post_tile_position_embd.weight"}
    for name in file.tensors:
        is_matrix = len(file.shape(name)) > 1 and name not in tables
        vision = name.startswith(("v.", "mm."))
        assert file.type(name) == (("BF16" if vision else "F16") if is_matrix else "F32"), name
    assert file.keys["general.file_type"] == 1


@pytest.mark.parametrize("stored", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("wanted", ["f32", "f16", "bf16"])
def test_rounding(tmp_path: Path, stored: str, wanted: Any) -> None:
    """Each value is rounded to nearest even from what the checkpoint holds; widening is exact."""
    tiny.make_checkpoint(GQA, tmp_path / "c", dtype=stored)
    convert(tmp_path / "c", tmp_path / "c.gguf", single_file=True, type=wanted)
    file = File(tmp_path / "c.gguf")
    old = tiny.make_weights(GQA)
    for new, name in (
        ("blk.1.ffn_up.weight", "language_model.model.layers.1.mlp.up_proj.weight"),
        ("v.blk.2.attn_v.weight", "vision_model.transformer.layers.2.self_attn.v_proj.weight"),
        ("output_norm.weight", "language_model.model.norm.weight"),
    ):
        held = reference_round(old[name], stored)
        to = "F32" if new.endswith("norm.weight") else wanted.upper()
        np.testing.assert_array_equal(file.values(new), reference_round(held, to))


def reference_round(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":  # the nearest of the two neighbours, by distance
        low = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        high = ((values.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
        down, up = np.abs(values.astype(np.float64) - low), np.abs(high.astype(np.float64) - values)
        even = ((low.view(np.uint32) >> 16) & 1) == 0
        return np.where((down < up) | ((down == up) & even), low, high)
    return values


def test_bf16_ties_go_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0x00000001], dtype=np.uint32)
    assert f32_to_bf16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF80, 0]


# ------------------------------------------------------------------------------------------------------------
# Keys and tokenizer


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_keys(made: dict[str, File], name: str) -> None:
    arch, keys = tiny.ARCHS[name], made[name].keys
    expected = {
        "general.architecture": "mllama",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "mllama.vocab_size": arch.vocab_size,
        "mllama.context_length": arch.max_positions,
        "mllama.embedding_length": arch.width,
        "mllama.block_count": arch.layers,
        "mllama.feed_forward_length": arch.ff,
        "mllama.attention.head_count": arch.heads,
        "mllama.attention.head_count_kv": arch.kv_heads,
        "mllama.attention.layer_norm_rms_epsilon": pytest.approx(arch.rms_eps),
        "mllama.attention.cross_attention_layers": list(arch.cross_layers),
        "mllama.rope.freq_base": arch.rope_theta,
        "mllama.rope.dimension_count": arch.head_dim,
        "mllama.vision.image_size": arch.image_size,
        "mllama.vision.patch_size": arch.patch_size,
        "mllama.vision.num_channels": 3,
        "mllama.vision.max_num_tiles": arch.max_tiles,
        "mllama.vision.embedding_length": arch.vision_width,
        "mllama.vision.block_count": arch.local_layers,
        "mllama.vision.global.block_count": arch.global_layers,
        "mllama.vision.feed_forward_length": arch.vision_ff,
        "mllama.vision.attention.head_count": arch.vision_heads,
        "mllama.vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "mllama.vision.projection_dim": arch.width,
        "mllama.vision.intermediate_layers_indices": list(arch.intermediate),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": arch.special("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": arch.special("<|eot_id|>"),
        "tokenizer.ggml.eot_token_id": arch.special("<|eot_id|>"),
        "tokenizer.ggml.eom_token_id": arch.special("<|eom_id|>"),
        "tokenizer.ggml.padding_token_id": arch.special("<|finetune_right_pad_id|>"),
        "tokenizer.ggml.eos_token_ids": [
            arch.special(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        ],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }
    assert {key: keys.get(key) for key in expected} == expected
    assert "mllama.attention.key_length" not in keys
    assert keys["general.name"] == name


def test_tokens(made: dict[str, File]) -> None:
    keys = made["gqa"].keys
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == GQA.vocab_size + 1
    assert tokens[:256] == tiny.byte_tokens()
    assert tuple(tokens[-12:]) == (*tiny.SPECIAL_TOKENS, tiny.IMAGE_TOKEN)
    assert types == [1] * (GQA.vocab_size - 11) + [3] * 12
    merges = keys["tokenizer.ggml.merges"]
    assert merges[:3] == ["Ġ t", "Ġt h", "Ġth e"]
    assert all(left + right in tokens for left, right in (m.split(" ") for m in merges))


def test_merges_as_strings(checkpoint: Path, tmp_path: Path) -> None:
    """Older versions of tokenizers write a merge as one string."""

    def change(value: dict[str, Any]) -> None:
        value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]

    edit_json(checkpoint / "tokenizer.json", change)
    convert(checkpoint, tmp_path / "m.gguf")
    assert File(tmp_path / "m.gguf").keys["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġt h"]


def test_missing_tokens_become_padding(checkpoint: Path, tmp_path: Path) -> None:
    hole = GQA.vocab_size - 12

    def change(value: dict[str, Any]) -> None:
        vocab = value["model"]["vocab"]
        gone = next(token for token, i in vocab.items() if i == hole)
        del vocab[gone]
        value["model"]["merges"] = [pair for pair in value["model"]["merges"] if "".join(pair) != gone]
        value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != tiny.IMAGE_TOKEN]
        value["added_tokens"][2]["special"] = False

    edit_json(checkpoint / "tokenizer.json", change)
    convert(checkpoint, tmp_path / "m.gguf")
    keys = File(tmp_path / "m.gguf").keys
    assert keys["tokenizer.ggml.tokens"][hole] == f"[PAD{hole}]"
    assert keys["tokenizer.ggml.token_type"][hole] == 5
    assert keys["tokenizer.ggml.tokens"][-1] == tiny.IMAGE_TOKEN
    assert keys["tokenizer.ggml.token_type"][-1] == 3
    assert keys["tokenizer.ggml.token_type"][hole + 3] == 4


def test_special_tokens_as_objects(checkpoint: Path, tmp_path: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["eos_token"] = {"content": "<|end_of_text|>", "special": True}

    edit_json(checkpoint / "tokenizer_config.json", change)
    convert(checkpoint, tmp_path / "m.gguf")
    keys = File(tmp_path / "m.gguf").keys
    assert keys["tokenizer.ggml.eos_token_id"] == GQA.special("<|end_of_text|>")


def test_special_tokens_from_config(checkpoint: Path, tmp_path: Path) -> None:
    """Without tokenizer_config.json and its companions, config.json still knows them."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (checkpoint / file).unlink()
    (checkpoint / "preprocessor_config.json").unlink()
    convert(checkpoint, tmp_path / "m.gguf")
    keys = File(tmp_path / "m.gguf").keys
    assert keys["tokenizer.ggml.bos_token_id"] == GQA.special("<|begin_of_text|>")
    assert keys["tokenizer.ggml.eos_token_ids"] == [GQA.special("<|eot_id|>")]
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.chat_template" not in keys


@pytest.mark.parametrize("first", ["chat_template.jinja", "chat_template.json"])
def test_chat_template_files_come_first(checkpoint: Path, tmp_path: Path, first: str) -> None:
    text = "{{ first }}\n"
    (checkpoint / first).write_text(
        text if first.endswith("jinja") else json.dumps({"chat_template": text}), encoding="utf-8"
    )
    convert(checkpoint, tmp_path / "m.gguf")
    assert File(tmp_path / "m.gguf").keys["tokenizer.chat_template"] == text


def test_gpt2_pre_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

    edit_json(checkpoint / "tokenizer.json", change)
    convert(checkpoint, tmp_path / "m.gguf")
    assert File(tmp_path / "m.gguf").keys["tokenizer.ggml.pre"] == "gpt-2"


# ------------------------------------------------------------------------------------------------------------
# Kinds of checkpoints


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_same_file_from_any_checkpoint(
    made: dict[str, File], tmp_path: Path, new_names: bool, shards: int
) -> None:
    tiny.make_checkpoint(GQA, tmp_path / "gqa", new_names=new_names, shards=shards)
    convert(tmp_path / "gqa", tmp_path / "m.gguf", single_file=True, type="f32")
    file = File(tmp_path / "m.gguf")
    assert file.keys == made["gqa"].keys
    assert list(file.tensors) == list(made["gqa"].tensors)
    for name in file.tensors:
        np.testing.assert_array_equal(file.values(name), made["gqa"].values(name))


def test_rope_parameters_of_transformers_5(made: dict[str, File], tmp_path: Path) -> None:
    path = tiny.make_checkpoint(GQA, tmp_path / "gqa")

    def change(value: dict[str, Any]) -> None:
        text = value["text_config"]
        text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}

    edit_json(path / "config.json", change)
    convert(path, tmp_path / "m.gguf", type="f32")
    file = File(tmp_path / "m.gguf")
    assert file.keys["mllama.rope.freq_base"] == GQA.rope_theta
    np.testing.assert_array_equal(file.values("rope_freqs.weight"), made["gqa"].values("rope_freqs.weight"))


def test_no_rope_scaling_no_factors(made: dict[str, File]) -> None:
    assert "rope_freqs.weight" not in made["twotiles"].tensors


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    weights = tiny.make_weights(GQA)
    weights["language_model.model.rotary_emb.inv_freq"] = np.ones(8, dtype=np.float32)
    tiny.make_checkpoint(GQA, tmp_path / "c", weights=weights)
    convert(tmp_path / "c", tmp_path / "m.gguf")


def test_progress_counts_every_byte(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(checkpoint, tmp_path / "m.gguf", progress=lambda done, total: seen.append((done, total)))
    tensors = [t for f in ("m.gguf", "m-mmproj.gguf") for t in File(tmp_path / f).tensors.values()]
    assert seen[0] == (0, sum(t.n_bytes for t in tensors))
    assert seen[-1] == (seen[0][1], seen[0][1])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_pieces_of_a_large_tensor_fit_in_little_memory(checkpoint: Path, tmp_path: Path) -> None:
    """A sparse file stands for an embedding of 1 GB as float32; nothing near that size is ever held."""
    rows, columns = 65536, 4096
    with (tmp_path / "large").open("wb") as f:
        f.truncate(rows * columns * 2)
    source = Source(tmp_path / "large", "large", "BF16", (rows, columns), 0)
    for rope, kind in ((0, "f32"), (128, "bf16")):
        tensor = Tensor("large", (rows, columns), "text", kind, source, rope)  # type: ignore[arg-type]
        tracemalloc.start()
        n_bytes = sum(piece.nbytes for piece in pieces_of(tensor))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_bytes == tensor.n_bytes
        assert peak < 100e6


def test_pieces_hold_whole_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_checkpoint(GQA, tmp_path / "c")
    checkpoint = Checkpoint(path)
    tensor = next(
        t for t in plan(checkpoint, read_shape(checkpoint), "f32") if t.name == "blk.1.attn_q.weight"
    )
    (whole,) = pieces_of(tensor)
    monkeypatch.setattr(values_module, "_CHUNK_VALUES", 40 * GQA.width)
    pieces = list(pieces_of(tensor))
    assert [len(piece) for piece in pieces] == [32, 32, 32]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


# ------------------------------------------------------------------------------------------------------------
# What is refused


def refused(checkpoint: Path, *words: str) -> None:
    """Conversion fails with an error that holds the words, in one line, and leaves nothing behind."""
    out = checkpoint.parent / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(ModelError) as caught:
        convert(checkpoint, out / "m.gguf")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 1500
    assert not list(out.iterdir())


WRONG_CONFIGS: list[tuple[str, str, Any]] = [
    ("", "model_type", "llama"),
    ("", "text_config", None),
    ("", "vision_config", 3),
    ("", "image_token_index", 99999),
    ("text_config", "vocab_size", "many"),
    ("text_config", "hidden_size", 0),
    ("text_config", "num_hidden_layers", -1),
    ("text_config", "num_attention_heads", True),
    ("text_config", "num_key_value_heads", 4),
    ("text_config", "hidden_act", "gelu"),
    ("text_config", "rms_norm_eps", None),
    ("text_config", "rms_norm_eps", 10**400),
    ("text_config", "rms_norm_eps", 1e300),
    ("text_config", "rope_theta", "x"),
    ("text_config", "cross_attention_layers", [1, 5]),
    ("text_config", "cross_attention_layers", [3, 0]),
    ("text_config", "cross_attention_layers", []),
    ("text_config", "rope_scaling", {"rope_type": "yarn"}),
    ("text_config", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("text_config", "rope_scaling", {"rope_type": "llama3", "factor": 10**400}),
    ("text_config", "rope_scaling", 8),
    ("vision_config", "hidden_act", "quick_gelu"),
    ("vision_config", "norm_eps", 1e-6),
    ("vision_config", "attention_heads", 5),
    ("vision_config", "num_channels", 1),
    ("vision_config", "patch_size", 31),
    ("vision_config", "max_num_tiles", 5),
    ("vision_config", "max_num_tiles", 1000),
    ("vision_config", "supported_aspect_ratios", [[1, 1], [2, 1]]),
    ("vision_config", "intermediate_layers_indices", [5]),
    ("vision_config", "intermediate_layers_indices", "3"),
    ("vision_config", "intermediate_layers_indices", [3, 0]),
    ("vision_config", "intermediate_layers_indices", [1, 1]),
    ("vision_config", "intermediate_layers_indices", []),
]


@pytest.mark.parametrize(("section", "key", "value"), WRONG_CONFIGS)
def test_wrong_config(checkpoint: Path, section: str, key: str, value: Any) -> None:
    edit_json(checkpoint / "config.json", lambda c: (c[section] if section else c).update({key: value}))
    told = "supported_aspect_ratios" if (key, value) == ("max_num_tiles", 5) else key
    refused(checkpoint, "config.json", told)


def test_shapes_must_match_the_config(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda c: c["text_config"].update(intermediate_size=208))
    refused(checkpoint, "model.safetensors", "layers.0.mlp.gate_proj.weight", "[200, 96]", "[208, 96]")


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("vocab_size", 3_000_000, "embed_tokens"),
        ("head_dim", 20_000_000, "q_proj"),
        ("num_hidden_layers", 1 << 30, "layers."),
        ("hidden_size", 1 << 30, "embed_tokens"),
    ],
)
def test_nothing_is_made_as_large_as_the_config_says(
    checkpoint: Path, key: str, value: int, tensor: str
) -> None:
    """A config.json of a few bytes took all of the memory."""
    edit_json(checkpoint / "config.json", lambda c: c["text_config"].update({key: value}))
    tracemalloc.start()
    try:
        refused(checkpoint, tensor)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(tiny.make_weights(GQA))[::17])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    weights = tiny.make_weights(GQA)
    del weights[name]
    refused(tiny.make_checkpoint(GQA, tmp_path / "c", weights=weights), name, "missing")


def test_unknown_tensor(tmp_path: Path) -> None:
    weights = tiny.make_weights(GQA)
    weights["language_model.model.layers.1.self_attn.q_proj.bias"] = np.zeros(96, dtype=np.float32)
    refused(tiny.make_checkpoint(GQA, tmp_path / "c", weights=weights), "q_proj.bias")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: str) -> None:
    weights = tiny.make_weights(GQA)
    weights["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = value
    refused(tiny.make_checkpoint(GQA, tmp_path / "c", weights=weights, dtype=dtype), "up_proj", "finite")


def test_values_too_large_for_the_type(tmp_path: Path) -> None:
    weights = tiny.make_weights(GQA)
    weights["language_model.lm_head.weight"][3, 4] = -70000
    path = tiny.make_checkpoint(GQA, tmp_path / "c", weights=weights)
    convert(path, tmp_path / "m.gguf", type="bf16")
    with pytest.raises(ModelError, match=r"lm_head\.weight.*70000.*f16"):
        convert(path, tmp_path / "m.gguf", type="f16")


def test_tensor_of_whole_numbers(tmp_path: Path) -> None:
    path = tiny.make_checkpoint(GQA, tmp_path / "c")
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["language_model.lm_head.weight"]["dtype"] = "I32"
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(path, "lm_head", "I32")


def test_truncated_at_any_place(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        refused(checkpoint, "model.safetensors", "truncated")


LONG = "Z" * 200_000


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda c: c.update(model_type=LONG)),
        ("config.json", lambda c: c.update(text_config=LONG)),
        ("config.json", lambda c: c["text_config"].update(vocab_size=LONG)),
        ("config.json", lambda c: c["text_config"].update(rope_theta=10**400)),
        ("config.json", lambda c: c["text_config"].update(cross_attention_layers=[-1] * 99_999)),
        ("config.json", lambda c: c["text_config"].update(rope_scaling={"rope_type": LONG})),
        (
            "config.json",
            lambda c: c["text_config"].update(rope_scaling={"rope_type": "llama3", "factor": LONG}),
        ),
        ("config.json", lambda c: c["vision_config"].update(supported_aspect_ratios=LONG)),
        ("preprocessor_config.json", lambda c: c.update(size=LONG)),
        ("preprocessor_config.json", lambda c: c.update(image_mean=LONG)),
        ("preprocessor_config.json", lambda c: c.update(image_mean=[LONG] * 3)),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update({LONG: 1 << 40})),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update({LONG: 0})),
        ("tokenizer.json", lambda c: c["added_tokens"].append(LONG)),
        ("tokenizer.json", lambda c: c["added_tokens"].append({"content": LONG, "id": 10**4000})),
        ("tokenizer.json", lambda c: c["model"].update(merges=[LONG])),
        ("tokenizer_config.json", lambda c: c.update(bos_token=LONG)),
        ("tokenizer_config.json", lambda c: c.update(bos_token=[])),
        ("model.safetensors", lambda c: c.update({LONG: 3})),
        (
            "model.safetensors",
            lambda c: c.update({LONG: {"dtype": LONG, "shape": [1], "data_offsets": [0, 4]}}),
        ),
        (
            "model.safetensors",
            lambda c: c.update({LONG: {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}),
        ),
        (
            "model.safetensors",
            lambda c: c.update({LONG: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        ),
        ("model.safetensors", lambda c: c["language_model.model.embed_tokens.weight"].update(dtype=LONG)),
    ],
)
def test_errors_are_short_whatever_a_file_says(
    checkpoint: Path, file: str, change: Callable[[Any], object]
) -> None:
    path = checkpoint / file
    if path.suffix == ".json":
        edit_json(path, change)
    else:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        change(header := json.loads(data[8 : 8 + length]))
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(checkpoint)


@pytest.mark.parametrize(
    "named", [{LONG: "a.safetensors"}, {"a": LONG}, {LONG: LONG}, {LONG: "model.safetensors"}]
)
def test_errors_of_an_index_are_short(checkpoint: Path, named: dict[str, str]) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    refused(checkpoint)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xff",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ['
        + b"9" * 3000
        + b","
        + b"9" * 3000
        + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"1," * 9999 + b'1], "data_offsets": [0, 4]}}',
    ],
)
def test_broken_safetensors_header(checkpoint: Path, header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    (checkpoint / "model.safetensors").write_bytes(data)
    refused(checkpoint, "model.safetensors")


def test_file_that_shrinks_while_it_is_read(checkpoint: Path) -> None:
    opened = Checkpoint(checkpoint)
    tensors = plan(opened, read_shape(opened))
    os.truncate(checkpoint / "model.safetensors", 4096)
    with pytest.raises(ModelError, match="truncated"):
        for tensor in tensors:
            list(pieces_of(tensor))


def test_missing_shard_and_wrong_index(tmp_path: Path) -> None:
    path = tiny.make_checkpoint(GQA, tmp_path / "c", shards=3)
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    edit_json(
        index, lambda i: i["weight_map"].update({"language_model.nix": "model-00001-of-00003.safetensors"})
    )
    refused(path, "language_model.nix", "model-00001-of-00003.safetensors")
    edit_json(index, lambda i: i["weight_map"].update({"language_model.nix": "../c/config.json"}))
    refused(path, "index.json", "../c/config.json")
    edit_json(index, lambda i: i.pop("weight_map"))
    refused(path, "weight_map")
    index.write_text(good)
    (path / "model-00002-of-00003.safetensors").unlink()
    refused(path, "model-00002-of-00003.safetensors", "no such file")


def test_no_weights_no_config_no_directory(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, "model.safetensors")
    (checkpoint / "config.json").write_text("{")
    refused(checkpoint, "config.json")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "config.json", "no such file")
    refused(tmp_path / "nowhere", "nowhere")


def test_tensor_twice_under_old_and_new_name(tmp_path: Path) -> None:
    weights = tiny.make_weights(GQA)
    weights["lm_head.weight"] = weights["language_model.lm_head.weight"]
    refused(tiny.make_checkpoint(GQA, tmp_path / "c", weights=weights), "lm_head.weight")


WRONG_TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unigram": lambda t: t["model"].update(type="Unigram"),
    "no vocab": lambda t: t["model"].pop("vocab"),
    "id too large": lambda t: t["model"]["vocab"].update(extra=GQA.vocab_size + 1),
    "id negative": lambda t: t["model"]["vocab"].update(extra=-1),
    "same id twice": lambda t: t["model"]["vocab"].update(extra=5),
    "same token twice": lambda t: t["added_tokens"][0].update(content="!"),
    "image token elsewhere": lambda t: t["added_tokens"][-1].update(content="<image>"),
    "merge of three": lambda t: t["model"]["merges"].append(["a", "b", "c"]),
    "other split": lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\s+"}),
    "merges": lambda t: t["model"].update(merges=5),
    "half of a character in a merge": lambda t: t["model"]["merges"].append("a \ud800"),
    "half of a character": lambda t: t["model"]["vocab"].update({"\ud800": t["model"]["vocab"].pop("!")}),
    "added tokens": lambda t: t.update(added_tokens=5),
    "pre-tokenizers": lambda t: t["pre_tokenizer"].update(pretokenizers=5),
    "no pre-tokenizer": lambda t: t.pop("pre_tokenizer"),
}


@pytest.mark.parametrize("case", WRONG_TOKENIZERS)
def test_wrong_tokenizer(checkpoint: Path, case: str) -> None:
    edit_json(checkpoint / "tokenizer.json", WRONG_TOKENIZERS[case])
    refused(checkpoint, "tokenizer.json")


def test_unknown_special_token(checkpoint: Path) -> None:
    edit_json(checkpoint / "tokenizer_config.json", lambda t: t.update(eos_token="</s>"))
    refused(checkpoint, "eos_token", "</s>")


@pytest.mark.parametrize(
    "node",
    [
        {"type": "Sequence", "processors": 5},
        {"type": "TemplateProcessing", "single": 5},
        {"type": "TemplateProcessing", "single": {"a": 1}},
    ],
)
def test_a_post_processor_of_another_form_adds_nothing(checkpoint: Path, node: Any) -> None:
    edit_json(checkpoint / "tokenizer_config.json", lambda t: t.pop("add_bos_token", None))
    edit_json(checkpoint / "tokenizer.json", lambda t: t.update(post_processor=node))
    opened = Checkpoint(checkpoint)
    assert read_tokenizer(opened, read_shape(opened)).add_bos is False


def test_chat_templates_of_another_form(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer_config.json"
    edit_json(file, lambda t: t.update(chat_template=[{"name": ["a"], "template": "x"}]))
    opened = Checkpoint(checkpoint)
    assert read_tokenizer(opened, read_shape(opened)).chat_template == "x"
    edit_json(file, lambda t: t.update(chat_template="\ud800"))
    refused(checkpoint, "tokenizer_config.json: chat_template has half of a character")


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff-model")
    convert(tiny.make_checkpoint(GQA, folder), tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf").keys["general.name"] == "?-model"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [1, 1]),
        ("image_mean", ["a", "b", "c"]),
        ("image_std", [10**400, 1, 1]),
        ("size", {"height": 31, "width": 31}),
        ("max_image_tiles", 3),
    ],
)
def test_other_preprocessing(checkpoint: Path, key: str, value: Any) -> None:
    edit_json(checkpoint / "preprocessor_config.json", lambda c: c.update({key: value}))
    refused(checkpoint, "preprocessor_config.json", key)


# ------------------------------------------------------------------------------------------------------------
# Trouble with the output


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_error_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.gguf").write_bytes(b"GGUF, the file before")
    for limit in (1000, 100_000, 1_000_000):
        with (
            file_size_limit(limit),
            pytest.raises(MllamaError, match=r"cannot write .*m\.gguf: File too large"),
        ):
            convert(checkpoint, out / "m.gguf", type="f32")
        assert [p.name for p in out.iterdir()] == ["m.gguf"]
        assert (out / "m.gguf").read_bytes() == b"GGUF, the file before"


def test_full_disk_is_told_before(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MllamaError, match=r"[kMG]B needed, 1.0 kB free"):
        convert(checkpoint, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_outputs_that_cannot_be(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MllamaError, match="there is no folder"):
        convert(checkpoint, tmp_path / "nowhere" / "m.gguf")
    with pytest.raises(MllamaError, match="no regular file"):
        convert(checkpoint, checkpoint, single_file=True)
    with pytest.raises(MllamaError, match="no regular file"):
        convert(checkpoint, "/dev/null", single_file=True)
    with pytest.raises(MllamaError, match="different files"):
        convert(checkpoint, tmp_path / "m.gguf", mmproj=tmp_path / "." / "m.gguf")
    with pytest.raises(ValueError, match="exclude"):
        convert(checkpoint, tmp_path / "m.gguf", mmproj=tmp_path / "v.gguf", single_file=True)
    with pytest.raises(ValueError, match="q2_k"):
        convert(checkpoint, tmp_path / "m.gguf", type="q2_k")
    with pytest.raises(ValueError, match="q4_0"):
        convert(checkpoint, tmp_path / "m.gguf", vision_type="q4_0")  # type: ignore[arg-type]


def test_interrupt_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, out / "m.gguf", progress=stop)
    assert not list(out.iterdir())


@pytest.mark.parametrize("taken", ["m.gguf", "m-mmproj.gguf"])
def test_both_files_or_none(checkpoint: Path, tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def take(done: int, total: int) -> None:
        if done == total:
            (out / taken).write_bytes(b"GGUF of another program")

    with pytest.raises(MllamaError, match=f"cannot write .*{taken}: it exists; --overwrite replaces it"):
        convert(checkpoint, out / "m.gguf", overwrite=False, progress=take)
    assert [path.name for path in out.iterdir()] == [taken]


# ------------------------------------------------------------------------------------------------------------
# The command


def test_command(checkpoint: Path, tmp_path: Path) -> None:
    run = CliRunner()
    out, mmproj = str(tmp_path / "t.gguf"), str(tmp_path / "v.gguf")
    result = run.invoke(
        convert_command,
        [str(checkpoint), "-o", out, "--mmproj", mmproj, "--type", "f16", "--vision-type", "f32"],
    )
    assert result.exit_code == 0, result.output
    assert out in result.output and mmproj in result.output
    assert File(tmp_path / "t.gguf").type("output.weight") == "F16"
    assert File(tmp_path / "v.gguf").type("mm.0.weight") == "F32"
    result = run.invoke(convert_command, [str(checkpoint), "-o", out, "--single-file", "--overwrite"])
    assert result.exit_code == 0, result.output
    assert File(tmp_path / "t.gguf").type("mm.0.weight") == "BF16"


def test_command_errors_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    run, out = CliRunner(), str(tmp_path / "t.gguf")
    result = run.invoke(convert_command, [str(tmp_path / "nowhere"), "-o", out])
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path / 'nowhere'}: cannot be listed: No such file or directory\n"
    result = run.invoke(convert_command, [str(checkpoint), "-o", out, "--single-file", "--mmproj", out])
    assert result.exit_code == 2
