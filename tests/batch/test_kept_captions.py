"""No caption is lost: of images that fail, of other images, of damaged files, and what somebody edited."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import noisy_image
from PIL import Image

from mllama_gguf import RequestError
from mllama_gguf.batch.outputs import RecordFile
from mllama_gguf.batch.records import Csv, Jsonl, Record, read_records
from mllama_gguf.batch.settings import SettingsFile
from mllama_gguf.cli.main import run

Captured = pytest.CaptureFixture[str]
SUFFIXES = ["c.jsonl", "c.csv"]


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        Image.fromarray(noisy_image(ord(name))).save(f"{name}.png")
    return tmp_path


def caption(*args: str, images: str = "abcd") -> int:
    return run(["caption", *(f"{name}.png" for name in images), "-n", "5", *args])


def captions(path: str) -> dict[str, str]:
    return {image[0]: record.caption for image, record in read_records(path).items()}


def interrupted(after: int, *args: str) -> None:
    """A run that Ctrl-C ends when it has made so many captions."""
    from mllama_gguf.batch.together import make

    calls = 0

    def making(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return make(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllama_gguf.batch.run.make", making)
        assert caption(*args) == 130


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text("utf-8")
    assert old in text
    Path(path).write_text(text.replace(old, new, 1), "utf-8")


# ---- damaged files -----------------------------------------------------------------------------------------

ROWS = [
    Record("a.png", "a cat", "stop", 3, "00"),
    Record("b.png", 'two, "lines"\nof it', "stop", 3, "01"),
    Record("c.png", "three, or", "stop", 3, "02"),
    Record("d.png", "four", "stop", 3, "03", "a.png"),
]


@pytest.mark.parametrize("how", [[], ["--existing", "append"], ["--overwrite"]])
def test_a_stray_quote_takes_no_rows(how: list[str], capsys: Captured) -> None:
    """At whatever place: at most the last row is lost, as one that a kill cut."""
    lines = [Csv().line(record) for record in ROWS]
    whole = Csv.head + b"".join(lines)
    path = Path("c.csv")
    for place in range(len(Csv.head), len(whole) - len(lines[-1]) - 1):
        path.write_bytes(damaged := whole[:place] + b'"' + whole[place:])
        try:
            RecordFile(path).close()
        except RequestError as e:
            assert "mend it" in str(e) or "is not a file of captions" in str(e)
            assert path.read_bytes() == damaged
        else:
            assert len(list(read_records(path))) == len(ROWS)
    path.write_bytes(damaged := whole.replace(b",00,\n", b',00,"\n'))
    assert caption("--out", "c.csv", "--limit", "1", *how) == 1
    assert path.read_bytes() == damaged and not list(Path().glob(".*"))
    words = "c.csv: line 4: a quote here or above is not closed, and takes in the rows after it"
    assert f"{words}; mend it, or give another --out\n" in capsys.readouterr().err
    assert run(["gallery", "c.csv", "-o", "page.html"]) == 1
    assert words in capsys.readouterr().err


def test_a_row_of_another_program_needs_no_line_end() -> None:
    Path("c.csv").write_text("image,caption\na.png,one\nb.png,two")
    assert captions("c.csv") == {"a": "one", "b": "two"}
    Path("c.csv").write_text('image,caption\na.png,one"\nb.png,"two\n')
    with pytest.raises(RequestError, match="is not a file of captions"):
        read_records("c.csv")


@pytest.mark.parametrize("end", [b'{"image": "b.png", "caption": "my own words"}', b"my notes", b"[1]", b"1"])
def test_a_last_line_of_others_stays(end: bytes) -> None:
    path = Path("c.jsonl")
    path.write_bytes(data := Jsonl().line(ROWS[0]) + end)
    with pytest.raises(RequestError, match=r"c\.jsonl: line 2: this is not a caption; mend it"):
        RecordFile(path)
    assert path.read_bytes() == data
    for torn in (b'{"image": "b.png", "cap', b'{"im', b"\0\0\0"):
        path.write_bytes(Jsonl().line(ROWS[0]) + torn)
        RecordFile(path).close()
        assert path.read_bytes() == Jsonl().line(ROWS[0])


# ---- captions that are overwritten -------------------------------------------------------------------------


@pytest.mark.parametrize("out", SUFFIXES)
def test_overwrite_keeps_what_it_does_not_replace(out: str) -> None:
    assert caption("--out", out) == 0
    old = captions(out)
    whole = Path(out).read_bytes()
    os.mkdir("away")
    for name in "abcd":
        os.rename(f"{name}.png", f"away/{name}.png")
    assert caption("--out", out, "--overwrite") == 3
    assert Path(out).read_bytes() == whole
    for name in "abcd":
        os.rename(f"away/{name}.png", f"{name}.png")
    Path("b.png").write_bytes(b"broken")
    assert caption("--out", out, "--overwrite", "--prefix", "x ", "--limit", "3") == 3
    assert captions(out) == {"a": f"x {old['a']}", "b": old["b"], "c": f"x {old['c']}", "d": old["d"]}
    assert not list(Path().glob(".*.partial*"))


def test_overwrite_keeps_what_others_added_to_other_records() -> None:
    assert caption("--out", "c.jsonl") == 0
    edit("c.jsonl", '"finish_reason"', '"stars": 5, "finish_reason"')
    for how in ("overwrite", "append"):
        assert caption("--out", "c.jsonl", "--existing", how, images="b") == 0
        assert json.loads(Path("c.jsonl").read_text().splitlines()[0])["stars"] == 5


def test_the_settings_after_overwrite_are_the_new_ones(capsys: Captured) -> None:
    assert caption("--out", "c.jsonl") == 0
    Path("b.png").rename("away.png")
    assert caption("--out", "c.jsonl", "--overwrite", "-p", "What?") == 3
    assert caption("--out", "c.jsonl", "-p", "What?") == 0
    assert caption("--out", "c.jsonl") == 1
    assert "another prompt ('What?'" in capsys.readouterr().err
    before = Path(".c.jsonl.mllama.json").read_bytes()  # nothing was made: the captions are the old ones
    assert caption("--out", "c.jsonl", "--overwrite", images="b") == 3
    assert Path(".c.jsonl.mllama.json").read_bytes() == before


def test_overwrite_does_not_count_as_a_look_at_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllama_gguf.batch.contents.CLOCK_SECONDS", 0.0)
    assert caption("--out", "c.jsonl") == 0
    shutil.copy("a.png", "d.png")
    assert caption("--out", "c.jsonl", "--overwrite", images="a") == 0
    assert caption("--out", "c.jsonl") == 0
    assert read_records("c.jsonl")["d.png"].sha256 == read_records("c.jsonl")["a.png"].sha256
    assert caption("--out", "c.jsonl", "--overwrite") == 0
    kept = SettingsFile(Path(".c.jsonl.mllama.json")).read()
    assert kept is not None and kept.looked > Path("d.png").stat().st_mtime


@pytest.mark.parametrize("how", ["renamed", "link", "links to folders"])
def test_images_that_change_their_folder(how: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """Neither the files nor their times change."""
    monkeypatch.setattr("mllama_gguf.batch.contents.CLOCK_SECONDS", 0.0)
    images = "x.png" if how == "link" else "x/1.png"
    for folder, name in (("one", "a"), ("two", "b")):
        os.makedirs(f"in/{folder}")
        os.rename(f"{name}.png", f"in/{folder}/1.png")
    if how == "renamed":
        os.rename("in/one", "x")
    else:
        os.symlink("in/one/1.png" if how == "link" else "in/one", images.split("/")[0])
    args = ["caption", images, "--out", "c.jsonl", "-n", "5"]
    assert run(args) == run(args) == 0
    assert "1 done before" in capsys.readouterr().err
    before = read_records("c.jsonl")[images]
    os.rename(images.split("/")[0], "away")
    if how == "renamed":
        os.rename("in/two", "x")
    else:
        os.symlink("in/two/1.png" if how == "link" else "in/two", images.split("/")[0])
    assert run(args) == 0
    assert "1 of them again" in capsys.readouterr().err
    assert read_records("c.jsonl")[images].sha256 != before.sha256


# ---- runs that are continued -------------------------------------------------------------------------------


@pytest.mark.parametrize("out", SUFFIXES)
def test_what_was_edited_meanwhile_is_added_to(out: str) -> None:
    assert caption("--out", out) == 0
    old = captions(out)
    append = ["--out", out, "--existing", "append", "--separator", "+"]
    interrupted(2, *append)
    edit(out, old["a"], "by hand")
    assert caption(*append) == 0
    expected = {name: f"{words}+{words}" for name, words in old.items()}
    assert captions(out) == {**expected, "a": f"by hand+{old['a']}"}


@pytest.mark.parametrize("how", ["append", "overwrite"])
def test_a_sidecar_that_was_edited_meanwhile_stays(how: str) -> None:
    assert caption("--sidecar", ".txt") == 0
    old = {name: Path(f"{name}.txt").read_text().strip() for name in "abcd"}
    args = ["--sidecar", ".txt", "--existing", how, "--separator", "+", "--suffix", "!"]
    interrupted(2, *args)
    Path("a.txt").write_text("by hand\n")
    assert caption(*args) == 0
    found = {name: Path(f"{name}.txt").read_text().strip() for name in "abcd"}
    expected = {name: f"{words}+{words}!" if how == "append" else f"{words}!" for name, words in old.items()}
    assert found == {**expected, "a": "by hand"}
    assert caption(*args[:2], "--suffix", "!") == 0  # all is there


def test_an_image_that_changed_meanwhile_is_captioned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the captions of the killed run are there already."""
    assert caption("--sidecar", ".txt") == 0
    assert caption("--out", "c.jsonl") == 0
    old = captions("c.jsonl")
    overwrite = ["--out", "c.jsonl", "--overwrite", "--prefix", "x "]
    append = ["--sidecar", ".txt", "--existing", "append", "--separator", "+"]
    interrupted(2, *overwrite)
    interrupted(2, *append)
    Image.new("RGB", (30, 50), "blue").save("a.png")
    os.utime("a.png", (1, 1))
    assert caption(*overwrite) == 0
    new = captions("c.jsonl")["a"]
    assert new != f"x {old['a']}"
    assert caption(*append) == 0
    assert Path("a.txt").read_text() == f"{old['a']}+{new.removeprefix('x ')}\n"
    assert Path("b.txt").read_text() == f"{old['b']}+{old['b']}\n"


def test_outputs_do_not_remove_each_others_journals() -> None:
    assert caption("--sidecar", ".txt") == 0
    old = Path("a.txt").read_text().strip()
    append = ["--existing", "append", "--separator", "+"]
    interrupted(2, "--sidecar", ".txt", *append)
    assert caption("--sidecar", ".xmp", *append) == 0
    assert caption("--sidecar", ".txt", "--sidecar-full-name", *append) == 0
    assert caption("--sidecar", ".txt", *append) == 0
    assert Path("a.txt").read_text() == f"{old}+{old}\n"


def test_an_output_by_another_name_is_the_same(capsys: Captured) -> None:
    assert caption("--out", "c.jsonl") == 0
    Path("link.jsonl").symlink_to("c.jsonl")
    interrupted(1, "--out", "c.jsonl", "--overwrite")
    interrupted(1, "--out", "./c.jsonl", "--overwrite")
    capsys.readouterr()
    assert caption("--out", "link.jsonl", "--overwrite") == 0
    assert "2 captioned, 2 done before" in capsys.readouterr().err
