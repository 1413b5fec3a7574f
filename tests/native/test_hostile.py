"""Damaged and hostile model files: one `ModelError`, never a crash.

CI also runs this file with the library compiled under AddressSanitizer and UBSan, and native/fuzz beside it.
Every model is loaded with its weights and its vocabulary; a mutation that leaves a valid file (a changed
weight, say) may load.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from helpers import TinyFiles
from layouts import read_parts, write

from mllama_gguf import Mllama
from mllama_gguf.errors import MllamaError, ModelError

Files = Callable[[str], TinyFiles]


def opens(*files: Path) -> bool:
    """Whether the model loads; anything but an `MllamaError` of one line is a failure of the test."""
    try:
        Mllama(*files, n_ctx=64).close()
    except MllamaError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


@pytest.fixture(scope="module")
def original(tiny_files: Files) -> bytes:
    return tiny_files("gqa").one.read_bytes()


@dataclass(frozen=True)
class Victim:
    """A model of one file or several, one of which is damaged."""

    files: list[Path]  # to open
    damaged: Path
    original: bytes
    data_offset: int  # where the tensor table ends

    def opens(self, data: bytes | bytearray) -> bool:
        """Whether the model loads with these bytes in place of the original."""
        self.damaged.write_bytes(data)
        return opens(*self.files)


VICTIMS = ("canonical", "A, text", "A, projector", "B", "split, first", "split, second", "split, last")


@pytest.fixture(params=VICTIMS)
def victim(request: pytest.FixtureRequest, tiny_files: Files, tmp_path: Path) -> Victim:
    arch = tiny.ARCHS["gqa"]
    layout, _, which = request.param.partition(", ")
    if layout == "canonical":
        files = [tmp_path / "model.gguf"]
        files[0].write_bytes(tiny_files("gqa").one.read_bytes())
    else:
        split = 50 if layout == "split" else 0
        files = write(arch, tmp_path, "A" if layout == "A" else "B", split=split)
    candidates = read_parts(files[0]) if layout == "split" else files
    damaged = candidates[{"": 0, "text": 0, "first": 0, "projector": 1, "second": 1, "last": -1}[which]]
    return Victim(files, damaged, damaged.read_bytes(), int(gguf.GGUFReader(damaged).data_offset))


def test_the_original_opens(victim: Victim) -> None:
    assert victim.opens(victim.original)


def test_truncated_anywhere(victim: Victim) -> None:
    rng = np.random.default_rng(1)
    end, size = victim.data_offset, len(victim.original)
    cuts = {0, 1, 3, 4, 7, 8, 23, 24, end, size - 1}
    cuts |= set(rng.integers(0, end, 50).tolist())
    cuts |= set(rng.integers(end, size, 10).tolist())
    for cut in sorted(cuts):
        assert not victim.opens(victim.original[:cut]), f"cut at byte {cut}"


@pytest.mark.parametrize("seed", range(2))
def test_random_mutations_of_header_keys_and_table(victim: Victim, seed: int) -> None:
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(60):
        mutated = bytearray(victim.original)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, victim.data_offset))
            if rng.random() < 0.5:
                mutated[at] = int(rng.integers(0, 256))
            else:
                value = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
                struct.pack_into("<I", mutated, min(at, victim.data_offset - 4), value)
        refused += not victim.opens(mutated)
    assert refused > 0


def test_counts_and_sizes_that_overflow(original: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for at in (8, 16):  # number of tensors, number of keys
        for value in (2**63 - 1, 2**63, 2**64 - 1, 2**32, 10**9, 0):
            mutated = bytearray(original)
            struct.pack_into("<Q", mutated, at, value)
            path.write_bytes(mutated)
            assert not opens(path), f"count {value} at byte {at}"


@pytest.mark.parametrize("ne", [(16, 0), (0, 2**63 - 1), (2**32, 2**31), (2**63 - 1, 1), (-1, 16)], ids=str)
def test_shapes_that_overflow(original: bytes, tmp_path: Path, ne: tuple[int, int]) -> None:
    """Of a tensor that is needed, and of one before all others. ggml itself would end the process."""
    path = tmp_path / "model.gguf"
    path.write_bytes(original)
    tensor = gguf.GGUFReader(path).get_tensor(0)
    name = tensor.name.encode()
    table = original.index(struct.pack("<Q", len(name)) + name)
    mutated = bytearray(original)
    struct.pack_into("<2q", mutated, table + 8 + len(name) + 4, *ne)
    path.write_bytes(mutated)
    assert not opens(path)

    extra = struct.pack("<Q", 1) + b"x" + struct.pack("<I4qIQ", 4, 16, 16, *ne, 1, 0)
    mutated = bytearray(original[:table] + extra + original[table:])
    struct.pack_into("<Q", mutated, 8, struct.unpack_from("<Q", original, 8)[0] + 1)
    path.write_bytes(mutated)
    assert not opens(path)


KEYS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "vocab_size",
    "vision.block_count",
    "vision.global.block_count",
    "vision.embedding_length",
    "vision.feed_forward_length",
    "vision.attention.head_count",
    "vision.image_size",
    "vision.patch_size",
    "vision.max_num_tiles",
)


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_contradict_the_tensors(original: bytes, tmp_path: Path, key: str) -> None:
    path = tmp_path / "model.gguf"
    name = b"mllama." + key.encode()
    at = original.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    (right,) = struct.unpack_from("<I", original, at)
    for value in (0, right + 1, 1000003, 2**31, 2**32 - 1):
        mutated = bytearray(original)
        struct.pack_into("<I", mutated, at, value)
        path.write_bytes(mutated)
        # one more head, or one layer less looked at, can be a valid shape; nothing else is
        assert not opens(path) or (value == right + 1 and "head_count" in key), f"{key} = {value}"


TENSORS = ("token_embd.weight", "blk.1.attn_q.weight", "v.class_embd", "mm.0.weight", "output.weight")


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_missing_misshaped_or_out_of_the_file(original: bytes, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    raw = name.encode()
    start = original.index(struct.pack("<Q", len(raw)) + raw) + 8
    dims = start + len(raw)
    (n_dims,) = struct.unpack_from("<I", original, dims)
    kind = dims + 4 + 8 * n_dims
    changes: list[tuple[int, bytes]] = [(start, b"x")]
    changes += [(dims + 4, struct.pack("<Q", value)) for value in (0, 1, 7, 2**40, 2**62, 2**64 - 1)]
    changes += [(dims, struct.pack("<I", value)) for value in (0, 5, 2**32 - 1)]
    changes += [(kind, struct.pack("<I", value)) for value in (2, 12, 24, 31, 99, 2**32 - 1)]
    changes += [(kind + 4, struct.pack("<Q", value)) for value in (1, 2**40, 2**63, 2**64 - 32)]
    for at, new in changes:
        mutated = bytearray(original)
        mutated[at : at + len(new)] = new
        path.write_bytes(mutated)
        assert not opens(path), f"{name}: {new!r} at byte {at}"


def test_an_encoder_whose_graph_takes_gigabytes(tmp_path: Path) -> None:
    """Small tensors, but so many positions and layers that ggml would ask for 100 GB, and end the process."""
    large = replace(
        tiny.ARCHS["gqa"],
        name="large",
        image_size=1024,
        patch_size=1,
        vision_width=2,
        vision_heads=1,
        vision_ff=1,
        local_layers=60,
        max_tiles=1,
    )
    files = write(large, tmp_path, "canonical", one_file=True)
    with Mllama(*files, n_ctx=64) as model, pytest.raises(ModelError, match=r"take \d+ operations; at most"):
        model.encode_image(np.zeros((1024, 1024, 3), np.uint8))


def test_many_intermediate_layers(tmp_path: Path) -> None:
    """One layer is collected 700 times: each is an operation, for which ggml's list had no room."""
    many = replace(tiny.ARCHS["gqa"], name="many", intermediate=(1,) * 700)
    files = write(many, tmp_path, "canonical", one_file=True)
    with Mllama(*files, n_ctx=64) as model:
        states = model.encode_image(np.zeros((28, 28, 3), np.uint8)).states
    assert np.isfinite(states).all()
