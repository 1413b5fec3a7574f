"""The files of contrib/, and what the documentation says about the server."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mllama_gguf.cli.serve import serve_command
from mllama_gguf.server.settings import from_environment

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "contrib" / "mllama.service"
PLIST = ROOT / "contrib" / "org.mllama.serve.plist"


def test_the_unit_of_systemd(tmp_path: Path) -> None:
    text = UNIT.read_text("utf-8")
    assert re.search(r"^ExecStart=/opt/mllama/bin/mllama serve$", text, re.M)
    for name in ("DynamicUser", "NoNewPrivileges", "ProtectSystem"):
        assert re.search(rf"^{name}=", text, re.M), name
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"\[\w+\]|\w+=.*", line) for line in lines)
    if tool := shutil.which("systemd-analyze"):
        unit = tmp_path / UNIT.name
        unit.write_text(text.replace("/opt/mllama/bin/mllama", sys.executable), "utf-8")
        done = subprocess.run([tool, "verify", str(unit)], capture_output=True, text=True)
        about_us = [line for line in done.stderr.splitlines() if UNIT.name in line]
        assert done.returncode == 0 and not about_us, done.stderr


def test_the_list_of_launchd() -> None:
    data = PLIST.read_bytes().replace(b"HOME", b"/Users/me")
    found = plistlib.loads(data)
    assert found["ProgramArguments"] == ["/Users/me/.mllama/bin/mllama", "serve"]
    assert found["Label"] == PLIST.stem and found["RunAtLoad"] is True


def test_the_documentation_names_what_there_is() -> None:
    text = (ROOT / "docs" / "server.md").read_text("utf-8")
    options = {name for one in serve_command.params if isinstance(one, click.Option) for name in one.opts}
    for name in re.findall(r"`(--[a-z-]+)", text):
        assert name in options, name
    known = {"OLLAMA_BASE_URL", "OLLAMA_MODELS"}
    values = {"OLLAMA_HOST": "h:1", "OLLAMA_ORIGINS": "x", "OLLAMA_KEEP_ALIVE": "1"}
    for name in set(re.findall(r"`(OLLAMA_[A-Z_]+)", text)) - known:
        assert from_environment({name: values.get(name, "7")}), name


@pytest.mark.parametrize("path", [UNIT, PLIST])
def test_they_say_how_to_install_them(path: Path) -> None:
    head = path.read_text("utf-8")[:900]
    assert "pip install 'mllama_gguf[serve]'" in head
