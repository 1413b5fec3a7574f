"""`llm` with its plugin llm-ollama, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from asked import MODEL, QUESTION, SCHEMA, TAGGED
from serving import EXAMPLES

Llm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def llm(surroundings: dict[str, str]) -> Llm:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", *args]
        return subprocess.run(command, env=surroundings, input="", capture_output=True, text=True, timeout=90)

    return run


def test_an_image(llm: Llm, expected: Callable[[str, str], str]) -> None:
    apple = str(EXAMPLES / "apple.png")
    for more in ((), ("--no-stream",)):
        ran = llm(QUESTION, "-m", f"ollama/{MODEL}", "-a", apple, "-o", "temperature", "0", *more)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == expected("apple.png", QUESTION)
    logged = json.loads(llm("logs", "--json", "-n", "1").stdout)[0]
    assert logged["input_tokens"] > 2 and logged["output_tokens"] > 2


def test_models_a_schema_and_an_error(llm: Llm) -> None:
    assert TAGGED in llm("models").stdout
    ran = llm(
        QUESTION, "-m", f"ollama/{TAGGED}", "-a", str(EXAMPLES / "apple.png"), "--schema", json.dumps(SCHEMA)
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["colour"] in ("red", "blue")
    no_image = str(EXAMPLES / "draw.py")
    ran = llm("x", "-m", f"ollama/{MODEL}", "--at", no_image, "image/png")
    assert ran.returncode == 1 and "not an image" in ran.stderr and "Traceback" not in ran.stderr
