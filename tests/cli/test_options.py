"""The options that come from the settings: each is offered, checked and obeyed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyFiles

from mllama_gguf import Mllama, ModelError
from mllama_gguf.cli.main import run
from mllama_gguf.settings import DEFAULTS, DESCRIPTIONS, Settings
from mllama_gguf.store.resolve import BUNDLED
from mllama_gguf.tune.saved import key_of, write_tuned

Files = Callable[[str], TinyFiles]
Captured = pytest.CaptureFixture[str]
TEMPLATE = str(Path(__file__).parents[2] / "LICENSE")  # any text
APPLE = str(Path(__file__).parents[2] / "examples" / "apple.png")
COMMANDS = ("caption", "chat", "plan", "serve", "trace", "tune")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings with which a command opened a model; the opening fails."""
    seen: list[dict[str, Any]] = []

    class Refused:
        def __init__(self, *_: Any, progress: Any, defaults: Any, **settings: Any) -> None:
            seen.append(settings)
            raise ModelError("not opened")

    monkeypatch.setattr("mllama_gguf.model.Mllama", Refused)
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_help(command: str, capsys: Captured) -> None:
    assert run([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, about in DESCRIPTIONS.items():
        if about.option is not None and (command, name) != ("plan", "chat_template"):  # it writes no prompt
            assert ", ".join(about.option.names).replace("/", " / ") in shown, name
            assert about.help in shown
    assert "[default: 4096]" in shown and "[default: by free memory]" in shown
    assert "--verify" in shown


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-ngl", "3"], {"n_gpu_layers": 3}),
        (["--n-gpu-layers=AUTO"], {"n_gpu_layers": "auto"}),
        (["--vision-device", "cpu"], {"vision_device": "cpu"}),
        (["--device", "A, B"], {"devices": ("A", "B")}),
        (["--device", ""], {"devices": ()}),
        (["-ts", "3/1"], {"tensor_split": (3.0, 1.0)}),
        (["--main-gpu", "1"], {"main_gpu": 1}),
        (["--no-kv-offload"], {"offload_kqv": False}),
        (["--rpc", "a:1,b:2", "--rpc-timeout", "2.5"], {"rpc_servers": ("a:1", "b:2"), "rpc_timeout": 2.5}),
        (["-c", "0"], {"n_ctx": None}),
        (["-c", "512", "-b", "64", "-t", "2"], {"n_ctx": 512, "n_batch": 64, "n_threads": 2}),
        (["-ctk", "q8_0", "--cache-type-v", "F32"], {"type_k": "q8_0", "type_v": "f32"}),
        (["-fa", "off"], {"flash_attn": False}),
        (["--precision", "exact"], {"precision": "exact"}),
        (["--vision-precision", "BF16"], {"vision_precision": "bf16"}),
        (["--no-mmap"], {"use_mmap": False}),
        (["--max-tiles", "1"], {"max_tiles": 1}),
        (["--repack"], {"repack": True}),
        (["--no-repack"], {"repack": False}),
        (["--isolate"], {"isolate": True}),
        (["--chat-template", TEMPLATE], {"chat_template": Path(TEMPLATE).read_text()}),
        (["--allow-quantized-vision"], {"allow_quantized_vision": True}),
        ([], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_model(
    args: list[str], expected: dict[str, Any], opened: list[dict[str, Any]], capsys: Captured
) -> None:
    for command in ("caption", "chat", "trace"):
        assert run([command, APPLE, *args]) == 1
        assert capsys.readouterr().err == "Error: not opened\n"
        settings = opened.pop()
        assert settings == {**DEFAULTS, "image_cache": command != "trace", **expected}
        assert Settings(**settings).as_dict() == settings


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-ngl", "some"], "must be a whole number of at least -1, or 'auto', not 'some'"),
        (["-ngl", "-2"], "must be a whole number"),
        (["-c", "1.5"], "must be a whole number of at least 0, not '1.5'"),
        (["-c", "-1"], "must be a whole number of at least 0, not -1"),
        (["-b", "0"], "must be a whole number from 1 to 8192, not 0"),
        (["-b", "9" * 30], "must be a whole number"),
        (["-t", "0"], "must be a whole number from 1 to 512, not 0"),
        (["-ts", "3,x"], "must be a list of numbers of at least 0"),
        (["-ts", "-1"], "must be a list of numbers of at least 0"),
        (["-fa", "maybe"], "must be on or off, not 'maybe'"),
        (["-ctk", "q4_0"], "must be one of f32, f16, q8_0, not 'q4_0'"),
        (["--rpc", "localhost"], "'localhost' is not host:port, as in 127.0.0.1:50052"),
        (["--rpc-timeout", "0"], "must be seconds above 0, not 0"),
        (["--rpc-timeout", "soon"], "must be seconds above 0, not 'soon'"),
        (["--vision-device", ""], "must be auto, cpu or the name of a device, not ''"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_wrong_values_are_wrong_usage(args: list[str], words: str, capsys: Captured) -> None:
    for command in (["caption", APPLE], ["plan", "demo"]):
        assert run([*command, *args]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith(f"Error: Invalid value for '{args[0]}'") and words in err


def plan(capsys: Captured, *args: str) -> dict[str, int]:
    """The CPU's row of `mllama plan demo`."""
    assert run(["plan", "demo", "--json", *args]) == 0
    found: dict[str, int] = json.loads(capsys.readouterr().out)["settings"][0]["devices"][0]
    return found


def test_plan_obeys_what_it_offers(capsys: Captured) -> None:
    base = plan(capsys, "-t", "1")
    assert plan(capsys, "-t", "64")["vision"] > base["vision"], "each thread has a buffer in the encoder"
    # Conversations that compute together have an encoder beside them, with as many threads.
    together = plan(capsys, "-t", "1", "--parallel", "2")["vision"]
    assert plan(capsys, "-t", "64", "--parallel", "2")["vision"] > together
    assert plan(capsys, "-t", "1", "-ctk", "f32")["self_kv"] == base["self_kv"] * 3 // 2
    assert plan(capsys, "-t", "1", "-ctv", "f32")["self_kv"] == base["self_kv"] * 3 // 2
    copied = plan(capsys, "-t", "1", "--no-mmap")
    assert (copied["mapped"], copied["weights"]) == (0, base["mapped"] + base["weights"])
    assert plan(capsys, "-t", "1", "-c", "512")["self_kv"] < base["self_kv"]
    assert plan(capsys, "-t", "1", "-b", "8")["compute"] < base["compute"]
    assert plan(capsys, "-t", "1", "-fa", "off")["compute"] > base["compute"]


def test_the_plan_is_what_the_model_takes(capsys: Captured) -> None:
    """With the same default of threads too."""
    planned = plan(capsys, "-c", "256")
    with Mllama.from_pretrained("demo", n_ctx=256, image_cache=False) as model:
        model.caption(APPLE, max_tokens=1)
        (real,) = model.memory().devices
    assert (real.self_kv, real.mapped, real.weights) == tuple(
        planned[name] for name in ("self_kv", "mapped", "weights")
    )
    assert real.peak <= planned["peak"]


@pytest.mark.parametrize("command", ["plan", "tune", "caption", "trace"])
def test_verify_is_obeyed(command: str, tiny_files: Files, tmp_path: Path, capsys: Captured) -> None:
    model = str(tiny_files("gqa").one)
    args = [] if command == "plan" else [APPLE]
    out = ["-o", str(tmp_path / "out")] if command == "tune" else []
    assert run([command, *args, *out, "-m", model, "--verify"]) == 1
    assert "cannot be verified: its expected sha256 is not known" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_given_wins_over_tuned_settings(opened: list[dict[str, Any]], capsys: Captured) -> None:
    demo = BUNDLED["demo"]
    write_tuned(key_of([demo], {}), {"n_batch": 64, "n_threads": 1, "flash_attn": False}, {})
    assert run(["caption", APPLE, "-b", "512", "-fa", "on"]) == 1
    assert "Tuned settings: -t 1 (" in capsys.readouterr().err
    settings = opened.pop()
    assert (settings["n_batch"], settings["n_threads"], settings["flash_attn"]) == (512, 1, True)
    assert run(["caption", APPLE, "--no-tuned"]) == 1
    assert opened.pop()["n_batch"] == DEFAULTS["n_batch"]
    write_tuned(key_of([demo], {"offload_kqv": False}), {"n_batch": 32}, {})
    assert run(["caption", APPLE, "--no-kv-offload"]) == 1
    assert opened.pop()["n_batch"] == 32


def test_serve_opens_models_with_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def refuse(settings: Any, catalog: Any, opening: Any) -> None:
        seen.append(opening)
        raise ModelError("not opened")

    monkeypatch.setattr("mllama_gguf.server.app.make_service", refuse)
    given = ["--isolate", "--chat-template", TEMPLATE, "-t", "2", "--max-tiles", "1"]
    assert run(["serve", "-m", "demo", "--port", "0", *given]) == 1
    (opening,) = seen
    text = Path(TEMPLATE).read_text()
    assert dict(opening.given) == {"isolate": True, "chat_template": text, "n_threads": 2, "max_tiles": 1}


def test_the_plan_is_of_the_tuned_settings(capsys: Captured) -> None:
    """As `mllama caption` would open it; but each number of layers is shown."""
    write_tuned(key_of([BUNDLED["demo"]], {}), {"n_gpu_layers": 1, "n_batch": 8, "n_threads": 1}, {})
    tuned = plan(capsys)
    assert run(["plan", "demo"]) == 0
    shown = capsys.readouterr()
    assert "Tuned settings: -ngl 1 -t 1 -b 8 (" in shown.err
    assert shown.out.splitlines()[-1] == "There is no device to offload to: everything runs on the CPU."
    assert tuned == plan(capsys, "-t", "1", "-b", "8") != plan(capsys, "--no-tuned")


@pytest.mark.parametrize("command", ["convert", "quantize", "worker", "preprocess"])
def test_commands_without_a_model_have_the_same_options(command: str, capsys: Captured) -> None:
    name, wrong = ("--max-tiles", "65") if command == "preprocess" else ("-t", "0")
    args = {"convert": [".", "-o", "x.gguf"], "quantize": ["a", "b.gguf", "--type", "q8_0"]}
    assert run([command, *args.get(command, [] if command == "worker" else [APPLE]), name, wrong]) == 2
    assert f"Error: Invalid value for '{name}'" in capsys.readouterr().err
