"""The command line, in this process and as a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import STOP_SECONDS, TinyFiles, elsewhere, noisy_image, wait_until_open
from PIL import Image

from mllama_gguf import Mllama
from mllama_gguf.cli.main import COMMANDS, run
from mllama_gguf.convert.huggingface import convert

Files = Callable[[str], TinyFiles]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(noisy_image(1)).save(path)
    return str(path)


@pytest.fixture
def one(tiny_files: Files) -> str:
    return str(tiny_files("gqa").one)


def process(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mllama_gguf", *args],
        **elsewhere(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# ---- caption -----------------------------------------------------------------------------------------------


def test_caption(photo: str, one: str, capsys: Captured) -> None:
    assert run(["caption", photo, "-m", one, "-n", "12", "-p", "the cat"]) == 0
    out, err = capsys.readouterr()
    with Mllama(one) as model:
        assert out == model.caption(photo, "the cat", max_tokens=12) + "\n"
    assert err == ""


def test_caption_from_two_files_and_the_environment(
    photo: str, tiny_files: Files, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny_files("gqa")
    assert run(["caption", photo, "-m", str(files.one), "-n", "5"]) == 0
    expected = capsys.readouterr().out
    assert run(["caption", photo, "-m", str(files.text), "--mmproj", str(files.mmproj), "-n", "5"]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setenv("MLLAMA_MODEL", str(files.one))
    assert run(["caption", photo, "-n", "5", "-c", "256", "-t", "1", "-ngl", "0"]) == 0
    assert capsys.readouterr().out == expected


def test_caption_json(photo: str, one: str, tmp_path: Path, capsys: Captured) -> None:
    other = tmp_path / "other.png"
    Image.fromarray(noisy_image(2)).save(other)
    assert run(["caption", photo, str(other), "-m", one, "-n", "7", "--json"]) == 0
    out, err = capsys.readouterr()
    first, second = lines(out)
    assert err == ""
    assert (first["image"], second["image"]) == (photo, str(other))
    assert first["caption"] != second["caption"]
    assert first["finish_reason"] == "length"
    assert first["completion_tokens"] == 7
    assert first["prompt_tokens"] > 7
    assert second["cached_tokens"] > 0
    assert set(first["seconds"]) == {"load", "encode", "prompt", "decode"}
    assert all(s >= 0 for s in first["seconds"].values())
    assert first["tokens_per_second"]["decode"] > 0


def test_several_images_are_named(photo: str, one: str, tmp_path: Path, capsys: Captured) -> None:
    missing = str(tmp_path / "missing.png")
    assert run(["caption", photo, missing, photo, "-m", one, "-n", "3"]) == 1
    out, err = capsys.readouterr()
    with Mllama(one) as model:
        text = model.caption(photo, max_tokens=3)
    assert out == f"{photo}: {text}\n{photo}: {text}\n"
    assert err == f"Error: {missing}: no such file\n"


def test_caption_with_a_seed(photo: str, one: str, capsys: Captured) -> None:
    outs = []
    for seed in ("1", "1", "2"):
        assert run(["caption", photo, "-m", one, "-n", "20", "--temp", "2", "--seed", seed]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_caption_of_standard_input(photo: str, one: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mllama_gguf", "caption", "-", "-m", one, "-n", "3", "--json"],
        **elsewhere(),
        input=Path(photo).read_bytes(),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["image"] == "-"


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_demo_model_captions_the_examples(capsys: Captured) -> None:
    paths = sorted(str(path) for path in EXAMPLES.glob("*.png"))
    assert len(paths) >= 4
    assert run(["caption", *paths, "--json"]) == 0
    replies = lines(capsys.readouterr().out)
    assert [reply["image"] for reply in replies] == paths
    assert {reply["finish_reason"] for reply in replies} == {"stop"}
    captions = {Path(reply["image"]).stem: reply["caption"] for reply in replies}
    assert captions["apple"] == "a red apple"
    assert captions["tall"] == "a red balloon above a yellow star"
    assert captions["wide"] == "a blue car to the left of a red heart"
    assert captions["apple-and-cat"].startswith("a red apple to the left of ")


def imported(*args: str) -> tuple[str, set[str]]:
    """What a command prints in a process of its own, and the packages that it imports."""
    command = [sys.executable, "-X", "importtime", "-m", "mllama_gguf", *args]
    done = subprocess.run(command, **elsewhere(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mllama_gguf.errors" in names
    return done.stdout, names


def test_a_caption_imports_what_it_needs() -> None:
    """How long that takes says scripts/bench_startup.py."""
    out, names = imported("caption", str(EXAMPLES / "apple.png"))
    assert "apple" in out
    assert {"numpy", "PIL", "llama_cpp"} <= names
    heavy = {"llguidance", "jsonschema", "torch", "transformers", "huggingface_hub", "gguf", "ray", "rich"}
    assert not names & {*heavy, "mllama_gguf.server", "mllama_gguf.convert"}


# ---- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["caption"], 2, "Missing argument"),
        (["caption", "x.png", "-n", "0"], 2, "-n"),
        (["caption", "x.png", "-m", "gpt-4"], 1, "gpt-4: no such file, nor a model's name (demo, "),
        (["nonsense"], 2, "nonsense"),
        (["info"], 2, "Missing argument"),
        (["info", "none.gguf"], 1, "none.gguf"),
        (["convert", "nowhere", "-o", "x.gguf"], 1, "nowhere"),
        (["preprocess", "nowhere.png"], 1, "nowhere.png: no such file"),
    ],
)
def test_failures_are_one_line(args: list[str], code: int, words: str, capsys: Captured) -> None:
    assert run(args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_model(photo: str, capsys: Captured) -> None:
    for args in (["caption", photo, "-m", photo], ["info", photo]):
        assert run(args) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "photo.png" in err
        assert err.count("\n") == 1


def test_verbose_shows_the_traceback_and_the_log(photo: str, one: str) -> None:
    done = process("caption", photo, "-m", photo, "--verbose")
    _, err = done.communicate(timeout=60)
    assert done.returncode == 1
    assert "Traceback" in err
    assert "Error: " in err
    done = process("--verbose", "caption", photo, "-m", one, "-n", "2")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0
    assert "mllama_gguf.native" in err
    assert "mllama_gguf" not in out


def test_a_bug_is_one_line_too(
    photo: str, one: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(Mllama, "reply", broken)
    assert run(["caption", photo, "-m", one]) == 1
    assert capsys.readouterr().err == "Error: unexpected ZeroDivisionError: a b (--verbose shows where)\n"


def test_a_reader_that_goes_away(photo: str, endless: str) -> None:
    child = process("caption", photo, "-m", endless, "-n", "1000000", "-c", "0")
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(5)
    child.stdout.close()
    assert child.wait(timeout=20) == 141
    assert child.stderr.read() == ""
    child.stderr.close()


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that never ends its turn: the logits of the tokens that would are always 0."""
    folder = tmp_path_factory.mktemp("endless")
    arch = tiny.ARCHS["square"]
    weights = tiny.make_weights(arch)
    for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"):
        weights["language_model.lm_head.weight"][arch.special(token)] = 0
    checkpoint = tiny.make_checkpoint(arch, folder / "hf", weights=weights)
    (path,) = convert(checkpoint, folder / "endless.gguf", type="f32", single_file=True)
    return str(path)


def interrupt(child: subprocess.Popen[str]) -> tuple[float, str, str]:
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = child.communicate(timeout=30)
    return time.monotonic() - start, out, err


def assert_interrupted(child: subprocess.Popen[str]) -> None:
    seconds, _, err = interrupt(child)
    assert child.returncode == 130
    assert err == "Interrupted\n"
    assert seconds < STOP_SECONDS


def test_ctrl_c_while_encoding(slow: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(noisy_image(1, 900, 900)).save(path)
    child = process("caption", str(path), "-m", str(slow))
    wait_until_open(child, slow)
    time.sleep(0.5)
    assert child.poll() is None, child.communicate()
    assert_interrupted(child)


def test_ctrl_c_while_reading_the_prompt(photo: str, one: str) -> None:
    child = process("caption", photo, "-m", one, "-c", "0", "-p", "\x01\x02" * 60000)  # a token a byte
    wait_until_open(child, one)
    time.sleep(0.5)
    assert child.poll() is None, child.communicate()
    assert_interrupted(child)


def test_ctrl_c_while_writing(photo: str, endless: str) -> None:
    child = process("caption", photo, "-m", endless, "-c", "0", "-n", "1000000")
    assert child.stdout is not None
    child.stdout.read(20)
    assert_interrupted(child)


@pytest.mark.parametrize("module", ["signal", "click", "numpy", "llama_cpp", "mllama_gguf.decode.session"])
def test_ctrl_c_at_the_start(photo: str, endless: str, module: str) -> None:
    """While the imports go on."""
    command = [sys.executable, "-X", "importtime", "-m", "mllama_gguf", "caption", photo]
    command += ["-m", endless, "-c", "0", "-n", "1000000"]
    child = subprocess.Popen(command, **elsewhere(), stdout=-1, stderr=-1, text=True)
    assert child.stderr is not None
    while (line := child.stderr.readline()).rpartition("|")[2].strip() != module:
        assert line, "it ended"
    seconds, _, err = interrupt(child)
    assert child.returncode == 130, err
    assert [line for line in err.splitlines() if not line.startswith("import time:")] == ["Interrupted"]
    assert seconds < STOP_SECONDS


def test_ctrl_c_in_code_that_was_text(tmp_path: Path) -> None:
    """While the code of a dataclass is made, say: Python remembers that, and would end by the signal."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mllama_gguf.cli.devices': exec('raise KeyboardInterrupt')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    there = elsewhere()
    there["env"]["PYTHONPATH"] = os.pathsep.join([str(tmp_path), there["env"]["PYTHONPATH"]])
    command = [sys.executable, "-m", "mllama_gguf", "devices"]
    child = subprocess.run(command, **there, capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout, child.stderr) == (130, "", "Interrupted\n")


def test_ctrl_c_at_the_end() -> None:
    """While Python ends; and not if Ctrl-C is ignored, as in a background job."""
    code = (
        "import atexit, os, signal, sys, time; from mllama_gguf.__main__ import main; "
        "ignored = 'ignore' in sys.argv;"
        "signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler);"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1)));"
        "sys.argv[1:] = ['--version']; main()"
    )
    for how, status, words in ((), 130, "Interrupted\n"), (("ignore",), 0, ""):
        child = subprocess.run(
            [sys.executable, "-c", code, *how], **elsewhere(), capture_output=True, text=True, timeout=60
        )
        assert (child.returncode, child.stderr) == (status, words)


# ---- the other commands ------------------------------------------------------------------------------------


def test_info(tiny_files: Files, capsys: Captured) -> None:
    files = tiny_files("gqa")
    assert run(["info", str(files.text), str(files.mmproj)]) == 0
    out = capsys.readouterr().out
    for words in ("canonical, as", "layers 0, 3", "up to 4 tiles", "n_ctx 2048", "quantized", "F32"):
        assert words in out


def test_info_json(tiny_files: Files, capsys: Captured) -> None:
    files = tiny_files("gqa")
    arch = files.arch
    assert run(["info", str(files.one), str(files.text), str(files.mmproj), "--json"]) == 0
    one, text, projector = lines(capsys.readouterr().out)
    assert [m["layout"] for m in (one, text, projector)] == ["canonical", "text only", None]
    assert one["hparams"]["n_layer"] == arch.layers
    assert one["hparams"]["cross_layers"] == list(arch.cross_layers)
    assert one["files"][0]["quantized"] is False
    assert list(one["files"][0]["text_types"]) == ["F32"]
    assert text["hparams"]["n_vision_layer"] == 0
    assert projector["hparams"] is None
    need = next(m for m in one["memory"] if m["n_ctx"] == 4096)
    row = arch.kv_heads * arch.head_dim
    n_cross = len(arch.cross_layers)
    assert need["self_kv"] == (arch.layers - n_cross) * 4096 * row * 4
    assert need["cross_kv"] == n_cross * arch.max_tiles * arch.n_positions * row * 4
    parts = ("weights", "self_kv", "cross_kv", "compute", "vision")
    assert need["total"] == sum(need[part] for part in parts)
    assert min(need[part] for part in parts) > 0


def test_info_agrees_with_what_a_context_takes(tiny_files: Files, capsys: Captured) -> None:
    files = tiny_files("gqa")
    assert run(["info", str(files.one), "--json"]) == 0
    (info,) = lines(capsys.readouterr().out)
    need = next(m for m in info["memory"] if m["n_ctx"] == 2048)
    with Mllama(files.one, n_ctx=2048) as model:
        model.caption(noisy_image(1, 100, 100), max_tokens=1)
        memory = model.memory()
    assert memory.self_kv == pytest.approx(need["self_kv"], rel=0.15)
    assert 0 < memory.cross_kv <= need["cross_kv"] * 1.15


def test_trace(photo: str, one: str, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "tensors"
    args = ["trace", photo, "-m", one, "-t", "1"]
    assert run([*args, "--json"]) == 0
    tensors = lines(capsys.readouterr().out)
    assert len(tensors) > 50
    chosen = tensors[len(tensors) // 2]
    assert run([*args, "--json", "--tensors", chosen["name"], "--out", str(out)]) == 0
    again = lines(capsys.readouterr().out)
    assert {t["name"] for t in again} == {chosen["name"]}
    assert chosen in again
    saved = [np.load(path) for path in sorted(out.glob("*.npy"))]
    assert len(saved) == len(again)
    assert list(saved[0].shape) == again[0]["shape"]
    assert [float(v) for v in saved[0].ravel()[:5]] == again[0]["first_values"]
    assert run([*args, "--tensors", chosen["name"]]) == 0
    assert chosen["sha256"][:16] in capsys.readouterr().out
    assert run([*args, "--tensors", "no such tensor"]) == 1
    assert "no tensor is called" in capsys.readouterr().err


def test_devices(capsys: Captured) -> None:
    assert run(["devices", "--json"]) == 0
    devices = lines(capsys.readouterr().out)
    assert "cpu" in {device["type"] for device in devices}
    assert all(device["name"] and device["memory_total"] >= device["memory_free"] for device in devices)
    assert run(["devices"]) == 0
    assert all(device["name"] in capsys.readouterr().out for device in devices[:1])


def test_preprocess(photo: str, capsys: Captured) -> None:
    assert run(["preprocess", photo, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == photo


def test_convert(tmp_path: Path, photo: str, capsys: Captured) -> None:
    checkpoint = tiny.make_checkpoint(tiny.ARCHS["square"], tmp_path / "hf")
    out = tmp_path / "a.gguf"
    assert run(["convert", str(checkpoint), "-o", str(out), "--single-file", "--type", "f32"]) == 0
    capsys.readouterr()
    assert run(["caption", photo, "-m", str(out), "-n", "3"]) == 0


# ---- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_examples(command: list[str], capsys: Captured) -> None:
    assert run([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: mllama")
    assert f"  mllama {(command or ['caption'])[0]} " in out.partition("Examples:")[2]


def test_version(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mllama, version ")


def test_help_imports_little() -> None:
    out, names = imported("--help")
    assert out.startswith("Usage: mllama")
    assert not names & {"numpy", "PIL", "llama_cpp", "cffi", "jinja2", "rich", "llguidance"}
