"""The package's public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import elsewhere

import mllama_gguf
from mllama_gguf import errors


def test_every_public_name_is_there() -> None:
    assert {"Mllama", "Reply", "Stats", "HParams", "Device", "RequestError", "__version__"} <= set(
        dir(mllama_gguf)
    )
    for name in mllama_gguf.__all__:
        assert getattr(mllama_gguf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mllama_gguf.nothing  # noqa: B018


def test_all_errors_are_public() -> None:
    names = {name for name in vars(errors) if not name.startswith("_")}
    assert names <= set(mllama_gguf.__all__)
    assert all(issubclass(getattr(errors, name), errors.MllamaError) for name in names)


def test_type_checkers_see_the_names_that_are_imported_late() -> None:
    tree = ast.parse(Path(mllama_gguf.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == mllama_gguf._LAZY


def test_every_public_name_has_its_page() -> None:
    pages = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")
    for name, module in mllama_gguf._LAZY.items():
        assert f"::: mllama_gguf.{module}.{name}\n" in pages, name


def test_importing_is_cheap() -> None:
    code = (
        "import sys, mllama_gguf, mllama_gguf.cli.main\n"
        "print([m for m in ('numpy', 'PIL', 'llama_cpp', 'rich', 'cffi', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], **elsewhere(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
