"""A server as users start it, for programs of other people that ask it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asked import KEY
from helpers import elsewhere
from serving import EXAMPLES

from mllama_gguf import Mllama


def serve(*args: str) -> Iterator[str]:
    """`mllama serve` with the demo model as a process; gives its address.

    SIGTERM must end it with exit code 0.
    """
    command = [sys.executable, "-m", "mllama_gguf", "serve", "--port", "0", "--no-cache", "-t", "1", *args]
    # What the environment says about Ollama is about another server.
    clean = {name: value for name, value in elsewhere()["env"].items() if not name.startswith("OLLAMA_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=elsewhere()["cwd"], env=clean
    ) as child:
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            assert line.startswith("Serving at http://127.0.0.1:"), line
            yield line.split()[2]
            child.terminate()
            assert child.wait(30) == 0
        finally:
            if child.poll() is None:
                child.kill()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The address of a server with the demo model as llama3.2-vision:latest."""
    yield from serve("-m", "llama3.2-vision=demo")


@pytest.fixture(scope="session")
def locked() -> Iterator[str]:
    """The address of a server that wants a key."""
    yield from serve("-m", "llama3.2-vision=demo", "--api-key", KEY)


@pytest.fixture(scope="session")
def expected() -> Callable[[str, str], str]:
    """What the package itself says about examples/NAME to a question."""
    model = Mllama.from_pretrained("demo", image_cache=False, n_threads=1)
    return lambda name, prompt: model.caption(EXAMPLES / name, prompt)


@pytest.fixture
def surroundings(url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a program that looks for Ollama there, with an empty home."""
    return {**os.environ, "OLLAMA_HOST": url, "HOME": str(tmp_path), "LLM_USER_PATH": str(tmp_path / "llm")}
