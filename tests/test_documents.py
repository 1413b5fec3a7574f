"""Every command line and program in the documentation works, and prints what is shown beside it.

tests/documented.py says how a block is marked. The command lines run one after the other in a folder for each
page, with what `Workplace` puts there: the demo model stands for every model, also for the ones of an Ollama
store. NOT_RUN holds those that do not run, and why.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import tiny
from documented import KINDS, Command, agrees, blocks, commands, inline, pages, promised
from forking import forks
from helpers import TinyFiles, python_path
from PIL import Image
from stores import in_store

from mllama_gguf.cli.main import COMMANDS, cli
from mllama_gguf.store.resolve import BUNDLED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in pages(ROOT)}
MADE = "<!-- The rest is made by scripts/make_reference.py. -->"
INSTALLS = "it installs or builds; .ci/run does that"
DOWNLOADS = "it downloads gigabytes"
NEEDS_RPC = "it needs a ggml with RPC, and another machine; tests/rpc"
NEEDS_GPU = "it needs a GPU"

# What does not run: a command line without its comment, and why. Its options are checked all the same.
NOT_RUN = {
    "pip install .": INSTALLS,
    "pip install '.[test]'": INSTALLS,
    "pip install '.[serve]'": INSTALLS,
    "pip install '.[chat]'": INSTALLS,
    "CMAKE_ARGS=\"-DGGML_RPC=ON\" pip install '.[dev]'": INSTALLS,
    "python -m venv .venv": INSTALLS,
    ". .venv/bin/activate": INSTALLS,
    "pre-commit install": INSTALLS,
    "cmake -S native -B build/dev -DMLLAMA_WERROR=ON": INSTALLS,
    "cmake --build build/dev": INSTALLS,
    "export MLLAMA_LIBRARY=$PWD/build/dev/libmllama.so": INSTALLS,
    "cmake -S native -B build/sanitize -DMLLAMA_WERROR=ON -DMLLAMA_FUZZ=ON": INSTALLS,
    "cmake --build build/sanitize": INSTALLS,
    'ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc -print-file-name=libasan.so):'
    '$(gcc -print-file-name=libubsan.so)" MLLAMA_LIBRARY=build/sanitize/libmllama.so '
    "python -m pytest tests/native/test_hostile.py": INSTALLS,
    "build/sanitize/fuzz_loader corpus 60": INSTALLS,
    "pytest": "it is these tests",
    "python -m pytest tests/text": "it is these tests",
    "python tests/layouts.py corpus": "the build that takes the files does not run; .ci/run",
    "mllama tune photo.jpg -m MODEL": "it takes a minute; tests/tune",
    "mllama tune IMAGE -m MODEL": "it takes a minute; tests/tune",
    "mllama pull llama3.2-vision-11b": DOWNLOADS,
    "mllama verify llama3.2-vision-11b": "the model is not in the repository",
    "mllama worker --host 192.168.1.5 --port 50052": NEEDS_RPC,
    "mllama caption photo.jpg --rpc 192.168.1.5:50052 -ngl -1": NEEDS_RPC,
    "mllama plan f.gguf --rpc 127.0.0.1:50052": NEEDS_RPC,
    "python scripts/caption_ray.py photos --out captions --actors 2": "it needs Ray; tests/ray",
    "scripts/gpu/backend.sh cuda build/cuda -DCMAKE_CUDA_ARCHITECTURES=90 -DGGML_CUDA_NO_VMM=ON": NEEDS_GPU,
    "scripts/gpu/pack.sh carry.tar.xz 3.12 build/cuda/libggml-cuda.so": NEEDS_GPU,
    "MLLAMA_CARRY=carry.tar.xz scripts/gpu_check.sh FOLDER": NEEDS_GPU,
    "scripts/gpu_check.sh FOLDER": NEEDS_GPU,
    "scripts/check_vulkan.sh --record": "it builds ggml with Vulkan; by hand, see docs/gpu.md",
}

RAN: set[str] = set()  # command lines of blocks


@dataclass
class Workplace:
    """A folder with what the documentation names, and the environment of its command lines."""

    folder: Path
    env: dict[str, str]
    server: subprocess.Popen[str] | None = None

    def run(self, command: Command) -> str:
        """What it prints, both streams as on a terminal. Asserts that it succeeds."""
        text = command.text.replace("127.0.0.1:11434", self.env["OLLAMA_HOST"]).replace(
            "0.0.0.0", "127.0.0.1"
        )
        if text.startswith("mllama serve"):
            return self.serve(text)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.env,
            input="What is this?\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{text}\nexit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def serve(self, text: str) -> str:
        """Start a server in place of the one before; its first line."""
        self.stop()
        self.server = subprocess.Popen(
            ["bash", "-c", f"exec {text}"],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.server.stdout is not None
        line = ""
        for line in self.server.stdout:
            if line.startswith("Serving at"):
                return line
        raise AssertionError(f"{text}: {line}")

    def stop(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            assert self.server.wait(20) == 0
            self.server = None


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with forks(tmp_path_factory.mktemp("forks")) as folder:
        yield folder


@pytest.fixture
def place(tmp_path: Path, programs: Path, tiny_files: Callable[[str], TinyFiles]) -> Iterator[Workplace]:
    """photo.jpg, IMAGE; photos/; examples/; schema.json; demo models as MODEL, FILE and in an Ollama store;
    text.gguf, mmproj.gguf and HF_DIR of another model."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    demo, small = BUNDLED["demo"].resolve(), tiny_files("square")
    shutil.copytree(ROOT / "examples", work / "examples")
    (work / "photos" / "more").mkdir(parents=True)
    for name in ("photo.jpg", "IMAGE", "photos/one.jpg", "photos/more/two.jpg"):
        Image.open(work / "examples" / "apple.png").convert("RGB").save(work / name, "jpeg", quality=95)
    shutil.copy(work / "examples" / "wide.png", work / "photos" / "wide.png")
    files = dict.fromkeys(("MODEL", "FILE", "f.gguf"), demo)
    files |= {"text.gguf": small.text, "mmproj.gguf": small.mmproj, "fifo": work / "photo.jpg"}
    for name, file in files.items():
        shutil.copy(file, work / name)
    tiny.make_checkpoint(small.arch, work / "HF_DIR")
    schema = next(
        one for one in blocks(PAGES["docs/structured-output.md"].read_text("utf-8")) if one.kind == "json"
    )
    (work / "schema.json").write_text(schema.text, "utf-8")
    in_store(home / ".ollama" / "models", "ollama:llama3.2-vision", ("model", demo.read_bytes()))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {
        "HOME": str(home),
        "PYTHONPATH": python_path(),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "LANG": "C.UTF-8",
        "MLLAMA_CONFIG_DIR": str(home / "config"),
        "MLLAMA_DOWNLOADS": str(home / "downloads"),
        "MLLAMA_IMAGE_CACHE": str(home / "images"),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    passed = {name: os.environ[name] for name in ("MLLAMA_LIBRARY", "TMPDIR") if name in os.environ}
    found = Workplace(work, {**env, **passed})
    yield found
    found.stop()


def read(page: str) -> str:
    return PAGES[page].read_text("utf-8").partition(MADE)[0]


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, place: Workplace) -> None:
    remove_outputs(page, place.folder)
    for block in blocks(read(page)):
        where = f"{page}:{block.line}"
        assert block.kind in KINDS, f"{where}: ```{block.kind} says not what it is: {', '.join(KINDS)}"
        if block.kind == "json":
            json.loads(block.text)
        elif block.kind == "python":
            (place.folder / "program.py").write_text(block.text, "utf-8")
            printed = place.run(Command(block.line, "run-python program.py"))
            for words in promised(block.text):
                lines = printed.splitlines()
                assert any(words.startswith(line) for line in lines if line), f"{where}: {words}\n{printed}"
        for command in commands(block):
            if command.words in NOT_RUN:
                assert command.shown is None
                continue
            printed = place.run(command)
            if command.shown is not None:
                where = f"{page}:{command.line}: {command.text}"
                assert agrees(printed, command.shown), (
                    f"{where}\nshown:\n{command.shown}\nprinted:\n{printed}"
                )
            RAN.add(command.words)


def test_what_sentences_name(place: Workplace) -> None:
    """Command lines with arguments that stand within sentences, once each, if no block has them."""
    ran = set(RAN)
    for page in PAGES:
        for command in inline(read(page)):
            if command.words not in ran and is_complete(command.words, place.folder):
                place.run(command)
                ran.add(command.words)


def remove_outputs(page: str, folder: Path) -> None:
    """What a page converts is not there before."""
    for block in blocks(read(page)):
        for command in commands(block):
            if command.words.startswith("mllama convert"):
                for name in re.findall(r"(?:-o|--mmproj) (\S+)", command.words):
                    (folder / name).unlink(missing_ok=True)


def is_complete(words: str, folder: Path) -> bool:
    """Whether what stands within a sentence is a command line with arguments, and runs here."""
    found = words.split()
    if found[0] != "mllama" or (len(found) < 3 and words != "mllama doctor") or words in NOT_RUN:
        return False
    placeholders = [word for word in found[1:] if re.search("[A-Z]", word) and not (folder / word).exists()]
    return not placeholders and found[1] not in ("serve", "worker")


def mentioned() -> Iterator[tuple[str, str]]:
    """Every command line with the page where it is: in blocks, in sentences, in the examples of the help."""
    for page in PAGES:
        every = [*(one for block in blocks(read(page)) for one in commands(block)), *inline(read(page))]
        yield from ((f"{page}:{command.line}", command.words) for command in every)
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for line in (command.epilog or "").splitlines()[2:]:
            yield f"mllama {name} --help", " ".join(line.split())


def test_what_does_not_run_is_right_all_the_same() -> None:
    """Commands, options, extras, scripts and tests that are named exist."""
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    )
    left = set(NOT_RUN)
    for where, words in mentioned():
        left.discard(words)
        for part in re.split(r" (?:&&|\|) ", words):
            if found := re.match(r"(?:\S+=\S+ )?mllama (.*)", part):
                problem = usage_problem(found[1])
                assert not problem, f"{where}: {words}: {problem}"
            if part.startswith("pip install"):
                for names in re.findall(r"\[([a-z,]+)\]", part):
                    assert set(names.split(",")) <= extras, f"{where}: {words}"
            for path in re.findall(r"(?<!\S)((?:scripts|tests)/[\w./-]+)", part):
                assert (ROOT / path).exists(), f"{where}: {words}"
            if found := re.search(r"(scripts/\S+\.py) (.*)", part):
                text = (ROOT / found[1]).read_text("utf-8")
                for option in re.findall(r"(?<!\S)--[a-z-]+", found[2]):
                    assert f'"{option}"' in text, f"{where}: {words}: {option}"
    assert not left, "these are in NOT_RUN and no longer in the documentation"


def usage_problem(arguments: str) -> str:
    """Why the command line of `mllama` cannot be; "" if nothing is wrong with its command and options."""
    name, *rest = shlex.split(re.sub(r"[<>|].*| # .*", "", arguments), posix=True) or [""]
    if name.startswith("-") or re.fullmatch("[A-Z_]+", name):
        return ""
    if name not in COMMANDS:
        return f"there is no command {name}"
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = click.Context(command, info_name=name)
    try:
        command.make_parser(context).parse_args([word for word in rest if not word.startswith("[")])
    except click.UsageError as e:
        return e.format_message()
    return ""


def test_marks() -> None:
    """Blocks, their command lines, and the comparison of what they print."""
    page = "Text `mllama doctor`, `mllama plan\nMODEL && x`.\n```\nno mark\n```\n"
    page += "  ```bash\n  a 'b\n  c' && d # e && f\n  # g\n  ```\n"
    page += "```console\n$ a b\none\n\n$ c \\\n> d\n```\n"
    found = blocks(page)
    assert [(one.kind, one.line) for one in found] == [("", 3), ("bash", 6), ("console", 11)]
    assert [one.text for one in commands(found[1])] == ["a 'b\nc'", "d # e && f"]
    assert [one.words for one in commands(found[1])] == ["a 'b c'", "d"]
    shown = commands(found[2])
    assert [(one.words, one.shown) for one in shown] == [("a b", "one\n"), ("c d", "")]
    assert commands(found[0]) == []
    assert [(one.line, one.words) for one in inline(page)] == [
        (1, "mllama doctor"),
        (1, "mllama plan MODEL"),
        (1, "x"),
    ]
    assert agrees("a 5 s\nb \n\n", "a ... s\nb") and agrees("a\nb\nc", "a\n...")
    assert not agrees("a\nb", "a") and not agrees("a 5", "a 6") and not agrees("", "a")
    assert promised("print(x)  # 5: five\nprint(y)") == ["5: five"]
    with pytest.raises(AssertionError, match="line 1: the block has no end"):
        blocks("```bash\nmllama doctor\n")
    assert usage_problem("caption x.png --no-such-option").startswith("No such option")
    assert usage_problem("capton x.png") == "there is no command capton" and not usage_problem(
        "models --json"
    )
