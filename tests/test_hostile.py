"""Damaged and hostile model files: one `ModelError`, never a crash.

CI also runs this file with the library compiled under AddressSanitizer and UBSan. Every file is loaded with
its weights and its vocabulary; a mutation that leaves a valid file (a changed weight, say) may load.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import TinyFiles

from mllama_gguf import Mllama
from mllama_gguf.errors import MllamaError

Files = Callable[[str], TinyFiles]


def opens(path: Path) -> bool:
    """Whether the file loads; anything but an `MllamaError` of one line is a failure of the test."""
    try:
        Mllama(path, n_ctx=64).close()
    except MllamaError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


@pytest.fixture(scope="module")
def original(tiny_files: Files) -> bytes:
    return tiny_files("gqa").one.read_bytes()


@pytest.fixture(scope="module")
def data_offset(original: bytes) -> int:
    """Where the tensor table ends; the data follows."""
    return original.rindex(b"mm.0.bias") + 64


def test_the_original_opens(original: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(original)
    assert opens(path)


def test_truncated_anywhere(original: bytes, data_offset: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rng = np.random.default_rng(1)
    cuts = {0, 1, 3, 4, 7, 8, 23, 24, data_offset, len(original) - 1}
    cuts |= set(rng.integers(0, data_offset, 150).tolist())
    cuts |= set(rng.integers(data_offset, len(original), 30).tolist())
    for cut in sorted(cuts):
        path.write_bytes(original[:cut])
        assert not opens(path), f"cut at byte {cut}"


@pytest.mark.parametrize("seed", range(4))
def test_random_mutations_of_header_keys_and_table(
    original: bytes, data_offset: int, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "model.gguf"
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(100):
        mutated = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, data_offset))
            if rng.random() < 0.5:
                mutated[at] = int(rng.integers(0, 256))
            else:
                value = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
                struct.pack_into("<I", mutated, min(at, data_offset - 4), value)
        path.write_bytes(mutated)
        refused += not opens(path)
    assert refused > 0


def test_counts_and_sizes_that_overflow(original: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for at in (8, 16):  # number of tensors, number of keys
        for value in (2**63 - 1, 2**63, 2**64 - 1, 2**32, 10**9, 0):
            mutated = bytearray(original)
            struct.pack_into("<Q", mutated, at, value)
            path.write_bytes(mutated)
            assert not opens(path), f"count {value} at byte {at}"


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
