"""`mllama completion` in real shells: what Tab offers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from helpers import elsewhere, python_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the command `mllama`, an image and the device that `mllama devices` saw last."""
    command = tmp_path / "bin" / "mllama"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mllama_gguf "$@"\n')
    command.chmod(0o755)
    (tmp_path / "cache" / "mllama_gguf").mkdir(parents=True)
    (tmp_path / "cache" / "mllama_gguf" / "devices").write_text("CPU\nCUDA0\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "one photo.jpg").touch()
    for name, value in {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": python_path(),
        "OLLAMA_MODELS": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "work"


def script(shell: str) -> str:
    command = [sys.executable, "-m", "mllama_gguf", "completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True, **elsewhere()).stdout


LINES = {
    "mllama ca": {"cache", "caption"},
    "mllama caption --vis": {"--vision-device", "--vision-precision"},
    "mllama caption --vision-device ": {"auto", "cpu", "CUDA0"},
    "mllama caption -m de": {"demo"},
    "mllama plan --precision ": {"fast", "exact"},
    "mllama quantize --type q": {"q4_k_m", "q5_k_m", "q6_k", "q8_0", "q4_0"},
    "mllama caption on": {"one photo.jpg"},
}


def test_bash(home: Path) -> None:
    program = script("bash") + "\n".join(
        f"""line={line!r}; COMP_LINE=$line COMP_POINT=${{#line}}; _mllama mllama "${{line##* }}" ''
        printf '%s\\t' "${{COMPREPLY[@]}}"; echo"""
        for line in LINES
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=home, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [set(row.split("\t")) - {""} for row in done.stdout.splitlines()]
    assert dict(zip(LINES, found, strict=True)) == LINES


def test_a_name_with_a_colon_in_bash(home: Path) -> None:
    """There a colon ends a word, so only what follows it is offered."""
    from mllama_gguf.cli.completing import split

    assert split("mllama caption -m 'ollama:a b") == ["mllama", "caption", "-m", "ollama:a b"]
    assert split("mllama caption ") == ["mllama", "caption", ""]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here; CI has it")
def test_fish(home: Path) -> None:
    program = script("fish") + "\n".join(f'complete -C "{line}"; echo ---' for line in LINES)
    done = subprocess.run(["fish", "-c", program], capture_output=True, text=True, cwd=home, timeout=60)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("---\n")[: len(LINES)]
    found = [{row.split("\t")[0].replace("\\", "") for row in part.splitlines()} for part in parts]
    assert dict(zip(LINES, found, strict=True)) == LINES


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here; CI has it")
def test_zsh(home: Path) -> None:
    (home / "mllama.zsh").write_text(script("zsh"))
    shell = pexpect.spawn(
        "zsh", ["-f", "-i"], encoding="utf-8", timeout=20, cwd=str(home), dimensions=(30, 120)
    )
    try:
        shell.sendline("PS1='@ '; autoload -U compinit; compinit -u -D; source ./mllama.zsh; echo REA''DY")
        shell.expect("READY")
        for begun, whole in (
            ("mllama caption --vision-dev", "--vision-device"),
            ("mllama caption -m de", "demo"),
            ("mllama plan --precision ex", "exact"),
            ("mllama capt", "caption"),
        ):
            shell.send(f"{begun}\t")
            time.sleep(0.3)
            shell.send("\x01echo [ \x05 ]\r")  # the line as words of `echo`, which show what it became
            shell.expect(rf"\n\[ .*{whole}")
    finally:
        shell.close(force=True)


def test_a_tab_is_quick() -> None:
    """Nothing that takes long is imported."""
    program = (
        "import sys; from mllama_gguf.cli.completing import offered; offered(['caption', '-m'], '')\n"
        "print([name for name in ('numpy', 'llama_cpp', 'PIL', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **elsewhere())
    assert done.stdout == "[]\n", done.stdout + done.stderr
