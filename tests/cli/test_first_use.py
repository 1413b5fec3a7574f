"""Who has not chosen a model: the line that tells of real models, and which models are shown first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stores import in_store

from mllama_gguf.cli import first_use
from mllama_gguf.cli.main import run
from mllama_gguf.cli.options import ModelChoice
from mllama_gguf.inspect.inventory import Found
from mllama_gguf.store.resolve import BUNDLED

APPLE = str(Path(__file__).parents[2] / "examples" / "apple.png")
LINE = "This is the demo model, which knows only simple drawings. A real one: "
VISION = "ollama:llama3.2-vision:latest"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without models who has chosen none."""
    for name in ("MLLAMA_MODEL", "MLLAMA_LOCK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MLLAMA_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    return tmp_path


@pytest.fixture(scope="module")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ollama's store with llama3.2-vision, and two models that are of no use here."""
    folder, demo = tmp_path_factory.mktemp("ollama"), BUNDLED["demo"].read_bytes()
    in_store(folder, "ollama:aaa", ("model", demo[: len(demo) // 2]))
    in_store(folder, "ollama:gemma3", ("model", demo.replace(b"mllama", b"gemma3")))
    in_store(folder, "ollama:llama3.2-vision", ("model", demo))
    return folder


@pytest.fixture
def with_model(home: Path, ollama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_MODELS", str(ollama))
    return home


def told(capsys: Captured, *args: str) -> str:
    assert run(["caption", *args, "--no-cache"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("a red apple\n") and err.count("\n") <= 1
    return err


def test_three_ways(capsys: Captured) -> None:
    err = told(capsys, APPLE)
    assert err.startswith(LINE) and "-m ollama:NAME" in err
    assert "`mllama pull llama3.2-vision-11b`" in err and "`mllama convert HF_DIR -o FILE`" in err


def test_the_exact_command(capsys: Captured, with_model: Path) -> None:
    """What is printed works as it is."""
    image = str(with_model / "an apple.png")
    shutil.copy(APPLE, image)
    err = told(capsys, image, "-n", "9")
    command = f"mllama caption '{image}' -n 9 --no-cache -m {VISION}"
    if len(command) > 100:
        command = f"mllama caption ... -m {VISION}"
    assert err.startswith(f"{LINE}the one on this machine: `{command}`; others: `mllama pull ")
    assert told(capsys, APPLE, "-m", VISION) == ""
    many = told(capsys, *[APPLE] * 9)
    assert f"`mllama caption ... -m {VISION}`" in many


def test_who_chose_is_not_told(capsys: Captured, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert told(capsys, APPLE, "-m", "demo") == ""
    assert run(["caption", APPLE, "--no-cache", "--json"]) == 0  # a program reads it
    assert capsys.readouterr().err == ""
    assert run(["caption", "none.png", "--no-cache"]) == 1  # no caption, nothing to explain
    assert LINE not in capsys.readouterr().err
    monkeypatch.setenv("MLLAMA_MODEL", "demo")
    assert told(capsys, APPLE) == ""


def test_a_batch_is_told_before_it_runs(capsys: Captured, home: Path) -> None:
    args = ["caption", APPLE, "--out", str(home / "a.jsonl")]
    assert run(args) == 0
    assert capsys.readouterr().err.startswith(LINE)
    assert run([*args, "--json", "--overwrite"]) == 0
    assert LINE not in capsys.readouterr().err


def test_the_list_begins_with_what_is_offered(
    capsys: Captured, with_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*args: str) -> list[str]:
        assert run(["models", *args]) == 0
        return capsys.readouterr().out.splitlines()

    assert [line.split()[0] for line in listed()] == [VISION, "demo", "ollama:aaa:latest"]
    assert [json.loads(line)["name"] for line in listed("--json")] == [VISION, "demo", "ollama:aaa:latest"]
    for chosen, first in (("demo", "demo"), ("ollama:llama3.2-vision", VISION), ("other.gguf", VISION)):
        monkeypatch.setenv("MLLAMA_MODEL", chosen)
        assert listed()[0].split()[0] == first


def test_order() -> None:
    found = [Found("demo", "bundled"), Found("b", "hub"), Found("x", "ollama", problem="bad")]
    found += [Found("ollama:a", "ollama"), Found("c", "downloaded")]
    assert [one.name for one in first_use.by_use(found)] == ["ollama:a", "b", "c", "demo", "x"]
    assert [one.name for one in first_use.by_use(found, "c")] == ["c", "ollama:a", "b", "demo", "x"]


def test_who_chose_is_not_asked(with_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "given", lambda name: True)
    choice = ModelChoice("demo", None, False, {})
    assert first_use.offer_real_models(choice) is choice


@pytest.mark.parametrize(
    ("answers", "name"),
    [([""], VISION), (["1"], VISION), (["2"], "demo"), (["0", "3", "x", "²", " 2 "], "demo")],
)
def test_the_question(
    answers: list[str], name: str, with_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    given = iter(answers)
    monkeypatch.setattr(first_use, "given", lambda name: False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(given))
    assert first_use.offer_real_models(ModelChoice("demo", None, False, {})).name == name
    out = capsys.readouterr().out
    assert out.startswith(f"Which model?\n  1  {VISION}  needs ") and "\n  2  demo  knows only" in out
    assert out.count("A number from 1 to 2, please.") == len(answers) - 1
    with pytest.raises(StopIteration):
        next(given)


def test_no_answer(with_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_input(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(first_use, "given", lambda name: False)
    monkeypatch.setattr("builtins.input", no_input)
    with pytest.raises(KeyboardInterrupt):
        first_use.offer_real_models(ModelChoice("demo", None, False, {}))
