"""A batch never loses a file: not an image, not another input, nothing that another program wrote."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import noisy_image, without_rights
from PIL import Image

from mllama_gguf import RequestError
from mllama_gguf import files as files_module
from mllama_gguf.batch.failures import ErrorLog, error_log
from mllama_gguf.batch.outputs import CombinedFile, RecordFile
from mllama_gguf.batch.records import Record
from mllama_gguf.batch.sidecars import Sidecars, check_suffix
from mllama_gguf.cli.main import run

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images and a broken one, in the current folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in (1, 2):
        Image.fromarray(noisy_image(i)).save(folder / f"{i}.jpg")
    (folder / "3.jpg").write_bytes(b"broken")
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def kept(before: dict[str, bytes], folder: Path) -> None:
    """Everything that was there is as it was."""
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before


def refused(args: list[str], words: str, folder: Path, capsys: Captured) -> None:
    """The command ends with one line, and no file has changed or come."""
    before = contents(folder)
    capsys.readouterr()
    assert run(["caption", *args, "-n", "2"]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("Error: ") and error.count("\n") == 1
    assert contents(folder) == before


# ---- captions beside their images ------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "suffix",
    [
        "", ".", "..", "jpg", "/x.txt", "./x.txt", "../.txt", ".a/b", ".jpg", ".JPG", ".Jpeg", ".png",
        ".caption.jpg", ".jpg ", ".jxl", ".NEF", ".mp4", ".svg", ".pdf", ".psd",
    ],
)  # fmt: skip
def test_suffixes(photos: Path, suffix: str, overwrite: list[str], capsys: Captured) -> None:
    refused([".", "--sidecar", suffix, *overwrite], "--sidecar", photos, capsys)


def test_the_wrong_output_is_named_first(photos: Path, capsys: Captured) -> None:
    """Not that there are no images beside it."""
    refused(["1.jpg", "--sidecar", ".jpg"], "this suffix belongs to images", photos, capsys)
    refused(["1.jpg", "--out", "1.jpg"], "captions go to a file called", photos, capsys)


def test_a_suffix_with_a_nul() -> None:
    with pytest.raises(RequestError, match="takes a suffix"):
        check_suffix(".a\0b")
    for good in (".txt", ".caption", ".txt.bak", ".JSON", ".jpg.txt"):
        check_suffix(good)


def test_no_caption_replaces_an_input(photos: Path, capsys: Captured) -> None:
    for name in ("1.txt", "1.schema", "1.gguf", "1.prompt"):
        Path(name).write_text('{"type": "string"}' if name == "1.schema" else "1.jpg\n")
    os.link("1.txt", "hard.txt")
    Path("link.txt").symlink_to("1.txt")
    for args in (
        ["1.txt", "--sidecar", ".txt"],
        ["./1.txt", "--sidecar", ".txt"],
        ["hard.txt", "--sidecar", ".txt"],
        ["link.txt", "--sidecar", ".txt"],
        ["1.jpg", "--sidecar", ".schema", "--json-schema", "1.schema"],
        ["1.jpg", "--sidecar", ".prompt", "--prompt-file", "./1.prompt"],
        ["1.jpg", "--sidecar", ".gguf", "-m", "1.gguf"],
        ["1.jpg", "--sidecar", ".gguf", "--mmproj", "../photos/1.gguf"],
    ):
        for more in ([], ["--overwrite"]):
            refused([*args, *more], "would replace the input", photos, capsys)


def test_no_caption_replaces_an_image(photos: Path, capsys: Captured) -> None:
    """An image that is named is tried whatever its name, so a caption may have that name."""
    os.rename("2.jpg", "1.webshot")
    Path("list").write_text("1.jpg\n1.webshot\n")
    os.rename("list", "list.txt")
    refused(["list.txt", "--sidecar", ".webshot", "--overwrite"], "would replace the input", photos, capsys)
    os.rename("1.webshot", "4.jpg")
    os.link("4.jpg", "1.webshot")
    refused(["1.jpg", "4.jpg", "--sidecar", ".webshot"], "would replace the input", photos, capsys)


def test_the_log_is_no_caption_file(photos: Path, capsys: Captured) -> None:
    os.rename("1.jpg", "errors.jpg")
    Path("errors.jsonl").write_text(json.dumps({"image": "x", "error": "ImageError", "message": "y"}) + "\n")
    refused([".", "--sidecar", ".jsonl", "--overwrite"], "would replace the input", photos, capsys)


def test_what_is_no_caption_stays(photos: Path, capsys: Captured) -> None:
    """--overwrite makes captions anew; a film or another model's file of that name is none."""
    Path("1.dat").write_bytes(b"\0\1\2binary")
    Path("2.dat").write_bytes(b"a caption\n")
    before = contents(photos)
    assert run(["caption", ".", "--sidecar", ".dat", "--overwrite", "-n", "2"]) == 3
    error = capsys.readouterr().err
    assert "1.dat: cannot be written: it exists and is not a caption; move it away" in error
    del before["2.dat"]
    kept(before, photos)
    assert Path("2.dat").read_bytes() != b"a caption\n"


def test_a_caption_written_meanwhile_stays(tmp_path: Path) -> None:
    output = Sidecars(".txt", [str(tmp_path / "a.png")])
    assert list(output.records()) == []
    (tmp_path / "a.txt").write_text("by hand")
    with pytest.raises(FileExistsError, match="made or edited meanwhile"):
        output.write(Record(str(tmp_path / "a.png"), "ours", "stop", 1, ""))
    assert (tmp_path / "a.txt").read_text() == "by hand"


@pytest.mark.parametrize("suffix", [".txt", ".xmp"])
def test_another_run_may_make_the_same_caption(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(str(tmp_path / "a.png"), "an <apple>\n", "stop", 1, "")
    other = replace(record, caption="a pear")
    output = Sidecars(suffix, [record.image])
    output.write(record)
    file = output.path(record.image)
    data = file.read_bytes()
    output.write(record)
    with pytest.raises(FileExistsError, match="made or edited meanwhile"):
        output.write(other)
    published = files_module._publish

    def publish(temporary: Path, target: Path) -> None:
        target.write_bytes(data)  # it appears after the look at it
        published(temporary, target)

    monkeypatch.setattr(files_module, "_publish", publish)
    file.unlink()
    output.write(record)
    file.unlink()
    with pytest.raises(FileExistsError, match="made it meanwhile"):
        output.write(other)
    assert file.read_bytes() == data


def test_links_of_captions_are_followed(photos: Path) -> None:
    Path("captions").mkdir()
    for i in (1, 2):
        Path(f"{i}.txt").symlink_to(f"captions/{i}.txt")
    Path("captions/1.txt").write_text("old\n")
    assert run(["caption", "1.jpg", "2.jpg", "--sidecar", ".txt", "--overwrite", "-n", "2"]) == 0
    for i in (1, 2):
        assert Path(f"{i}.txt").is_symlink()
        assert Path(f"captions/{i}.txt").read_text() not in ("", "old\n")


# ---- one file ----------------------------------------------------------------------------------------------

OTHERS = {
    "mine.csv": b"name,price\napple,3\n",
    "short.csv": b"image,caption\n1.jpg,mine\n",
    "mine.jsonl": b'{"image": "1.jpg", "text": "mine"}\n',
    "torn.jsonl": b'{"image": "1.jpg", "text": "mine"}',
    "list.jsonl": b'{"image": ["1.jpg"], "caption": "x", "finish_reason": "", "tokens": 1, "sha256": ""}\n',
    "number.jsonl": b"3\n",
    "binary.jsonl": bytes(range(256)),
    "binary.csv": b"\xff\xfe" + b"image,caption".decode().encode("utf-16-le"),
}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", OTHERS)
def test_files_of_others(photos: Path, name: str, overwrite: list[str], capsys: Captured) -> None:
    Path(name).write_bytes(OTHERS[name])
    Path("sub").mkdir()
    os.link(name, f"sub/hard-{name}")
    Path(f"link-{name}").symlink_to(name)
    for out in (name, f"./sub/../{name}", f"sub/hard-{name}", f"link-{name}"):
        words = "is not a file of captions; give another name"
        refused([".", "--out", out, *overwrite], words, photos, capsys)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("errors.jsonl", "failures are noted in a file of this name"),
        ("./errors.jsonl", "failures are noted in a file of this name"),
        ("../photos/mllama-errors.jsonl", "failures are noted in a file of this name"),
        ("link.jsonl", "failures are noted in a file of this name"),
        ("fifo.jsonl", "is a pipe"),
        ("folder.jsonl", "is a folder"),
        ("folder.jsonl/", "captions go to a file called"),
        ("null.jsonl", "is a device"),
        ("none/c.jsonl", "there is no folder"),
        (".jsonl", "captions go to a file called"),
        ("c.xml", "captions go to a file called"),
        ("", "captions go to a file called"),
        ("/dev/null", "captions go to a file called"),
        ("1.jpg", "captions go to a file called"),
        ("x" * 250 + ".jsonl", "File name too long"),
        ("hard.jsonl", "is not a file of captions"),
    ],
)
def test_outputs_that_cannot_be(
    photos: Path, out: str, words: str, overwrite: list[str], capsys: Captured
) -> None:
    os.mkfifo("fifo.jsonl")
    Path("folder.jsonl").mkdir()
    Path("null.jsonl").symlink_to("/dev/null")
    Path("link.jsonl").symlink_to("errors.jsonl")
    os.link("1.jpg", "hard.jsonl")
    refused([".", "--out", out, *overwrite], words, photos, capsys)


def test_the_prompt_is_no_output(photos: Path, capsys: Captured) -> None:
    Path("empty.jsonl").touch()
    os.link("empty.jsonl", "hard.jsonl")
    for out in ("empty.jsonl", "hard.jsonl"):
        args = ["1.jpg", "--out", out, "--prompt-file", "empty.jsonl"]
        refused(args, "it is the input", photos, capsys)


@pytest.mark.parametrize("how", ["new", "--overwrite"])
def test_a_link_to_the_output_is_followed(photos: Path, tmp_path: Path, how: str) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "captions.jsonl", photos / "c.jsonl"
    link.symlink_to(target)
    if how != "new":
        assert run(["caption", "1.jpg", "--out", "c.jsonl", "-n", "2", "-p", "What?"]) == 0
        target.chmod(0o640)
    args = ["caption", "1.jpg", "2.jpg", "--out", "c.jsonl", "-n", "2", *([how] if how != "new" else [])]
    assert run(args) == 0
    assert link.is_symlink()
    assert [json.loads(line)["image"] for line in target.read_text().splitlines()] == ["1.jpg", "2.jpg"]
    names = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert names == [".captions.jsonl.mllama.json", "captions.jsonl"]
    assert how == "new" or target.stat().st_mode & 0o777 == 0o640


def test_an_editors_last_line_stays(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    record = Record("a.png", "by hand", "stop", 3, "")
    file = RecordFile(path)
    file.write(record)
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\n"))
    file = RecordFile(path)
    assert list(file.records()) == [record]
    file.close()
    assert path.read_bytes() == whole


def test_an_output_that_goes_away_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    for away in (path.unlink, lambda: os.rename(path, tmp_path / "moved.jsonl")):
        file = RecordFile(path)
        file.write(Record("a.png", "x", "stop", 1, ""))
        away()
        with pytest.raises(OSError, match="moved, replaced or deleted"):
            file.write(Record("b.png", "x", "stop", 1, ""))
        file.close()


def test_a_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    path, partial = tmp_path / "c.csv", tmp_path / ".partial.jsonl"
    file = CombinedFile(path, partial, "overwrite", "")
    file.write(Record("a.png", "x", "stop", 1, ""))
    path.write_text("mine,yours\n")
    with pytest.raises(RequestError, match="is not a file of captions"):
        file.finish()
    file.close()
    assert path.read_text() == "mine,yours\n"
    assert partial.exists()


def test_what_is_planted_for_overwrite_is_not_followed(photos: Path, capsys: Captured) -> None:
    assert run(["caption", "1.jpg", "--out", "c.jsonl", "-n", "2"]) == 0
    args = ["1.jpg", "--out", "c.jsonl", "--overwrite"]
    seen: list[Path] = []

    def plant(path: Path, *args: Any, **more: Any) -> Any:
        seen.append(path)
        raise PermissionError(13, "stop here", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllama_gguf.batch.outputs.open_locked", plant)
        assert run(["caption", *args, "-n", "2"]) == 1
    (partial,) = seen
    assert partial.name.startswith(".mllama-")
    partial.symlink_to("c.jsonl")
    refused(args, "this link is in the way; delete it", photos, capsys)


# ---- errors.jsonl ------------------------------------------------------------------------------------------

LOGS = {
    "another program's": b'{"error": "mine", "time": 3}\n',
    "text": b"my notes\n",
    "no line end": b"my notes",
    "more fields": b'{"image": "1.jpg", "error": "ImageError", "message": "x", "mine": 1}\n',
    "other values": b'{"image": "1.jpg", "error": "blurry", "message": "x"}\n',
    "unfinished": b'{"image": "1.jpg", "label": 3}',
    "mixed": b'{"image": "3.jpg", "error": "ImageError", "message": "x"}\n{"image": "4.jpg"}\n',
    "binary": bytes(range(256)),
    "a long line": b'{"image": "' + b"x" * (1 << 21),
}


@pytest.mark.parametrize("how", [["--out", "c.jsonl"], ["--sidecar", ".txt"], ["--out", "c.csv"]])
@pytest.mark.parametrize("which", LOGS)
def test_an_errors_file_of_others(photos: Path, which: str, how: list[str], capsys: Captured) -> None:
    Path("errors.jsonl").write_bytes(LOGS[which])
    before = contents(photos)
    for _ in range(2):
        assert run(["caption", ".", *how, "-n", "2"]) == 3
        assert "1 failed, see mllama-errors.jsonl" in capsys.readouterr().err
        kept(before, photos)
        (line,) = Path("mllama-errors.jsonl").read_text().splitlines()
        assert json.loads(line)["image"].endswith("3.jpg")
    Path("3.jpg").unlink()
    assert run(["caption", "1.jpg", *how, "-n", "2"]) == 0
    assert Path("errors.jsonl").read_bytes() == LOGS[which]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/null", path)])
def test_an_errors_file_that_is_none(photos: Path, make: Any) -> None:
    make("errors.jsonl")
    assert error_log(photos).path == photos / "mllama-errors.jsonl"
    make("mllama-errors.jsonl")
    with pytest.raises(RequestError, match="move one of them away"):
        error_log(photos)


def test_a_closed_folder_is_named(photos: Path, capsys: Captured) -> None:
    os.mkdir("closed", 0)
    with without_rights():
        assert run(["caption", "1.jpg", "--out", "closed/c.jsonl"]) == 1
    os.chmod("closed", 0o755)
    assert "cannot be noted in closed/errors.jsonl: Permission denied; write to" in capsys.readouterr().err


def test_a_name_without_a_caption_file_stops_no_other(photos: Path, capsys: Captured) -> None:
    Path("3.jpg").unlink()
    long = "a" * 249 + ".jpg"
    os.link("1.jpg", long)
    os.mkdir("closed")
    os.link("1.jpg", "closed/1.jpg")
    os.chmod("closed", 0)
    with without_rights():
        images = ["1.jpg", long, "closed/1.jpg"]
        assert run(["caption", *images, "--sidecar", ".txt", "--sidecar-full-name", "-n", "2"]) == 3
    os.chmod("closed", 0o755)
    said = capsys.readouterr().err
    assert f"cannot write {long[:100]}" in said and ".jpg.txt: File name too long; use --out" in said
    assert "cannot write closed/1.jpg.txt: Permission denied; use --out" in said
    assert Path("1.jpg.txt").read_text().strip()


def test_an_errors_file_that_is_a_link(photos: Path, tmp_path: Path) -> None:
    Path("errors.jsonl").symlink_to(tmp_path / "log.jsonl")
    assert run(["caption", ".", "--sidecar", ".txt", "-n", "2"]) == 3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    Path("3.jpg").unlink()
    os.link("1.jpg", "3.jpg")
    assert run(["caption", ".", "--sidecar", ".txt", "-n", "2"]) == 0
    assert Path("errors.jsonl").is_symlink()
    assert not (tmp_path / "log.jsonl").exists()


def failures() -> list[tuple[str, str, str]]:
    """Image, output and the end of the message of each line."""
    entries = [json.loads(line) for line in Path("errors.jsonl").read_text().splitlines()]
    return [(entry["image"], entry["output"], entry["message"][-20:]) for entry in entries]


def test_outputs_of_one_folder_keep_their_lines(photos: Path) -> None:
    """A run about the same images leaves the failures of other outputs alone."""
    Path("link.jsonl").symlink_to("b.jsonl")
    outputs = {
        "a.jsonl": ["--out", "a.jsonl"],
        "b.jsonl": ["--out", "link.jsonl"],
        "--sidecar .txt": ["--sidecar", ".txt"],
    }
    for how in outputs.values():
        assert run(["caption", "3.jpg", *how, "-n", "2"]) == 3
    first = failures()
    assert [(image, output) for image, output, _ in first] == [("3.jpg", output) for output in outputs]
    for how in (*outputs.values(), ["--out", "b.jsonl"]):
        assert run(["caption", "3.jpg", *how, "-n", "2"]) == 3  # the last failure replaces that of the output
    assert sorted(failures()) == sorted(first)
    with open("errors.jsonl", "a") as file:  # of an earlier version
        file.write('{"image": "3.jpg", "error": "ImageError", "message": "old"}\n')
    os.replace("1.jpg", "3.jpg")
    for n, how in enumerate((["--out", "a.jsonl"], ["--out", "b.jsonl"], ["--sidecar", ".txt"])):
        assert len(Path("errors.jsonl").read_text().splitlines()) == (4 if n == 0 else 3 - n)
        assert run(["caption", "3.jpg", *how, "-n", "2"]) == 0
    assert not Path("errors.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_known_first(
    photos: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is opened: it is not even a model."""
    Path("no.gguf").write_bytes(b"no model")
    for folder in ("readonly", "other"):
        Path(folder).mkdir()
        for name in ("1.jpg", "2.jpg"):
            os.link(name, f"{folder}/{name}")
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "readonly" not in os.fspath(path) and allowed(path, mode)
    )
    os.symlink("../readonly/2.txt", "other/2.txt")
    args = ["-n", "2", "-m", "no.gguf", "--any-settings"]
    for images, how, file in (
        (["readonly"], ["--sidecar", ".txt"], "readonly/1.txt"),
        (["readonly/2.jpg"], ["--sidecar", ".xmp", "--overwrite"], "to readonly"),
        (["other/2.jpg", "readonly"], ["--sidecar", ".txt", "--existing", "append"], "other/2.txt"),
    ):
        assert run(["caption", *images, *how, *args]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"Error: cannot write {file}: the folder ") and said.count("\n") == 1
    # Some of them: the others are captioned.
    assert run(["caption", "readonly/1.jpg", "other", "--sidecar", ".txt", "-n", "2"]) == 3
    said = capsys.readouterr().err
    assert "1 captioned, 2 failed" in said and "make it writable, or use --out" in said
    assert Path("other/1.txt").read_text().strip() and not list(Path("readonly").glob("*.txt"))
    Path("readonly/1.txt").write_text("done\n")
    Path("readonly/2.txt").write_text("done\n")
    assert run(["caption", "readonly", "--sidecar", ".txt", *args]) == 0  # nothing to do
    os.chmod("1.jpg", 0o444)
    Path("1.txt").touch()
    os.chmod("1.txt", 0o444)
    assert run(["caption", "1.jpg", "--sidecar", ".txt", *args]) == 1
    assert "Error: cannot write 1.txt: it is write-protected; make it writable" in capsys.readouterr().err


def test_lines_of_others_stay(tmp_path: Path) -> None:
    """Another program writes into our log while a run continues."""
    log = ErrorLog(tmp_path / "errors.jsonl")
    entry = {"image": "a", "error": "ImageError", "message": "x"}
    log.add(entry)
    with open(log.path, "ab") as file:
        file.write(b"theirs\n\nand this\r\n" + b'{"image": "b", "mine": 1}')
    log.add(entry)
    log.add({**entry, "image": "c"})
    ours = [json.dumps({**entry, "image": image}).encode() + b"\n" for image in ("a", "c")]
    log.tidy({"b"})
    theirs = b'theirs\n\nand this\r\n{"image": "b", "mine": 1}\n'
    assert log.path.read_bytes() == theirs + b"".join(ours)
    log.tidy({"a", "b", "c"})
    assert log.path.read_bytes() == theirs
    with open(log.path, "ab") as file:  # a line of theirs of which the end could be a torn one of ours
        file.write(b"x" * 100 + b'{"image": "'.ljust(1 << 20, b"x"))
    log.add(entry)
    assert log.path.stat().st_size == len(theirs) + 100 + (1 << 20) + 1 + len(ours[0])
    (tmp_path / "empty.jsonl").touch()
    ErrorLog(tmp_path / "empty.jsonl").tidy(())
    assert (tmp_path / "empty.jsonl").exists()


def test_the_end_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million failures each would take longer than the one before."""
    read = []

    class Counted(io.FileIO):
        def readall(self) -> bytes:
            read.append(data := super().readall())
            return data

    monkeypatch.setattr("mllama_gguf.temporary.io.FileIO", Counted)
    log = ErrorLog(tmp_path / "errors.jsonl")
    entry = {"image": "a", "error": "ImageError", "message": "x" * 1000}
    line = json.dumps(entry).encode() + b"\n"
    log.path.write_bytes(line * 5000 + line[:-9])
    log.add(entry)
    assert log.path.read_bytes() == line * 5001
    assert [len(data) for data in read] == [1 << 20]
