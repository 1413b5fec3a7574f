"""The packages `ollama` and `openai` of npm, under Node. Their versions are those of node/package.json."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asked import QUESTION, SCHEMA, TAGGED
from serving import EXAMPLES

FOLDER = Path(__file__).parent / "node"


@pytest.fixture(scope="session")
def ask(url: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Run one of the programs in node/ with its packages installed; gives what it was told."""
    folder = tmp_path_factory.mktemp("node") / "node"
    shutil.copytree(FOLDER, folder)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(install, cwd=folder, check=True, timeout=240)

    def run(name: str) -> dict[str, Any]:
        command = ["node", name, url, str(EXAMPLES / "apple.png"), json.dumps(SCHEMA)]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90)
        assert ran.returncode == 0, ran.stderr
        told: dict[str, Any] = json.loads(ran.stdout)
        return told

    return run


def test_ollama(ask: Callable[[str], dict[str, Any]], expected: Callable[[str, str], str]) -> None:
    told = ask("ollama.cjs")
    text = expected("apple.png", QUESTION)
    assert told["models"] == told["running"] == [TAGGED] and told["version"]
    assert {"completion", "vision"} <= set(told["capabilities"])
    assert told["whole"] == told["path"] == told["response"] == told["afterwards"] == text
    assert "".join(told["pieces"]) == text and len(told["pieces"]) > 2 and min(told["counts"]) > 2
    assert json.loads(told["form"])["colour"] in ("red", "blue")
    assert told["pull"] == "success" and told["steps"][-1] == "success" and told["kept"] == "load"
    for name in ("unknown", "unknownStream"):
        assert told[name] == {"name": "ResponseError", "message": "model 'nobody' not found", "status": 404}
    assert told["noPicture"]["status"] == 400 and "image" in told["noPicture"]["message"]
    assert told["embed"]["status"] == 501 and "embeddings" in told["embed"]["message"]
    assert told["abort"]["name"] == "AbortError"


def test_openai(ask: Callable[[str], dict[str, Any]], expected: Callable[[str, str], str]) -> None:
    told = ask("openai.cjs")
    text = expected("apple.png", QUESTION)
    assert told["models"] == [TAGGED] and told["whole"] == told["response"] == text
    assert "".join(told["pieces"]) == text
    assert json.loads(told["form"])["colour"] in ("red", "blue")
    assert told["unknown"]["name"] == "NotFoundError" and told["unknown"]["status"] == 404
    assert told["unknown"]["code"] == "model_not_found" and "gpt-5" in told["unknown"]["message"]
