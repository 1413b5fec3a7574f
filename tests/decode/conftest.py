"""A small model with random weights that tests of replies share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from helpers import TinyFiles

from mllama_gguf import Mllama


@pytest.fixture(scope="module")
def opened(tiny_files: Callable[[str], TinyFiles]) -> Iterator[Mllama]:
    with Mllama(tiny_files("gqa").one, n_ctx=512, n_threads=1, image_cache=False) as model:
        yield model


@pytest.fixture
def model(opened: Mllama) -> Mllama:
    opened.reset()
    return opened
