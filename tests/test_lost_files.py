"""Every command that writes, against every file that it must not lose: tables of commands and of targets."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import TinyFiles, noisy_image
from PIL import Image

from mllama_gguf import RequestError
from mllama_gguf.cli.main import COMMANDS, run

Files = Callable[[str], TinyFiles]
Captured = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Writer:
    """One way in which a command writes a file.

    args:     the command line; OUT stands for the file
    suffix:   that the file must have
    inputs:   files that it reads, relative to the folder of the test
    network:  it asks a server, so that only refusals are tried here (tests/store has the rest)
    """

    args: tuple[str, ...]
    suffix: str = ""
    inputs: tuple[str, ...] = ()
    network: bool = False


PHOTO = ("photo.png",)
WRITERS = {
    "convert": Writer(
        ("convert", "hf", "-o", "OUT", "--mmproj", "new-mmproj.gguf"),
        inputs=("hf/model.safetensors", "hf/config.json", "hf/tokenizer.json", "hf/preprocessor_config.json"),
    ),
    "convert mmproj": Writer(
        ("convert", "hf", "-o", "new.gguf", "--mmproj", "OUT"),
        inputs=("hf/model.safetensors", "hf/config.json", "hf/tokenizer.json"),
    ),
    "convert one": Writer(("convert", "hf", "-o", "OUT", "--single-file"), inputs=("hf/model.safetensors",)),
    "quantize": Writer(("quantize", "one.gguf", "OUT", "--type", "q8_0"), inputs=("one.gguf",)),
    "preprocess": Writer(("preprocess", "photo.png", "--out", "OUT"), inputs=PHOTO),
    "caption jsonl": Writer(
        ("caption", *PHOTO, "-m", "one.gguf", "-n", "2", "--out", "OUT", "--prompt-file", "prompt.jsonl"),
        ".jsonl",
        ("prompt.jsonl",),
    ),
    "caption csv": Writer(
        ("caption", *PHOTO, "-m", "one.gguf", "-n", "2", "--out", "OUT", "--prompt-file", "prompt.csv"),
        ".csv",
        ("prompt.csv",),
    ),
    "attend": Writer(("attend", "photo.png", "-m", "one.gguf", "-n", "2", "-o", "OUT"), inputs=PHOTO),
    "gallery": Writer(("gallery", "captions.jsonl", "-o", "OUT"), inputs=("captions.jsonl",)),
    "lock": Writer(("lock", "ollama:127.0.0.1:9/library/none", "--file", "OUT"), network=True),
}
OVERWRITE = ("convert", "quantize", "preprocess", "trace", "caption", "gallery", "attend")

# Commands that write to a folder: what they write there.
FOLDERS = {
    "preprocess": (("preprocess", "photo.png", "--png", "OUT"), "photo_0_0.png"),
    "trace": (
        ("trace", "photo.png", "-m", "one.gguf", "--tensors", "text.logits", "--out", "OUT"),
        "text.logits.0.npy",
    ),
    "tune json": (("tune", "photo.png", "-m", "one.gguf", "-o", "OUT"), "tune.json"),
    "tune csv": (("tune", "photo.png", "-m", "one.gguf", "-o", "OUT"), "tune.csv"),
    "tune png": (("tune", "photo.png", "-m", "one.gguf", "-o", "OUT"), "tune.png"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, to be copied."""
    return tiny.make_checkpoint(tiny.ARCHS["gqa"], tmp_path_factory.mktemp("checkpoint") / "hf")


@pytest.fixture
def here(tmp_path: Path, checkpoint: Path, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint, a model, an image and prompts."""
    folder = tmp_path / "here"
    shutil.copytree(checkpoint, folder / "hf")
    shutil.copy(tiny_files("gqa").one, folder / "one.gguf")
    Image.fromarray(noisy_image(1)).save(folder / "photo.png")
    for name in ("prompt.jsonl", "prompt.csv"):
        (folder / name).write_text("What is this?\n")
    record = {"image": "photo.png", "caption": "x", "finish_reason": "stop", "tokens": 1, "sha256": ""}
    (folder / "captions.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder: bytes of files, targets of links, kinds of the rest."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def command(args: tuple[str, ...], out: str, overwrite: bool) -> list[str]:
    extra = ["--overwrite"] if overwrite and args[0] in OVERWRITE else []
    extra += ["--fresh"] if overwrite and args[0] == "tune" else []
    return [out if arg == "OUT" else arg for arg in args] + extra


def refused(args: list[str], words: str, folder: Path, capsys: Captured) -> None:
    """One line, an exit code, and every file is as it was."""
    before = contents(folder)
    capsys.readouterr()
    assert run(args) in (1, 2)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Note: ")]
    assert error.startswith("Error: ")
    assert "unexpected" not in error
    assert words in error
    assert contents(folder) == before


def test_all_commands_that_write_are_here() -> None:
    """A new command is added to one of these lists."""
    writes = {writer.args[0] for writer in WRITERS.values()} | {args[0] for args, _ in FOLDERS.values()}
    # tests/store/test_store.py, tests/cache/test_image_cache.py, tests/chat/test_talk.py
    elsewhere = {"pull", "cache", "chat"}
    reads = {"completion", "devices", "doctor", "info", "models", "plan", "serve", "verify", "worker"}
    assert writes | elsewhere | reads >= set(COMMANDS)


# ---- inputs ------------------------------------------------------------------------------------------------

SPELLINGS: dict[str, Callable[[Path], str]] = {
    "its name": str,
    "absolute": lambda path: str(path.absolute()),
    "dots": lambda path: f"hf/../{path}",
    "slashes": lambda path: f".//{path}",
    "a link": lambda path: made(path, os.symlink),
    "a hard link": lambda path: made(path, os.link),
    "a link to the folder": lambda path: linked_folder(path),
}


def made(path: Path, make: Callable[[Path, Path], None]) -> str:
    other = Path(f"other{path.suffix}")
    make(path.absolute(), other)
    return str(other)


def linked_folder(path: Path) -> str:
    os.symlink(path.parent.absolute(), "folder")
    return f"folder/{path.name}"


@pytest.mark.parametrize("name", [name for name, writer in WRITERS.items() if writer.inputs])
def test_an_input_is_never_the_output(here: Path, name: str, capsys: Captured) -> None:
    for path in map(Path, WRITERS[name].inputs):
        for spelling, spelled in SPELLINGS.items():
            out = spelled(path)
            for overwrite in (False, True) if spelling == "its name" else (True,):
                refused(command(WRITERS[name].args, out, overwrite), "it is the input", here, capsys)
            for leftover in (f"other{path.suffix}", "folder"):
                Path(leftover).unlink(missing_ok=True)


def test_two_outputs_in_one_file(here: Path, capsys: Captured) -> None:
    Path("old.gguf").touch()
    os.symlink("new.gguf", "link.gguf")
    os.link("old.gguf", "hard.gguf")
    for out, mmproj in (
        ("new.gguf", "new.gguf"), ("new.gguf", "./new.gguf"), ("new.gguf", "hf/../new.gguf"),
        ("new.gguf", str(here / "new.gguf")), ("new.gguf", "link.gguf"), ("link.gguf", "new.gguf"),
        ("old.gguf", "hard.gguf"), ("new.gguf", "NEW.gguf"),
    ):  # fmt: skip
        args = ["convert", "hf", "-o", out, "--mmproj", mmproj]
        refused([*args, "--overwrite"], "the same file", here, capsys)


# ---- files of others ---------------------------------------------------------------------------------------

OTHERS = {
    "text": b"my notes\n",
    "json": b'{"mine": true}\n',
    "toml": b'[project]\nname = "mine"\n',
    "csv": b"name,price\napple,3\n",
    "photo": b"\xff\xd8\xff\xe0 a photo",
    "zeros": bytes(1000),
    "safetensors": b"\x10\0\0\0\0\0\0\0" + b'{"a": {}}       ',
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_files_of_others_stay(here: Path, name: str, overwrite: bool, capsys: Captured) -> None:
    writer = WRITERS[name]
    for kind, data in OTHERS.items():
        path = Path(f"notes-{kind}{writer.suffix}")
        path.write_bytes(data)
        links = [Path(f"{how}-{kind}{writer.suffix}") for how in ("soft", "hard")]
        links[0].symlink_to(path)
        os.link(path, links[1])
        for out in (path, *links):
            refused(command(writer.args, str(out), overwrite), "it exists and is no", here, capsys)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_files_of_others_in_a_folder_stay(here: Path, name: str, overwrite: bool, capsys: Captured) -> None:
    args, file = FOLDERS[name]
    Path("out").mkdir()
    for data in (OTHERS["json"], OTHERS["csv"], Path("photo.png").read_bytes(), b"\x93NUMPY\1\0mine"):
        (Path("out") / file).write_bytes(data)
        refused(command(args, "out", overwrite), "it exists and is no", here, capsys)


@pytest.mark.parametrize("name", ["preprocess", "tune png"])
def test_an_image_in_the_folder_stays(here: Path, name: str, capsys: Captured) -> None:
    """The folder of the images is the folder of the outputs, and an input has the name of an output."""
    args, file = FOLDERS[name]
    source = "photo.png" if name == "preprocess" else "tune.png"
    os.rename("photo.png", source)
    if name == "preprocess":
        os.link(source, file)
    words = "it is the input"
    args = tuple(source if arg == "photo.png" else arg for arg in args)
    for overwrite in (False, True):
        refused(command(args, ".", overwrite), words, here, capsys)


# ---- no files ----------------------------------------------------------------------------------------------

NO_FILES = {
    "": "",
    "a folder": "folder",
    "a folder with a slash": "folder/",
    "a new name with a slash": "new/",
    "the current folder": ".",
    "a pipe": "fifo",
    "a device": "/dev/null",
    "a link to a device": "null",
    "no such folder": "none/new",
    "below a file": "photo.png/new",
    "a loop": "loop",
    "too long": "x" * 300,
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("which", NO_FILES)
def test_what_is_no_file(here: Path, which: str, overwrite: bool, capsys: Captured) -> None:
    for writer in WRITERS.values():
        end = writer.suffix
        target = NO_FILES[which]
        if end and which not in ("", "the current folder", "a device"):
            stem, slash = target.rstrip("/"), "/" if target.endswith("/") else ""
            target = stem + end + slash
        for path in ("folder", "fifo", "null", "loop"):
            plain = Path(path + end)
            if path == "folder":
                plain.mkdir(exist_ok=True)
            elif not os.path.lexists(plain):
                if path == "fifo":
                    os.mkfifo(plain)
                else:
                    plain.symlink_to("/dev/null" if path == "null" else plain)
        refused(command(writer.args, target, overwrite), "", here, capsys)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_folder(here: Path, name: str, capsys: Captured) -> None:
    args, _ = FOLDERS[name]
    os.mkfifo("fifo")
    Path("null").symlink_to("/dev/null")
    for target in ("", "photo.png", "photo.png/x", "/dev/null", "/dev/null/x", "null", "fifo", "x" * 300):
        for overwrite in (False, True):
            refused(command(args, target, overwrite), "", here, capsys)


# ---- what is replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convert one", "quantize", "preprocess", "gallery"])
def test_only_overwrite_replaces(here: Path, name: str, capsys: Captured) -> None:
    args = WRITERS[name].args
    Path("empty").touch()
    assert run(command(args, "empty", False)) == 0
    whole = Path("empty").read_bytes()
    os.link("empty", "old")
    os.symlink("old", "link")
    refused(command(args, "old", False), "it exists; --overwrite replaces it", here, capsys)
    refused(command(args, "link", False), "it exists; --overwrite replaces it", here, capsys)
    assert run(command(args, "link", True)) == 0
    assert Path("link").is_symlink()
    assert Path("old").read_bytes() == Path("empty").read_bytes() == whole
    assert not os.path.samefile("old", "empty")  # a file of the right kind, replaced as a whole
    assert not list(here.glob(".mllama*"))


@pytest.mark.parametrize("name", ["preprocess", "trace"])
def test_only_overwrite_replaces_in_a_folder(here: Path, name: str, capsys: Captured) -> None:
    args, file = FOLDERS[name]
    assert run(command(args, "new/folder", False)) == 0
    path = Path("new/folder") / file
    whole = path.read_bytes()
    refused(command(args, "new/folder", False), "it exists; --overwrite replaces it", here, capsys)
    if name == "trace":
        np.save(path, np.zeros(3, np.float32))
    assert run(command(args, "new/folder", True)) == 0
    assert path.read_bytes() == whole


def test_an_existing_lock_file_must_be_one(here: Path, capsys: Captured) -> None:
    Path("broken.lock").write_text('version = 1\n[models."x"]\nsource = 3\n')
    Path("other.lock").write_text('version = 4\n[[package]]\nname = "cargo"\n')
    args = ["lock", "ollama:127.0.0.1:9/library/none", "--file"]
    refused([*args, "broken.lock"], "broken.lock: models.x", here, capsys)
    refused([*args, "other.lock"], "is not a lock file of models", here, capsys)


def test_a_name_for_quantize(here: Path, capsys: Captured) -> None:
    """IN is what -m takes elsewhere."""
    args = ["--type", "q8_0", "--allow-requantize"]
    assert run(["quantize", "demo", "q.gguf", *args]) == 0
    assert Path("q.gguf").read_bytes().startswith(b"GGUF")
    refused(["quantize", "dmo", "r.gguf", *args], "dmo: no such file, nor a model's name", here, capsys)


def test_a_broken_lock_file_beside_a_model_that_needs_none(here: Path, capsys: Captured) -> None:
    Path("models.lock").write_text("not [toml")
    assert run(["verify", "demo"]) == 0
    out, err = capsys.readouterr()
    assert ": ok  sha256:" in out
    assert err.startswith("Warning: models.lock") and err.count("\n") == 1
    assert json.dumps("ignored")[1:-1] in err


# ---- scripts -----------------------------------------------------------------------------------------------


def test_figures_of_the_scripts(here: Path) -> None:
    """What --json names is a new file, or one that such a script wrote; never a file of others."""
    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    import report
    import trial_grammars

    os.mkfifo("fifo")
    Path("empty").touch()
    Path("link").symlink_to("photo.png")
    os.link("prompt.jsonl", "hard")
    for kind, data in OTHERS.items():
        Path(f"notes-{kind}").write_bytes(data)
    before = contents(here)
    others = [f"notes-{kind}" for kind in OTHERS] + ["photo.png", "one.gguf", "link", "hard", "fifo", "hf"]
    for json_path in (report.json_path, trial_grammars.json_path):
        for name in (*others, "/dev/null", "none/x", ""):
            with pytest.raises(argparse.ArgumentTypeError):
                json_path(name)
        assert json_path("empty") == here / "empty"
        assert json_path("new") == here / "new"
    assert contents(here) == before
    report.write_json(here / "figures", {"about": {}, "rows": []})
    assert report.json_path("figures") == here / "figures"
    Path("results").write_text('{"case": "0-1", "outcome": "works", "seconds": 0.1, "words": ""}\n')
    assert trial_grammars.json_path("results") == here / "results"


def test_folders_of_the_scripts(here: Path, capsys: Captured) -> None:
    """What --dir names is a folder, in which a script makes one of its own. The script for Ray adds files to
    its folder. The export of the demo model replaces only an earlier export."""
    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    import caption_ray
    import report

    os.mkfifo("fifo")
    Path("link").symlink_to("photo.png")
    before = contents(here)
    for name in ("", "photo.png", "photo.png/x", "fifo", "link", "/dev/null", "/dev/null/x", "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError):
            report.folder(name)
        with pytest.raises(RequestError):
            report.check_replaced(Path(name) if name else Path("photo.png"), "config.json", {})
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["caption_ray.py", "photo.png", "--out", name])
            caption_ray.main()
        assert ended.value.code == 2
        assert "cannot write to" in capsys.readouterr().err or not name
    config = json.loads((here / "hf" / "config.json").read_text())
    for folder, content in (("hf", {}), ("hf", {**config, "mine": 1}), (".", config)):
        with pytest.raises(RequestError, match="cannot write"):
            report.check_replaced(Path(folder), "config.json", content)
    report.check_replaced(Path("hf"), "config.json", config)
    report.check_replaced(Path("none"), "config.json", config)
    assert contents(here) == before
    assert report.folder("new/folder") == Path("new/folder")
    assert Path("new/folder").is_dir()


def test_every_script_asks_before_it_writes_figures() -> None:
    for path in sorted((Path(__file__).parents[1] / "scripts").glob("*.py")):
        for options in re.findall(r'"--dir",([^\n]*)', path.read_text("utf-8")):
            assert "report.folder" in options or "args.dir" in options or not options, f"{path}: --dir"
        for options in re.findall(r'add_argument\("--json",([^\n]*)', path.read_text("utf-8")):
            asks = "json_path" in options or "store_true" in options or path.name == "compare_offload.py"
            assert asks, f"{path}: --json"


# ---- a full disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convert one", "quantize", "preprocess"])
def test_a_full_disk(here: Path, name: str, capsys: Captured) -> None:
    """The old file stays, nothing is left behind, and the words name the file."""
    args = WRITERS[name].args
    assert run(command(args, "old", False)) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for n_bytes in (100, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            refused(command(args, "old", True), "cannot write old: File too large", here, capsys)
            refused(command(args, "new", False), "cannot write new: File too large", here, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
