"""The line that tells of real models, for who has not chosen one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllama_gguf.cli import first_use
from mllama_gguf.cli.main import run
from mllama_gguf.store import ollama
from mllama_gguf.store.references import OllamaRef

APPLE = str(Path(__file__).parents[2] / "examples" / "apple.png")
LINE = "This is the demo model, which knows only simple drawings. A real one: "


class Model:
    def __init__(self, name: str, family: str) -> None:
        self.ref, self.family = OllamaRef.parse(name), family


@pytest.fixture(autouse=True)
def a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLLAMA_MODEL", raising=False)
    monkeypatch.setattr(first_use, "is_live", lambda stream: True)
    monkeypatch.setattr(ollama, "list_models", lambda: iter([Model("ollama:gemma3", "gemma3")]))


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert run(["caption", APPLE, *args, "--no-cache"]) == 0
    out, err = capsys.readouterr()
    assert out == "a red apple\n" and err.count("\n") <= 1
    return err


def test_three_ways(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    err = told(capsys)
    assert err.startswith(LINE + "-m ollama:NAME")
    assert "mllama pull llama3.2-vision-11b" in err and "mllama convert" in err
    models = [Model("ollama:gemma3", "gemma3"), Model("ollama:llama3.2-vision", "mllama")]
    monkeypatch.setattr(ollama, "list_models", lambda: iter(models))
    assert told(capsys).startswith(LINE + "-m ollama:llama3.2-vision:latest, which is on this machine; ")


def test_who_chose_is_not_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(capsys, "-m", "demo") == ""
    monkeypatch.setenv("MLLAMA_MODEL", "demo")
    assert told(capsys) == ""
    monkeypatch.delenv("MLLAMA_MODEL")
    monkeypatch.setattr(first_use, "is_live", lambda stream: False)
    assert told(capsys) == ""
