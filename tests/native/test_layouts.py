"""Every layout gives the same model: files of tests/layouts.py, all from the same random weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from golden_cases import case, relative_error, tiled
from helpers import TinyFiles, noisy_image
from layouts import CHANNELS_KEY, CONVERTER_KEY, EPSILON_KEY, write

from mllama_gguf import Mllama
from mllama_gguf.cli.main import run
from mllama_gguf.errors import ModelError, RequestError
from mllama_gguf.gguf.reader import read_gguf
from mllama_gguf.inspect.info import ModelInfo, model_info

Files = Callable[[str], TinyFiles]
F32 = npt.NDArray[np.float32]

SAME = 1e-6  # relative L2 of the logits; the files hold the same numbers
PROMPTS = ("text_before_image", "adjacent_then_one")
OPTIONAL = (EPSILON_KEY, CHANNELS_KEY)
GQA = tiny.ARCHS["gqa"]


def logits(arch: tiny.Arch, files: list[Path], **options: Any) -> F32:
    """Of all prompts, one after the other."""
    exact = {"type_k": "f32", "type_v": "f32", "n_ctx": 512, "n_threads": 1}
    with Mllama(*files, **{**exact, **options}) as model:
        prompts = [case(arch, name) for name in PROMPTS]
        return np.concatenate([model.logits(p.tokens, [tiled(arch, i) for i in p.images]) for p in prompts])


def info(files: list[Path]) -> ModelInfo:
    (found,) = model_info(files)
    return found


def refusal(files: list[Path]) -> str:
    """The words with which the files are refused, one line that names one of them."""
    with pytest.raises(ModelError) as error:
        Mllama(*files, n_ctx=64).close()
    words = str(error.value)
    assert "\n" not in words
    assert str(files[0].parent) in words
    return words


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_the_same_logits_from_all_layouts(name: str, tiny_files: Files, tmp_path: Path) -> None:
    arch = tiny.ARCHS[name]
    expected = logits(arch, [tiny_files(name).text, tiny_files(name).mmproj])
    for what, files in {
        "canonical": write(arch, tmp_path / "two", "canonical"),
        "canonical, one file": write(arch, tmp_path / "one", "canonical", one_file=True),
        "A": write(arch, tmp_path / "a", "A"),
        "A without keys": write(arch, tmp_path / "bare", "A", without=(*OPTIONAL, "general.type")),
        "A without the swap": write(arch, tmp_path / "plain", "A", swap_ffn=False),
        "B": write(arch, tmp_path / "b", "B"),
        "B, split": write(arch, tmp_path / "split", "B", split=17),
        "A, split": write(arch, tmp_path / "split", "A", split=40),
    }.items():
        assert relative_error(logits(arch, files), expected) <= SAME, what


@pytest.mark.parametrize("name", tiny.ARCHS)
def test_without_the_repair_b_is_another_model(name: str, tiny_files: Files, tmp_path: Path) -> None:
    """With the key of our converter the file passes for a canonical one."""
    arch = tiny.ARCHS[name]
    expected = logits(arch, [tiny_files(name).one])
    files = write(arch, tmp_path, "B", keys={CONVERTER_KEY: "not true"})
    assert relative_error(logits(arch, files), expected) > 1e-3
    assert info(files).layout == "canonical"


def test_norms_that_are_not_f32_and_weights_that_are_copied(tmp_path: Path) -> None:
    norms = ("_norm.weight",)
    expected = logits(GQA, write(GQA, tmp_path / "canonical", "canonical", f16=norms))
    files = write(GQA, tmp_path / "b", "B", f16=norms)
    for use_mmap in (True, False):
        assert relative_error(logits(GQA, files, use_mmap=use_mmap), expected) <= SAME


def test_a_square_mlp_is_told_by_the_names(tmp_path: Path) -> None:
    """Where fc1 and fc2 have the same shape, A's other names say that they are swapped."""
    arch = replace(GQA, name="square mlp", vision_ff=GQA.vision_width)
    expected = logits(arch, write(arch, tmp_path / "canonical", "canonical"))
    assert relative_error(logits(arch, write(arch, tmp_path / "a", "A")), expected) <= SAME


def test_what_was_recognised(tmp_path: Path) -> None:
    def facts(*args: Any, **options: Any) -> tuple[str | None, list[str]]:
        found = info(write(GQA, tmp_path, *args, **options))
        return found.layout, [
            word
            for word in ("q_norm", "swapped", "num_channels", "epsilon")
            if any(word in repair for repair in found.repairs)
        ]

    assert facts("canonical") == ("canonical", [])
    assert facts("canonical", one_file=True) == ("canonical", [])
    assert facts("canonical", without=[CONVERTER_KEY]) == ("unknown", [])
    assert facts("A") == ("A", ["swapped"])
    assert facts("A", swap_ffn=False) == ("A", [])
    assert facts("A", without=OPTIONAL) == ("A", ["swapped", "num_channels", "epsilon"])
    assert facts("B") == ("B", ["q_norm"])
    assert facts("B", split=30) == ("B", ["q_norm"])
    # The text of B stays what it is beside another projector.
    text, projector = write(GQA, tmp_path, "B")[0], write(GQA, tmp_path, "A")[1]
    with Mllama(text, projector, n_ctx=64) as model:
        assert model.layout == "A"
        assert ["q_norm" in model.repairs[0], "swapped" in model.repairs[1]] == [True, True]


def test_b_beside_a_projector_of_its_own(tiny_files: Files, tmp_path: Path) -> None:
    expected = logits(GQA, [tiny_files("gqa").one])
    files = [*write(GQA, tmp_path, "B"), tiny_files("gqa").mmproj]
    assert relative_error(logits(GQA, files), expected) <= SAME


@pytest.mark.parametrize("layout", ["canonical", "A"])
def test_text_alone_chats_and_sees_nothing(layout: layouts.Layout, tmp_path: Path) -> None:
    text, projector = write(GQA, tmp_path, layout)
    assert info([text]).layout == "text only"
    prompt = case(GQA, "text_only").tokens
    with (
        Mllama(text, projector, n_ctx=64, n_threads=1) as whole,
        Mllama(text, n_ctx=64, n_threads=1) as model,
    ):
        np.testing.assert_array_equal(model.logits(prompt), whole.logits(prompt))
        reply = model.create_chat_completion([{"role": "user", "content": "see the dog"}], max_tokens=3)
        assert reply["usage"]["completion_tokens"] > 0
        with pytest.raises(RequestError, match=r"text\.gguf is a text model without vision encoder"):
            model.caption(noisy_image(1))
        with pytest.raises(RequestError, match=r"text\.gguf is a text model without vision encoder"):
            model.encode_image(noisy_image(1))
    assert "give it as the mmproj file" in refusal([projector])


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("A", {"keys": {"mllama.vision.projection_dim": 95}}, "they are not of one model"),
        ("A", {"keys": {CHANNELS_KEY: 4}}, "'mllama.vision.num_channels' is 4"),
        ("A", {"without": ["v.blk.1.ln2.bias"]}, "tensor 'v.blk.1.ln2.bias' is missing"),
        ("A", {"without": ["v.global.blk.0.ffn_down.weight"]}, "'v.global.blk.0.ffn_down.weight' is missing"),
        (
            "A",
            {
                "keys": {
                    "mllama.vision.block_count": 4,
                    "mllama.vision.intermediate_layers_indices": [0, 1, 3],
                }
            },
            "'v.blk.4.ln1.weight' is beyond the 4 layers",
        ),
        ("A", {"keys": {"mllama.vision.feed_forward_length": 99}}, "'v.blk.0.ffn_down.weight' is [48, 100]"),
        ("A", {"without": ["mllama.vision.image_size"]}, "'mllama.vision.image_size' is missing"),
        ("A", {"without": ["mllama.vision.intermediate_layers_indices"]}, "indices' is missing"),
        (
            "A",
            {"keys": {"mllama.vision.intermediate_layers_indices": [0, 1]}},
            "tensor 'mm.0.weight' is [192, 96]",
        ),
        ("B", {"without": ["blk.0.cross_attn_q_norm.weight"]}, "'blk.0.cross_attn_q_norm.weight' is missing"),
        ("B", {"without": ["mm.0.bias"]}, "tensor 'mm.0.bias' is missing"),
        ("B", {"without": ["mllama.vocab_size"]}, "key 'mllama.vocab_size' is missing"),
    ],
)
def test_what_does_not_fit(
    layout: layouts.Layout, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(write(GQA, tmp_path, layout, **change))


def test_as_projector_with_text_is_refused(tmp_path: Path) -> None:
    weights = tiny.make_weights(GQA)
    both = layouts.text_tensors(GQA, weights, permute_cross=False) | layouts.vision_tensors(
        GQA, weights, a_names=True, swap_ffn=True, permute=False
    )
    keys = layouts.text_keys(GQA) | layouts.vision_keys(GQA)
    assert "no known program writes that" in refusal([layouts.save(tmp_path / "x.gguf", keys, both)])


# ---- split files -------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A split one-file model of canonical layout, all parts."""
    (first,) = write(GQA, tmp_path, "canonical", one_file=True, split=40)
    found = sorted(first.parent.glob("*.gguf"))
    assert found[0] == first
    assert len(found) >= 4
    return found


def test_split_files(parts: list[Path], tiny_files: Files) -> None:
    whole, n = read_gguf(tiny_files("gqa").one), len(parts)
    file = read_gguf(parts[0])
    assert file.paths == tuple(parts)
    assert sorted(t.name for t in file.tensors) == sorted(t.name for t in whole.tensors)
    found = info([parts[0]])
    assert (found.layout, found.files[0].n_files) == ("canonical", n)
    assert found.files[0].size == sum(path.stat().st_size for path in parts)
    with Mllama(parts[0], n_ctx=64) as model, Mllama(tiny_files("gqa").one, n_ctx=64) as other:
        assert model.tokenize("the user, a cat") == other.tokenize("the user, a cat")
        assert model.caption(noisy_image(1), max_tokens=4, temperature=0) == other.caption(
            noisy_image(1), max_tokens=4, temperature=0
        )


def refused_by_both(path: Path, words: str) -> None:
    """By the loader and by the reader of heads."""
    assert words in refusal([path])
    with pytest.raises(ModelError, match=words):
        read_gguf(path)


def test_split_files_that_are_not_whole(parts: list[Path]) -> None:
    n = len(parts)
    refused_by_both(parts[1], f"NAME-00001-of-{n:05}.gguf")
    parts[2].rename(parts[2].with_name("elsewhere"))
    refused_by_both(parts[0], f"part 3 of {n} of the model is missing")
    shutil.copy(parts[1], parts[2])
    refused_by_both(parts[0], f"not part 3 of {n}")
    parts[2].with_name("elsewhere").rename(parts[2])
    info([parts[0]])
    parts[0].rename(parts[0].with_name("model.gguf"))
    refused_by_both(parts[0].with_name("model.gguf"), f"-00001-of-{n:05}.gguf for the others to be found")


def test_split_files_in_the_wrong_order(parts: list[Path]) -> None:
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1])
    parts[1].with_name("x").rename(parts[2])
    refused_by_both(parts[0], f"not part 2 of {len(parts)}")


def test_split_files_of_two_models(parts: list[Path], tmp_path: Path) -> None:
    """The same tensors twice, or fewer than there should be."""

    def number(path: Path, no: int) -> None:
        data, name = bytearray(path.read_bytes()), b"split.no"
        struct.pack_into("<H", data, data.index(name) + len(name) + 4, no)
        path.write_bytes(data)

    kept = parts[2].read_bytes()
    shutil.copy(parts[1], parts[2])
    number(parts[2], 2)
    assert "they are not parts of one model" in refusal([parts[0]])
    parts[2].write_bytes(kept)
    fewer = write(GQA, tmp_path / "fewer", "canonical", one_file=True, split=40, without=["mm.0.bias"])[0]
    shutil.copy(sorted(fewer.parent.glob("*.gguf"))[-1], parts[-1])
    assert "split.tensors.count" in refusal([parts[0]])


# ---- other kinds of GGUF -----------------------------------------------------------------------------------


def test_big_endian_and_version_1(tmp_path: Path) -> None:
    (big,) = write(GQA, tmp_path / "big", "B", big_endian=True)
    refused_by_both(big, "a big-endian GGUF file")
    (old,) = write(GQA, tmp_path / "old", "B")
    old.write_bytes(b"GGUF" + struct.pack("<I", 1) + old.read_bytes()[8:])
    refused_by_both(old, "GGUF version 1")


# ---- mllama info -------------------------------------------------------------------------------------------


def test_info_names_layout_and_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in write(GQA, tmp_path, "A", without=OPTIONAL)]
    assert run(["info", *files]) == 0
    out = capsys.readouterr().out
    for words in ("A: two files", "repaired", "ffn_up and ffn_down", "num_channels' is missing: 3"):
        assert words in out
    (split,) = write(GQA, tmp_path, "B", split=30)
    assert run(["info", str(split), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "B"
    assert "cross_attn_q_norm" in found["repairs"][0]
    assert found["files"][0]["n_files"] > 1
