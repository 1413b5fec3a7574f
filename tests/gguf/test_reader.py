"""The reader of GGUF heads."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import TinyFiles

from mllama_gguf.cli.main import run
from mllama_gguf.errors import ModelError
from mllama_gguf.gguf.reader import LONGEST_ARRAY, LongArray, read_gguf

EXAMPLE = Path(__file__).parents[2] / "examples" / "apple.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "mllama")
    writer.add_uint8("a.u8", 200)
    writer.add_int16("a.i16", -5)
    writer.add_uint64("a.u64", 2**40)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße")
    writer.add_array("a.short", [1, 2, 3])
    writer.add_array("a.strings", ["x", "yy", ""])
    writer.add_array("a.long", list(range(LONGEST_ARRAY + 1)))
    writer.add_array("a.vocabulary", [str(i) for i in range(LONGEST_ARRAY + 1)])
    writer.add_string("a.last", "end")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("v.q", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_keys_and_tensors(made: Path) -> None:
    file = read_gguf(made)
    assert file.keys == {
        "general.architecture": "mllama",
        "a.u8": 200,
        "a.i16": -5,
        "a.u64": 2**40,
        "a.f32": 0.5,
        "a.f64": 0.1,
        "a.bool": True,
        "a.string": "Grüße",
        "a.short": [1, 2, 3],
        "a.strings": ["x", "yy", ""],
        "a.long": LongArray(LONGEST_ARRAY + 1),
        "a.vocabulary": LongArray(LONGEST_ARRAY + 1),
        "a.last": "end",
    }
    text, vision = file.tensors
    assert (text.name, text.ne, text.type_name, text.n_bytes) == ("token_embd.weight", (32, 4), "F32", 512)
    assert (vision.name, vision.ne, vision.type_name, vision.n_bytes) == ("v.q", (32, 2), "Q8_0", 68)
    assert file.architecture == "mllama"
    assert file.has_text
    assert file.has_vision


def test_agrees_with_the_gguf_package(tiny_files: Callable[[str], TinyFiles]) -> None:
    path = tiny_files("gqa").one
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert {t.name: (t.ne, t.n_bytes) for t in ours.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in theirs.tensors
    }
    for name, value in ours.keys.items():
        if not isinstance(value, LongArray):
            assert theirs.fields[name].contents() == value, name


def test_every_truncation_is_an_error(made: Path, tmp_path: Path) -> None:
    data = made.read_bytes()
    head = data.index(b"v.q") + 3 + 4 + 16 + 4 + 8
    short = tmp_path / "short.gguf"
    for length in [*range(300), *range(300, head, 97), head - 1]:
        short.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"short\.gguf"):
            read_gguf(short)


def test_damage_is_an_error_or_harmless(made: Path, tmp_path: Path) -> None:
    data, rng, bad = made.read_bytes(), random.Random(0), tmp_path / "bad.gguf"
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(mutated) - 8)
            mutated[at : at + 8] = struct.pack(
                "<Q", rng.choice([0, 1, 2**63, 2**64 - 1, rng.getrandbits(64)])
            )
        bad.write_bytes(mutated)
        try:
            read_gguf(bad)
        except ModelError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(50), b"GGUF\x01\0\0\0" + bytes(50)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.gguf"):
        read_gguf(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError):
        read_gguf(tmp_path)


LONG = "Z" * 1_000_000


@pytest.mark.parametrize(
    ("architecture", "keys", "tensor"),
    [
        (LONG, {}, "v.a"),
        ("mllama", {"general.alignment": LONG}, "v.a"),
        ("mllama", {"mllama.vision.image_size": LONG, "mllama.block_count": LONG}, "v.a"),
        ("mllama", {}, f"v.{LONG}"),
    ],
)
def test_errors_are_short_whatever_a_file_says(
    tmp_path: Path, architecture: str, keys: dict[str, str], tensor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_string(key, value)
    for name in ("token_embd.weight", tensor):
        writer.add_tensor(name, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size - 100)  # inside the last tensor
    for args in (
        ["info", path],
        ["quantize", path, tmp_path / "b.gguf", "--type", "q4_0"],
        ["preprocess", EXAMPLE, "-m", path],
        ["caption", EXAMPLE, "-m", path],
    ):
        assert run([str(arg) for arg in args]) == 1
        said = capsys.readouterr()
        assert said.err.startswith(f"Error: {path}: ") and len(said.err) < 1000
        assert not said.out
