"""A model file that changes while its pages are in use. Without isolate the system ends the process, as the
documentation of `use_mmap` says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import BackendError, Mllama, ModelError

Files = Callable[[str], TinyFiles]


@pytest.fixture
def path(tiny_files: Files, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_files("square").one, tmp_path / "model.gguf"))


@pytest.mark.parametrize("size", [0, 4096])
def test_a_file_that_becomes_shorter(path: Path, size: int) -> None:
    original = path.read_bytes()
    with Mllama(path, n_ctx=64, isolate=True) as model:
        expected = model.logits([1, 2])
        os.truncate(path, size)
        with pytest.raises(BackendError, match="SIGBUS; the next call starts a new process"):
            model.logits([1, 2])
        with pytest.raises(ModelError, match=r"model\.gguf: "):
            model.logits([1, 2])
        path.write_bytes(original)
        assert (model.logits([1, 2]) == expected).all()


def test_a_copy_does_not_mind(path: Path) -> None:
    with Mllama(path, n_ctx=256, use_mmap=False) as model:
        expected = model.caption(noisy_image(1), max_tokens=4)
        os.truncate(path, 0)
        model.reset()
        assert model.caption(noisy_image(1), max_tokens=4) == expected
