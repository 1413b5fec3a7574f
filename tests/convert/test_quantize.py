"""Quantizing: values, mixes against llama.cpp itself, whole files, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import layouts
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from helpers import TinyFiles, elsewhere

from mllama_gguf import Mllama
from mllama_gguf.backend.library import load
from mllama_gguf.cli.main import run
from mllama_gguf.convert import quantize as module
from mllama_gguf.convert.huggingface import convert
from mllama_gguf.convert.quantize import TARGETS, fitting, mix, more_bits, quantize, quantize_rows
from mllama_gguf.convert.values import f32_to_bf16
from mllama_gguf.errors import MllamaError, ModelError, RequestError
from mllama_gguf.gguf.reader import TensorEntry, read_gguf
from mllama_gguf.gguf.writer import write_head

Array = npt.NDArray[Any]
TYPES = ("F16", "BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
MOST_ERROR = {
    "F16": 3e-4,
    "BF16": 3e-3,
    "Q8_0": 6e-3,
    "Q6_K": 0.02,
    "Q5_0": 0.045,
    "Q5_1": 0.045,
    "Q5_K": 0.04,
}


def random_rows(n: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Bell-shaped values whose size differs from row to row."""
    random = np.random.default_rng(seed)
    scale = np.exp(random.uniform(-6, 3, (n, 1)))
    return (random.standard_normal((n, columns)) * scale).astype(np.float32)


def distance(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


class File:
    """A GGUF as gguf's own reader sees it."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items() if "." in name}
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.data = {t.name: t.data.tobytes() for t in reader.tensors}


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_decoding_equals_gguf_py(kind: str) -> None:
    values = random_rows(7, 768)
    rows = quantize_rows(values, "F32", kind, 768)
    ours = quantize_rows(rows, kind, "F32", 768).view(np.float32)
    raw = rows.view(np.float16) if kind == "F16" else rows
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(7, 768)
    np.testing.assert_array_equal(ours, theirs)
    assert distance(ours, values) < MOST_ERROR.get(kind, 0.09)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0"])
def test_encoding_equals_gguf_py_where_it_can(kind: str) -> None:
    values = random_rows(9, 320, seed=1)
    expected = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    assert quantize_rows(values, "F32", kind, 320).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", TYPES)
def test_from_halves_as_from_their_float32(kind: str) -> None:
    values = random_rows(5, 512, seed=2)
    half = values.astype(np.float16)
    brain = f32_to_bf16(values)
    wide = (brain.astype(np.uint32) << 16).view(np.float32)
    for stored, name, same in ((half, "F16", half.astype(np.float32)), (brain, "BF16", wide)):
        expected = quantize_rows(same, "F32", kind, 512)
        np.testing.assert_array_equal(quantize_rows(stored, name, kind, 512), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_alone_as_rows_together(kind: str) -> None:
    """600 rows of 1024 are more than one piece of the C code."""
    values = random_rows(600, 1024, seed=3)
    together = quantize_rows(values, "F32", kind, 1024)
    for i in (0, 255, 256, 257, 599):
        np.testing.assert_array_equal(quantize_rows(values[i], "F32", kind, 1024)[0], together[i])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16"])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_values_that_are_not_finite(bad: float, kind: str, stored: str) -> None:
    values = random_rows(300, 1024, seed=4).clip(-1e4, 1e4)
    values[-1, -1] = bad
    raw: Array = values.astype(np.float16) if stored == "F16" else values
    if stored == "BF16":
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        raw[-1, -1] = 0x7FC0 if np.isnan(bad) else raw[-1, -1]
    with pytest.raises(ModelError, match="not finite"):
        quantize_rows(raw, stored, kind, 1024)


@pytest.mark.parametrize("kind", TYPES)
def test_values_too_large(kind: str) -> None:
    values = random_rows(2, 256, seed=5).clip(-100, 100)
    values[1, 9] = 65504 if kind != "BF16" else 3e38
    decoded = quantize_rows(quantize_rows(values, "F32", kind, 256), kind, "F32", 256).view(np.float32)
    assert np.isfinite(decoded).all()
    values[1, 9] = 65600 if kind != "BF16" else 3.4028e38
    with pytest.raises(ModelError, match=r"too large for"):
        quantize_rows(values, "F32", kind, 256)


def test_the_c_function_refuses_what_ggml_would_die_of() -> None:
    native = load()
    kinds = gguf.GGMLQuantizationType
    f32, q4, q8k = int(kinds.F32), int(kinds.Q4_K), int(kinds.Q8_K)
    room = native.ffi.new("char[]", 1 << 16)
    for source, target, rows, columns, words in (
        (-1, f32, 1, 256, "not types"),
        (f32, 10000, 1, 256, "not types"),
        (4, f32, 1, 256, "cannot be read"),  # a type that ggml has removed
        (int(kinds.I32), q4, 1, 256, "cannot be read"),
        (f32, q8k, 1, 256, "cannot be written"),
        (f32, int(kinds.IQ2_XXS), 1, 256, "cannot be written"),  # needs an importance matrix
        (f32, q4, 1, 255, "not multiples"),
        (q4, f32, 1, 128, "not multiples"),
        (f32, q4, 0, 256, "cannot be converted"),
        (f32, q4, 1, -256, "cannot be converted"),
        (f32, q4, 1 << 40, 1 << 40, "cannot be converted"),
    ):
        status = native.lib.mllama_quantize_rows(source, room, target, room, rows, columns)
        with pytest.raises(RequestError, match=words):
            native.check(status)
    with pytest.raises(RequestError, match="cannot be converted"):
        native.check(native.lib.mllama_quantize_rows(f32, native.ffi.NULL, q4, room, 1, 256))
    with pytest.raises(ValueError, match="not rows of 256"):
        quantize_rows(np.zeros(300, np.float32), "F32", "Q4_K", 256)


# ---- mixes -------------------------------------------------------------------------------------------------


def test_which_layers_of_the_11b_get_more_bits() -> None:
    layers = [*range(5), 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, *range(35, 40)]
    assert [i for i in range(40) if more_bits(i, 40)] == layers


def test_mixes_of_the_11b_by_name() -> None:
    for target, usual in (("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")):
        given = {
            name: mix(f"{name}.weight", TARGETS[target], 40, 4)
            for name in (
                "token_embd", "output", "blk.5.attn_q", "blk.5.attn_v", "blk.4.attn_v", "blk.7.attn_v",
                "blk.38.cross_attn_v_proj", "blk.3.cross_attn_v_proj", "blk.8.cross_attn_v_proj",
                "blk.38.cross_attn_k_proj", "blk.38.cross_attn_q_proj", "blk.38.cross_attn_o_proj",
                "blk.0.ffn_down", "blk.5.ffn_down", "blk.39.ffn_down", "blk.0.ffn_up", "blk.0.ffn_gate",
                "blk.0.attn_output", "blk.0.attn_k",
            )
        }  # fmt: skip
        assert {name for name, kind in given.items() if kind == "Q6_K"} == {
            "output", "blk.4.attn_v", "blk.7.attn_v", "blk.38.cross_attn_v_proj", "blk.3.cross_attn_v_proj",
            "blk.0.ffn_down", "blk.39.ffn_down",
        }  # fmt: skip
        assert set(given.values()) == {"Q6_K", usual}
    for target, output in (("q6_k", "Q6_K"), ("q8_0", "Q8_0"), ("q4_0", "Q6_K"), ("bf16", "BF16")):
        assert mix("output.weight", TARGETS[target], 40, 4) == output
        for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"):
            assert mix(name, TARGETS[target], 40, 4) == target.upper()
    # The text of the 90B: attn_v is small beside attn_q.
    assert mix("blk.13.attn_v.weight", TARGETS["q4_k_m"], 100, 8) == "Q5_K"
    assert mix("blk.13.ffn_down.weight", TARGETS["q4_k_m"], 100, 8) == "Q4_K"


def test_rows_that_fit_no_block() -> None:
    assert [fitting(kind, 96) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q8_0")] == [
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q8_0",
    ]
    assert fitting("Q6_K", 96, "output.weight") == "Q8_0"
    assert {fitting(kind, 90) for kind in ("Q4_K", "Q6_K", "Q8_0", "Q4_0")} == {"F16"}
    assert fitting("BF16", 90) == "BF16"


def write_text(path: Path, arch: str, n_layer: int, d: int, ff: int, heads: tuple[int, int]) -> Path:
    """A text of random values that both programs can quantize, for the keys that quantizing reads."""
    w = gguf.GGUFWriter(path, arch)
    for key, value in {
        "block_count": n_layer, "context_length": 64, "embedding_length": d, "feed_forward_length": ff,
        "attention.head_count": heads[0], "attention.head_count_kv": heads[1], "vocab_size": 40,
        "rope.dimension_count": d // heads[0],
    }.items():  # fmt: skip
        w.add_uint32(f"{arch}.{key}", value)
    w.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    kv, values = d // heads[0] * heads[1], random_rows(600, 600)
    for name in ("token_embd", "output"):
        w.add_tensor(f"{name}.weight", values[:40, :d].copy())
    w.add_tensor("output_norm.weight", values[0, :d].copy())
    for i in range(n_layer):
        for name, rows, columns in (
            ("attn_q", d, d), ("attn_k", kv, d), ("attn_v", kv, d), ("attn_output", d, d),
            ("ffn_gate", ff, d), ("ffn_up", ff, d), ("ffn_down", d, ff),
        ):  # fmt: skip
            w.add_tensor(f"blk.{i}.{name}.weight", np.roll(values, i)[:rows, :columns].copy())
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", values[i % 40, :d].copy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize(
    ("n_layer", "d", "ff", "heads"),
    [
        (16, 256, 512, (8, 2)),
        (80, 256, 256, (8, 1)),  # 80 layers are a 70B to llama.cpp
        (8, 96, 160, (3, 1)),  # rows that the K types cannot hold
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_types_and_bytes_are_those_of_llama_cpp(
    tmp_path: Path, target: str, n_layer: int, d: int, ff: int, heads: tuple[int, int]
) -> None:
    theirs = write_text(tmp_path / "llama.gguf", "llama", n_layer, d, ff, heads)
    ours = write_text(tmp_path / "mllama.gguf", "mllama", n_layer, d, ff, heads)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TARGETS[target].file_type, 2
    out = tmp_path / "out.gguf"
    assert llama_cpp.llama_model_quantize(str(theirs).encode(), str(out).encode(), params) == 0
    expected = File(out)
    warnings: list[str] = []
    done = quantize(ours, tmp_path / "ours.gguf", target, warn=warnings.append)
    given = File(tmp_path / "ours.gguf")
    assert given.types == expected.types
    assert given.data == expected.data
    for key in ("general.file_type", "general.quantization_version"):
        assert given.keys[key] == expected.keys[key]
    assert (
        bool(done.fallbacks) == bool(warnings) == (d == 96 and target in ("q4_k_m", "q5_k_m", "q6_k", "q4_0"))
    )


# ---- whole files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tiny_files: Callable[[str], TinyFiles]) -> TinyFiles:
    return tiny_files("quant")


PROMPT = [5, 9, 30, 77, 101, 200, 13, 2]
MOST_DISTANCE = {
    "q4_k_m": 0.2,
    "q5_k_m": 0.11,
    "q6_k": 0.06,
    "q8_0": 0.03,
    "q4_0": 0.23,
    "bf16": 0.01,
    "f16": 2e-3,
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_quantized_model(files: TinyFiles, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out.gguf"
    done = quantize(files.one, out, target)
    before, after = File(files.one), File(out)
    assert done.path == out and done.size == out.stat().st_size < done.size_before
    assert not done.fallbacks

    ours = {"general.file_type", "general.quantization_version"}
    assert {k: v for k, v in after.keys.items() if k not in ours} == {
        k: v for k, v in before.keys.items() if k not in ours
    }
    assert after.keys["general.file_type"] == TARGETS[target].file_type
    assert after.keys["general.quantization_version"] == 2

    changed = {name for name in before.types if after.types[name] != before.types[name]}
    assert changed == {
        name
        for name in before.types
        if name in ("token_embd.weight", "output.weight")
        or (name.startswith("blk.") and "norm" not in name and name.endswith(".weight"))
    }
    for name in before.data.keys() - changed:
        assert after.data[name] == before.data[name], name
    with Mllama(files.one) as exact, Mllama(out) as model:
        image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
        prompt = [files.arch.image_token, *PROMPT]
        apart = distance(model.logits(prompt, [image]), exact.logits(prompt, [image]))
    assert 0 < apart < MOST_DISTANCE[target]


@pytest.mark.parametrize("target", ["q4_k_m", "q8_0", "bf16"])
def test_converting_straight_is_converting_and_quantizing(
    files: TinyFiles, tmp_path: Path, target: str
) -> None:
    checkpoint = tiny.make_checkpoint(files.arch, tmp_path / "hf")
    text, vision = convert(checkpoint, tmp_path / "t.gguf", type=target)
    quantize(files.text, tmp_path / "q.gguf", target)
    straight, after = File(text), File(tmp_path / "q.gguf")
    assert (straight.types, straight.data) == (after.types, after.data)
    assert straight.keys["general.file_type"] == after.keys["general.file_type"]
    assert {kind for name, kind in File(vision).types.items()} == {"F32", "BF16"}
    (one,) = convert(checkpoint, tmp_path / "one.gguf", type=target, vision_type="f32", single_file=True)
    quantize(files.one, tmp_path / "q1.gguf", target)
    assert (File(one).types, File(one).data) == (
        File(tmp_path / "q1.gguf").types,
        File(tmp_path / "q1.gguf").data,
    )


@pytest.mark.parametrize("stored", ["F64", "F16", "BF16"])
def test_converting_from_other_checkpoints(tmp_path: Path, stored: str) -> None:
    """As from a checkpoint that holds the same values as F32."""
    arch = tiny.ARCHS["quant"]
    checkpoint = tiny.make_checkpoint(arch, tmp_path / "hf", dtype=stored)
    (float32,) = convert(checkpoint, tmp_path / "f32.gguf", type="f32", single_file=True)
    (straight,) = convert(checkpoint, tmp_path / "s.gguf", type="q5_k_m", vision_type="f32", single_file=True)
    quantize(float32, tmp_path / "q.gguf", "q5_k_m")
    assert File(straight).data == File(tmp_path / "q.gguf").data


def test_converting_says_what_fell_back(tmp_path: Path) -> None:
    checkpoint = tiny.make_checkpoint(tiny.ARCHS["square"], tmp_path / "hf")
    warnings: list[str] = []
    (out,) = convert(checkpoint, tmp_path / "o.gguf", type="q4_k_m", single_file=True, warn=warnings.append)
    assert len(warnings) == 1 and "rows are not multiples of the block" in warnings[0]
    assert File(out).types["blk.0.attn_q.weight"] == "Q5_0"
    with Mllama(out) as model:
        assert np.isfinite(model.logits(PROMPT)).all()


def test_pieces_and_threads_do_not_show(
    files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(files.one, tmp_path / "whole.gguf", "q4_k_m", n_threads=1)
    expected = (tmp_path / "whole.gguf").read_bytes()
    monkeypatch.setattr(module, "_PIECE_VALUES", 3 * 256)
    for threads in (1, 4):
        quantize(files.one, tmp_path / "pieces.gguf", "q4_k_m", n_threads=threads)
        assert (tmp_path / "pieces.gguf").read_bytes() == expected


@pytest.mark.parametrize("layout", ["A", "B"])
def test_files_of_other_programs_stay_in_their_layout(tmp_path: Path, layout: layouts.Layout) -> None:
    paths = layouts.write(tiny.ARCHS["quant"], tmp_path, layout)
    quantize(paths[0], tmp_path / "q.gguf", "q8_0")
    assert "mllama.converter" not in File(tmp_path / "q.gguf").keys
    with Mllama(*paths) as exact, Mllama(tmp_path / "q.gguf", *paths[1:]) as model:
        image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
        prompt = [exact.hparams.image_token_id, *PROMPT]
        assert distance(model.logits(prompt, [image]), exact.logits(prompt, [image])) < 0.03


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    arch = tiny.ARCHS["quant"]
    (tmp_path / "split").mkdir()
    (tmp_path / "whole").mkdir()
    split = layouts.write(arch, tmp_path / "split", "canonical", one_file=True, split=30)
    whole = layouts.write(arch, tmp_path / "whole", "canonical", one_file=True)
    quantize(split[0], tmp_path / "s.gguf", "q4_k_m")
    quantize(whole[0], tmp_path / "w.gguf", "q4_k_m")
    assert File(tmp_path / "s.gguf").data == File(tmp_path / "w.gguf").data
    assert not any(key.startswith("split.") for key in File(tmp_path / "s.gguf").keys)
    with Mllama(tmp_path / "s.gguf") as a, Mllama(tmp_path / "w.gguf") as b:
        np.testing.assert_array_equal(a.logits(PROMPT), b.logits(PROMPT))


def test_progress_counts_every_byte(files: TinyFiles, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize(files.one, tmp_path / "q.gguf", "q6_k", progress=lambda done, total: seen.append((done, total)))
    total = sum(t.n_bytes for t in read_gguf(tmp_path / "q.gguf").tensors)
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# ---- what is refused, and trouble --------------------------------------------------------------------------


def refused(source: Path, target: str, *words: str) -> None:
    """One line, and nothing is left behind."""
    out = source.parent / "refused"
    out.mkdir(exist_ok=True)
    with pytest.raises(ModelError) as caught:
        quantize(source, out / "q.gguf", target)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not list(out.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_that_cannot_be_stored_name_their_tensor(
    files: TinyFiles, tmp_path: Path, value: float
) -> None:
    source = tmp_path / "bad.gguf"
    shutil.copy(files.one, source)
    file = read_gguf(source)
    entry = next(t for t in file.tensors if t.name == "blk.2.ffn_up.weight")
    with source.open("r+b") as f:
        f.seek(file.data_offsets[0] + entry.offset + entry.n_bytes - 4)
        f.write(np.float32(value).tobytes())
    words = "not finite" if not np.isfinite(value) else "1e+06 is too large for"
    refused(source, "q4_k_m", str(source), "blk.2.ffn_up.weight", words)
    if value == 1e6:
        quantize(source, tmp_path / "q.gguf", "bf16")  # fits


def test_a_quantized_model_is_not_quantized_again(files: TinyFiles, tmp_path: Path) -> None:
    source = tmp_path / "q8.gguf"
    quantize(files.one, source, "q8_0")
    refused(source, "q4_k_m", "token_embd.weight", "Q8_0", "--allow-requantize")
    refused(source, "bf16", "Q8_0")
    quantize(source, tmp_path / "again.gguf", "q4_k_m", allow_requantize=True)
    entry = next(t for t in read_gguf(source).tensors if t.name == "blk.0.attn_q.weight")
    values = gguf.dequantize(
        np.frombuffer(File(source).data[entry.name], np.uint8), gguf.GGMLQuantizationType.Q8_0
    )
    expected = quantize_rows(values, "F32", "Q4_K", 256)
    assert File(tmp_path / "again.gguf").data[entry.name] == expected.tobytes()
    quantize(source, tmp_path / "same.gguf", "q8_0")  # nothing to do but copying
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()


def test_other_inputs(files: TinyFiles, tmp_path: Path) -> None:
    refused(write_text(tmp_path / "llama.gguf", "llama", 1, 256, 256, (4, 4)), "q8_0", "'llama'")
    shutil.copy(files.mmproj, tmp_path / "v.gguf")
    refused(tmp_path / "v.gguf", "q8_0", "no text model")
    (tmp_path / "short.gguf").write_bytes(files.one.read_bytes()[:-100])
    refused(tmp_path / "short.gguf", "q8_0", "truncated")
    (tmp_path / "other.gguf").write_bytes(b"hello")
    refused(tmp_path / "other.gguf", "q8_0", "not a GGUF")
    refused(tmp_path / "missing.gguf", "q8_0", "No such file")
    damaged = bytearray(files.one.read_bytes())
    at = damaged.index(b"mllama.attention.head_count_kv") + len("mllama.attention.head_count_kv") + 4
    damaged[at : at + 4] = bytes(4)
    (tmp_path / "zero.gguf").write_bytes(damaged)
    refused(tmp_path / "zero.gguf", "q8_0", "head_count_kv", "0")
    scalar = bytearray(files.one.read_bytes())
    at = scalar.index(b"output_norm.weight") + len("output_norm.weight")
    scalar[at : at + 12] = bytes(4)  # no dimensions
    (tmp_path / "scalar.gguf").write_bytes(scalar)
    refused(tmp_path / "scalar.gguf", "q8_0", "output_norm.weight: [] of F32 cannot be read")
    with pytest.raises(ValueError, match="q2_k"):
        quantize(files.one, tmp_path / "q.gguf", "q2_k")


def test_damaged_tensor_tables_are_errors(files: TinyFiles, tmp_path: Path) -> None:
    """Any byte of the table changed: an error of ours, or a file as good as the input."""
    original = files.text.read_bytes()
    start = original.index(b"token_embd.weight") - 8
    random = np.random.default_rng(7)
    for _ in range(60):
        damaged = bytearray(original)
        at = start + int(random.integers(read_gguf(files.text).data_offsets[0] - start))
        damaged[at] ^= 1 << int(random.integers(8))
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            quantize(tmp_path / "d.gguf", tmp_path / "q.gguf", "q8_0", warn=lambda _: None)
        except ModelError as e:
            assert "\n" not in str(e)
        assert not list(tmp_path.glob(".*"))


def test_the_input_is_never_the_output(files: TinyFiles, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    shutil.copy(files.one, source)
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "hard.gguf").hardlink_to(source)
    for name in ("m.gguf", "link.gguf", "hard.gguf"):
        with pytest.raises(MllamaError, match="it is the input"):
            quantize(source, tmp_path / name, "q8_0")
    assert source.read_bytes() == files.one.read_bytes()


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_errors_leave_nothing_behind(files: TinyFiles, tmp_path: Path) -> None:
    (tmp_path / "q.gguf").write_bytes(b"GGUF, the file before")
    for limit in (1000, 100_000, 1_000_000):
        with (
            file_size_limit(limit),
            pytest.raises(MllamaError, match=r"cannot write .*q\.gguf: File too large"),
        ):
            quantize(files.one, tmp_path / "q.gguf", "q8_0")
        assert [p.name for p in tmp_path.iterdir()] == ["q.gguf"]
    assert (tmp_path / "q.gguf").read_bytes() == b"GGUF, the file before"


def test_a_full_disk_is_told_before(
    files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MllamaError, match=r"[kMG]B needed, 1.0 kB free"):
        quantize(files.one, tmp_path / "q.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def sparse_model(path: Path, rows: int = 1 << 20) -> Path:
    """A text whose embedding is 1 GB of zeros as F32, taking no disk."""
    keys = [module._uint32_key(f"mllama.{key}", 1) for key in (
        "block_count", "attention.head_count", "attention.head_count_kv",
    )]  # fmt: skip
    text = b"mllama"
    name = b"general.architecture"
    architecture = len(name).to_bytes(8, "little") + name + (8).to_bytes(4, "little")
    keys.append(architecture + len(text).to_bytes(8, "little") + text)
    entry = TensorEntry("token_embd.weight", (256, rows), 0, 0)
    with path.open("wb") as f:
        write_head(f, keys, [entry], 32)
        f.truncate(f.tell() + entry.n_bytes)
    return path


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    source = sparse_model(tmp_path / "large.gguf")
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mllama_gguf",
            "quantize",
            str(source),
            str(tmp_path / "q.gguf"),
            "--type",
            "q5_k_m",
        ],
        stderr=subprocess.PIPE,
        text=True,
        **elsewhere(),
    )
    while not list(tmp_path.glob(".mllama-*.tmp")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (130, "Interrupted\n")
    assert time.monotonic() - start < 3
    assert [p.name for p in tmp_path.iterdir()] == ["large.gguf"]


def test_memory_stays_small(tmp_path: Path) -> None:
    """A tensor of 1 GB goes through in pieces: beside what is loaded anyway, some 10 MB a thread."""
    source = sparse_model(tmp_path / "large.gguf")
    program = (
        "import pathlib, sys\n"
        "from mllama_gguf.backend.library import load\n"
        "from mllama_gguf.convert.quantize import quantize\n"
        "peak = lambda: int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "import mllama_gguf.model, gguf; load(); before = peak()\n"
        "quantize(sys.argv[1], sys.argv[2], 'q8_0', n_threads=4); print(peak() - before)"
    )
    if not Path("/proc/self/status").exists():
        program = program.replace("peak = lambda: ", "peak = lambda: 0 and ")
    args = [sys.executable, "-c", program, str(source), str(tmp_path / "q.gguf")]
    done = subprocess.run(args, stdout=subprocess.PIPE, check=True, text=True, **elsewhere())
    assert int(done.stdout) < 100_000  # kB


# ---- the command -------------------------------------------------------------------------------------------


def test_command(files: TinyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q.gguf"
    assert run(["quantize", str(files.one), str(out), "--type", "q4_k_m", "--json", "-t", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "path": str(out),
        "size_before": files.one.stat().st_size,
        "size": out.stat().st_size,
        "types": {"F32": 84, "Q4_K": 25, "Q6_K": 5},
        "fallbacks": {},
    }
    assert run(["quantize", str(files.one), str(out), "--type", "q8_0", "--overwrite"]) == 0
    assert "30 Q8_0" in capsys.readouterr().out
    assert run(["quantize", str(out), str(tmp_path / "r.gguf"), "--type", "q4_0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1
    assert run(["quantize", str(out), str(tmp_path / "r.gguf"), "--type", "q2_k"]) == 2


def test_the_command_says_what_fell_back(
    tiny_files: Callable[[str], TinyFiles], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(tiny_files("square").one), str(tmp_path / "q.gguf"), "--type", "q6_k"]) == 0
    assert capsys.readouterr().err.startswith("Note: token_embd.weight and 29 more: rows are not multiples")


def test_converting_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny.make_checkpoint(tiny.ARCHS["quant"], tmp_path / "hf")
    assert run(["convert", str(checkpoint), "-o", str(tmp_path / "c.gguf"), "--type", "q4_k_m"]) == 0
    assert File(tmp_path / "c.gguf").types["output.weight"] == "Q6_K"
    assert File(tmp_path / "c-mmproj.gguf").types["mm.0.weight"] == "BF16"
