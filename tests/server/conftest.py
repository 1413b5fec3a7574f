"""Servers that many tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import DEMO, EXAMPLES, Running, running

from mllama_gguf import Mllama
from mllama_gguf.server.catalog import Offer


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with running() as one:
        yield one


@pytest.fixture(scope="session")
def slow_served(slow: Path) -> Iterator[Running]:
    """A server whose model needs many seconds for an image of four tiles."""
    with running(offers=(Offer("slow:latest", str(slow)), *DEMO), given={"n_ctx": 512}) as one:
        yield one


@pytest.fixture(scope="session")
def expected() -> Callable[..., str]:
    """What the package itself says about examples/NAME to a question."""
    model = Mllama.from_pretrained("demo", image_cache=False, n_threads=1)
    known: dict[tuple[str, str], str] = {}

    def say(name: str, prompt: str) -> str:
        if (name, prompt) not in known:
            known[name, prompt] = model.caption(EXAMPLES / name, prompt)
        return known[name, prompt]

    return say
