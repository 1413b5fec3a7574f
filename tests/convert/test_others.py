"""What people hand to `mllama convert`: fine-tunes with more tokens, adapters, quantized weights, pickles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import noisy_image, without_rights

from mllama_gguf import Mllama, ModelError
from mllama_gguf.cli.main import run
from mllama_gguf.convert.huggingface import convert

Captured = pytest.CaptureFixture[str]
GQA = tiny.ARCHS["gqa"]
N_ROWS = tiny.make_weights(GQA)["language_model.model.embed_tokens.weight"].shape[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.make_checkpoint(GQA, tmp_path / "checkpoint")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text("utf-8")) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value), "utf-8")


def refused(folder: Path, capsys: Captured, *words: str) -> None:
    """By one line with these words; nothing is written."""
    out = folder.parent / "out.gguf"
    assert run(["convert", str(folder), "-o", str(out)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("Error: ") and said.err.count("\n") == 1 and said.out == ""
    for word in words:
        assert word in said.err
    assert not out.exists()


# ---- tokens that a fine-tune has added ---------------------------------------------------------------------


def add_tokens(folder: Path, *ids: int, special: bool = True) -> None:
    added = [{"id": i, "content": f"[PAD-{i}]", "special": special} for i in ids]
    edit(folder / "tokenizer.json", lambda t: t["added_tokens"].extend(added))


@pytest.mark.parametrize(
    "ids", [(GQA.vocab_size + 1,), (GQA.vocab_size + 1, GQA.vocab_size + 2), (N_ROWS - 1,)]
)
def test_more_tokens_within_the_rows(checkpoint: Path, tmp_path: Path, ids: tuple[int, ...]) -> None:
    add_tokens(checkpoint, *ids)
    edit(checkpoint / "tokenizer_config.json", lambda t: t.update(pad_token=f"[PAD-{ids[0]}]"))
    (out,) = convert(checkpoint, tmp_path / "m.gguf", type="f32", single_file=True)
    (plain,) = convert(
        tiny.make_checkpoint(GQA, tmp_path / "plain"), tmp_path / "p.gguf", type="f32", single_file=True
    )
    with Mllama(out, image_cache=False) as model, Mllama(plain, image_cache=False) as other:
        for i in ids:
            assert model.tokenize(f"[PAD-{i}]", add_bos=False) == [i]
        assert model.metadata["tokenizer.ggml.padding_token_id"] == ids[0]
        assert (model.vocab_size, model.image_token_id) == (GQA.vocab_size, GQA.vocab_size)
        assert model.caption(noisy_image(1), max_tokens=8) == other.caption(noisy_image(1), max_tokens=8)
        logits = model.logits(model.tokenize(f"a[PAD-{ids[-1]}]b"))
        assert np.isfinite(logits).all() and logits.shape[1] == GQA.vocab_size


@pytest.mark.parametrize("i", [N_ROWS, 2**31, 10**30])
def test_tokens_without_a_row(checkpoint: Path, i: int, capsys: Captured) -> None:
    add_tokens(checkpoint, i)
    refused(checkpoint, capsys, "tokenizer.json", f"an id up to {N_ROWS - 1} is expected", f"{N_ROWS} rows")


@pytest.mark.parametrize(
    "entry", [{"id": True, "content": "x"}, {"id": "5", "content": "x"}, {"content": "x"}, 5]
)
def test_broken_entries(checkpoint: Path, entry: object, capsys: Captured) -> None:
    edit(checkpoint / "tokenizer.json", lambda t: t["added_tokens"].append(entry))
    refused(checkpoint, capsys, "tokenizer.json")


# ---- what cannot be converted ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_config", [False, True])
def test_a_lora_adapter(tmp_path: Path, with_config: bool, capsys: Captured) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/Llama\\u001b[31m"}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    if with_config:
        (folder / "config.json").write_text('{"model_type": "mllama"}')
    refused(folder, capsys, "a LoRA adapter (PEFT)", "(meta/Llama\\x1b[31m) first", "merge_and_unload")
    (folder / "adapter_config.json").write_text("[1]")
    refused(folder, capsys, "a LoRA adapter (PEFT)", "base model first")


def test_a_merged_model_with_the_rest_of_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    assert convert(checkpoint, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "its weights are a pickle (pytorch_model.bin)"),
        ("pytorch_model-00001-of-00005.bin", "safe_serialization=True"),
        ("model.pt", "its weights are a pickle"),
        ("consolidated.00.pth", "Meta's own format (consolidated.00.pth)"),
        ("model.gguf", "is GGUF already; give it to -m"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_weights_of_other_kinds(
    checkpoint: Path, name: str, words: str, with_config: bool, capsys: Captured
) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    if not with_config:
        (checkpoint / "config.json").unlink()
    refused(checkpoint, capsys, words)


@pytest.mark.parametrize(
    ("config", "tensor", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "weight", "(bitsandbytes, 4 bits)"),
        ({"load_in_8bit": True}, "weight", "(bitsandbytes, 8 bits)"),
        ({"quant_method": "gptq", "bits": 4}, "qweight", "(gptq, 4 bits)"),
        ({"quant_method": "fp8"}, "weight_scale_inv", "(fp8)"),
        (None, "weight.absmax", "(another program)"),
        (None, "weight.quant_state.bitsandbytes__nf4", "(another program)"),
    ],
)
def test_quantized_weights(
    checkpoint: Path, config: dict[str, Any] | None, tensor: str, words: str, capsys: Captured
) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    packed = {**header.pop(name), "dtype": "U8"}
    header[name.removesuffix("weight") + tensor] = packed
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    if config is not None:
        edit(checkpoint / "config.json", lambda c: c.update(quantization_config=config))
    refused(checkpoint, capsys, "config.json: the weights are quantized already", words, "16-bit")


def test_weights_that_are_floats_again(checkpoint: Path, tmp_path: Path) -> None:
    """transformers leaves the section there."""
    edit(checkpoint / "config.json", lambda c: c.update(quantization_config={"load_in_4bit": True}))
    assert convert(checkpoint, tmp_path / "m.gguf")


def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot be listed: Not a directory"):
        convert(tmp_path / "file", tmp_path / "m.gguf")
    (tmp_path / "closed" / "checkpoint").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    with without_rights(), pytest.raises(ModelError, match="cannot be listed: Permission denied"):
        convert(tmp_path / "closed" / "checkpoint", tmp_path / "m.gguf")
    (tmp_path / "closed").chmod(0o755)
