"""The same output once more: other settings, changed images, empty and cut captions, captions to add to."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllama_gguf.batch.records import Record
from mllama_gguf.batch.settings import SettingsFile
from mllama_gguf.batch.sidecars import SidecarLog, Sidecars
from mllama_gguf.cli.main import run
from mllama_gguf.store.resolve import BUNDLED

Captured = pytest.CaptureFixture[str]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.png and b.png, in the current folder."""
    monkeypatch.chdir(tmp_path)
    images = sorted(EXAMPLES.glob("*.png"))
    shutil.copy(EXAMPLES / "apple.png", "a.png")
    shutil.copy(next(p for p in images if p.name != "apple.png"), "b.png")
    return tmp_path


def captions(path: str) -> dict[str, str]:
    """Captions of a file by image; each image once."""
    text = Path(path).read_text("utf-8")
    if path.endswith(".csv"):
        rows: list[Any] = list(csv.DictReader(text.splitlines()))
    else:
        rows = [json.loads(line) for line in text.splitlines()]
    found = {row["image"]: row["caption"] for row in rows}
    assert len(found) == len(rows)
    return found


def caption(*args: str) -> int:
    return run(["caption", "a.png", "b.png", *args])


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [["--out", "c.jsonl"], ["--out", "c.csv"], ["--sidecar", ".txt"]])
@pytest.mark.parametrize(
    ("others", "words"),
    [
        (["-p", "What is it?"], "another prompt ('Describe this image.', not 'What is it?')"),
        (["--prefix", "x "], "another prefix ('', not 'x ')"),
        (["--suffix", "!"], "another suffix"),
        (["--system", "Be short."], "another system message (None, not 'Be short.')"),
        (["--begin", "a"], "another --begin"),
        (["--regex", "[a-z ]+"], "another schema or other form"),
    ],
)
def test_other_settings_are_refused(out: list[str], others: list[str], words: str, capsys: Captured) -> None:
    assert run(["caption", "a.png", *out]) == 0
    before = {p.name: p.read_bytes() for p in Path().iterdir()}
    capsys.readouterr()
    assert caption(*out, *others) == 1
    said = capsys.readouterr().err
    assert words in said and said.startswith("Error: ") and said.count("\n") == 1
    assert "--overwrite makes all once more, --any-settings mixes them" in said
    assert {p.name: p.read_bytes() for p in Path().iterdir()} == before
    assert caption(*out, *others, "--any-settings") == 0
    assert "1 captioned, 1 done before" in capsys.readouterr().err
    assert caption(*out, *others) == 0  # the settings of the last run count
    assert caption(*out, *others, "--overwrite") == 0
    assert caption(*out) == 1


def test_another_model_is_refused(capsys: Captured) -> None:
    shutil.copy(BUNDLED["demo"], "other.gguf")
    data = bytearray(Path("other.gguf").read_bytes())
    assert caption("--out", "c.jsonl", "-m", "other.gguf") == 0
    assert caption("--out", "c.jsonl") == 0  # the same weights
    Path("other.gguf").rename("moved.gguf")
    assert caption("--out", "c.jsonl", "-m", "moved.gguf") == 0
    data[-5:] = b"other"
    Path("moved.gguf").write_bytes(data)
    capsys.readouterr()
    assert caption("--out", "c.jsonl", "-m", "moved.gguf") == 1
    assert "made with another model; give the same" in capsys.readouterr().err


def test_smaller_settings_are_only_said(capsys: Captured) -> None:
    assert run(["caption", "a.png", "--out", "c.jsonl"]) == 0
    capsys.readouterr()
    more = ["-n", "7", "--temp", "0", "--top-k", "9", "--max-tiles", "1"]
    assert caption("--out", "c.jsonl", *more) == 0
    said = capsys.readouterr().err
    words = "captions there were made with other --max-tokens, temperature, sampling options, --max-tiles"
    assert f"Note: c.jsonl: {words}\n" in said


def test_a_run_that_was_killed_is_compared_too(capsys: Captured) -> None:
    """The settings are there before the first caption."""
    assert run(["caption", "a.png", "missing.png", "--out", "c.jsonl"]) == 3
    assert caption("--out", "c.jsonl", "-p", "What?") == 1
    Path("c.jsonl").unlink()  # another beginning
    assert caption("--out", "c.jsonl", "-p", "What?") == 0


def test_outputs_without_settings_go_on(capsys: Captured) -> None:
    assert run(["caption", "a.png", "--out", "c.jsonl"]) == 0
    Path(".c.jsonl.mllama.json").unlink()
    capsys.readouterr()
    assert caption("--out", "c.jsonl", "-p", "What?") == 0
    words = "the settings of the captions there are not known"
    assert f"Note: c.jsonl: {words}\n" in capsys.readouterr().err
    assert caption("--out", "c.jsonl") == 1


def test_schemas_that_begin_alike_are_not_shown(capsys: Captured) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"what": {"enum": ["a", "b"]}},
        "required": ["what"],
    }
    for name, values in (("a.json", ["a", "b"]), ("b.json", ["a", "c"])):
        schema["properties"]["what"]["enum"] = values
        Path(name).write_text(json.dumps(schema))
    assert caption("--out", "c.jsonl", "--json-schema", "a.json") == 0
    capsys.readouterr()
    assert caption("--out", "c.jsonl", "--json-schema", "b.json") == 1
    assert "made with another schema or other form; give the same" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"is": "mine"}', b"[" * 100_000, b"\xff"])
def test_a_file_of_others_in_the_place_of_settings(data: bytes, capsys: Captured) -> None:
    Path(".c.jsonl.mllama.json").write_bytes(data)
    assert caption("--out", "c.jsonl") == 1
    said = capsys.readouterr().err
    assert "is something else; move it away" in said and said.count("\n") == 1
    assert Path(".c.jsonl.mllama.json").read_bytes() == data


def test_long_names_keep_settings(capsys: Captured) -> None:
    name = "x" * 240 + ".jsonl"
    assert caption("--out", name) == 0
    assert caption("--out", name, "-p", "What?") == 1
    assert SettingsFile.beside(Path(), name).path.exists()


# ---- changed images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["c.jsonl", "c.csv"])
def test_a_changed_image_is_done_again(out: str, capsys: Captured) -> None:
    assert caption("--out", out) == 0
    old = captions(out)
    assert caption("--out", out) == 0
    assert "0 captioned, 2 done before" in capsys.readouterr().err
    shutil.copy("b.png", "new.png")
    os.utime("new.png", (1, 1))  # as old as can be
    Path("new.png").rename("a.png")
    assert caption("--out", out) == 0
    assert "1 done before, 1 of them again" in capsys.readouterr().err
    assert captions(out) == {"a.png": old["b.png"], "b.png": old["b.png"]}
    assert list(captions(out)) in (["a.png", "b.png"], ["b.png", "a.png"])
    assert caption("--out", out) == 0
    assert "0 captioned, 2 done before" in capsys.readouterr().err


def test_an_image_that_was_only_touched(capsys: Captured) -> None:
    assert caption("--out", "c.jsonl") == 0
    before = Path("c.jsonl").read_bytes()
    os.utime("a.png")
    assert caption("--out", "c.jsonl") == 0
    assert "0 captioned, 2 done before" in capsys.readouterr().err
    assert Path("c.jsonl").read_bytes() == before


def test_a_change_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a run about other images nor by one in which it fails."""
    monkeypatch.setattr("mllama_gguf.batch.contents.CLOCK_SECONDS", 0.0)
    assert caption("--out", "c.jsonl") == 0
    Image.new("RGB", (50, 50), "blue").save("a.png")
    assert run(["caption", "b.png", "--out", "c.jsonl"]) == 0
    assert caption("--out", "c.jsonl", "--max-pixels", "99") == 3
    assert captions("c.jsonl")["a.png"] == "a red apple"
    assert caption("--out", "c.jsonl") == 0
    assert captions("c.jsonl")["a.png"] != "a red apple"


def test_a_change_is_not_forgotten_beside_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllama_gguf.batch.contents.CLOCK_SECONDS", 0.0)
    assert caption("--sidecar", ".txt") == 0
    before = Path("a.txt").read_text()
    Image.new("RGB", (50, 50), "blue").save("a.png")
    assert run(["caption", "b.png", "--sidecar", ".txt"]) == 0
    assert caption("--sidecar", ".txt") == 0
    assert Path("a.txt").read_text() != before


def test_an_image_that_is_gone_keeps_its_caption(capsys: Captured) -> None:
    assert caption("--out", "c.jsonl") == 0
    Path("a.png").unlink()
    assert caption("--out", "c.jsonl") == 0
    assert captions("c.jsonl")["a.png"] == "a red apple"


@pytest.mark.parametrize("suffix", [".txt", ".xmp"])
def test_a_changed_image_and_its_sidecar(suffix: str, capsys: Captured) -> None:
    assert caption("--sidecar", suffix) == 0
    a, b = Path(f"a{suffix}"), Path(f"b{suffix}")
    assert a.read_bytes() != b.read_bytes()
    shutil.copy("b.png", "a.png")
    assert caption("--sidecar", suffix) == 0
    assert "1 of them again" in capsys.readouterr().err
    assert a.read_bytes() == b.read_bytes()


def test_a_caption_that_was_edited_stays() -> None:
    assert caption("--sidecar", ".txt") == 0
    Path("a.txt").write_text("edited\n")
    shutil.copy("b.png", "a.png")
    assert caption("--sidecar", ".txt") == 0
    assert Path("a.txt").read_text() == "edited\n"


# ---- empty and cut captions --------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\n", b" \t\r\n"])
def test_an_empty_caption_file_is_done_again(data: bytes) -> None:
    Path("a.txt").write_bytes(data)
    assert caption("--sidecar", ".txt") == 0
    assert Path("a.txt").read_text() == "a red apple\n"


@pytest.mark.parametrize("out", ["c.jsonl", "c.csv", ".txt"])
def test_redo_of_cut_captions(out: str, capsys: Captured) -> None:
    target = ["--sidecar", out] if out == ".txt" else ["--out", out]
    assert caption(*target, "-n", "2") == 0
    assert caption(*target) == 0  # they count as done
    assert "0 captioned, 2 done before" in capsys.readouterr().err
    assert caption(*target, "--redo", "length", "--redo", "failed") == 0
    assert "2 captioned, 2 of them again" in capsys.readouterr().err
    found = Path("a.txt").read_text().strip() if out == ".txt" else captions(out)["a.png"]
    assert found == "a red apple"
    assert caption(*target, "--redo", "length") == 0
    assert "0 captioned, 2 done before" in capsys.readouterr().err


def test_redo_of_empty_captions() -> None:
    assert caption("--out", "c.jsonl", "--stop", "a red") == 0
    assert captions("c.jsonl")["a.png"] == ""
    assert caption("--out", "c.jsonl", "--redo", "empty") == 0
    assert captions("c.jsonl")["a.png"] == "a red apple"


@pytest.mark.parametrize(
    "args",
    [
        ["--redo", "length", "--overwrite", "--out", "c.jsonl"],
        ["--redo", "nothing", "--out", "c.jsonl"],
        ["--redo", "length"],
        ["--existing", "append"],
        ["--any-settings"],
        ["--overwrite", "--existing", "append", "--out", "c.jsonl"],
        ["--sidecar-full-name", "--out", "c.jsonl"],
        ["--separator", ", "],
        ["--separator", ", ", "--out", "c.jsonl"],
        ["--separator", ", ", "--out", "c.jsonl", "--overwrite"],
    ],
)
def test_usage(args: list[str], capsys: Captured) -> None:
    assert caption(*args) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and said.count("\n") == 1


# ---- captions that exist -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("skip", "old"),
        ("overwrite", "a red apple"),
        ("append", "old, a red apple"),
        ("prepend", "a red apple, old"),
    ],
)
def test_existing_sidecars(how: str, expected: str) -> None:
    Path("a.txt").write_text("old\n")
    assert caption("--sidecar", ".txt", "--existing", how, "--separator", ", ") == 0
    assert Path("a.txt").read_text() == f"{expected}\n"
    assert len(Path("b.txt").read_text().splitlines()) == 1
    assert not list(Path().glob("*.partial*"))


@pytest.mark.parametrize("out", ["c.jsonl", "c.csv"])
@pytest.mark.parametrize(
    ("how", "expected"), [("append", "x a red apple\na red apple"), ("prepend", "a red apple\nx a red apple")]
)
def test_existing_in_one_file(out: str, how: str, expected: str, capsys: Captured) -> None:
    assert run(["caption", "a.png", "--out", out, "--prefix", "x "]) == 0
    shutil.copy("a.png", "twin.png")
    assert run(["caption", "a.png", "twin.png", "--out", out, "--existing", how]) == 0
    text = Path(out).read_text()
    if out == "c.csv":
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
    else:
        rows = [json.loads(line) for line in text.splitlines()]
    assert {row["image"]: row["caption"] for row in rows} == {"a.png": expected, "twin.png": "a red apple"}
    assert run(["caption", "b.png", "--out", out]) == 0
    assert len(captions(out) if out != "c.csv" else rows) >= 2


def test_a_killed_run_adds_once(tmp_path: Path) -> None:
    """The journal of a killed run has the old captions too."""
    Path("a.txt").write_text("old\n")
    journal = tmp_path / ".journal.jsonl"
    record = Record("a.png", "new", "stop", 1, "00")
    first = Sidecars(".txt", ["a.png", "b.png"], journal, how="append", separator="+")
    assert list(first.records()) == []
    first.write(record)
    first.close()  # killed
    assert Path("a.txt").read_text() == "old+new\n"
    second = Sidecars(".txt", ["a.png", "b.png"], journal, how="append", separator="+")
    assert list(second.records()) == [record]  # as a twin would get it
    assert Path("a.txt").read_text() == "old+new\n"
    second.write(Record("b.png", "other", "stop", 1, "01"))
    second.finish()
    assert (Path("a.txt").read_text(), Path("b.txt").read_text()) == ("old+new\n", "other\n")
    assert not journal.exists()


def test_json_is_not_added_to(capsys: Captured) -> None:
    Path("s.json").write_text('{"type": "object"}')
    for out in (["--out", "c.jsonl"], ["--sidecar", ".txt"]):
        assert caption(*out, "--json-schema", "s.json", "--existing", "append") == 1
        assert "text before or after JSON would make it invalid" in capsys.readouterr().err


# ---- names -------------------------------------------------------------------------------------------------


def test_images_that_share_a_caption_file(capsys: Captured) -> None:
    shutil.copy("a.png", "a.jpg")
    assert run(["caption", "a.png", "a.jpg", "b.png", "--sidecar", ".txt"]) == 3
    said = capsys.readouterr().err
    assert "a.png: would share a.txt with a.jpg; use --sidecar-full-name" in said
    assert "1 captioned" in said and "2 failed" in said
    assert Path("b.txt").exists() and not Path("a.txt").exists()
    assert run(["caption", "a.png", "a.jpg", "b.png", "--sidecar", ".txt", "--sidecar-full-name"]) == 0
    for name in ("a.png.txt", "a.jpg.txt", "b.png.txt"):
        assert Path(name).read_text().strip()
    assert not Path("errors.jsonl").exists()
    named = sorted(str(p) for p in Path().iterdir() if not p.name.startswith("."))
    assert run(["caption", *named, "--sidecar", ".txt", "--sidecar-full-name", "--limit", "3"]) in (0, 1)


def test_several_runs_add_to_one_log(tmp_path: Path) -> None:
    log = SidecarLog(tmp_path / "log.jsonl")
    for image, text in (("a.png", "1"), ("b.png", "2"), ("a.png", "3")):
        log.add(Record(str(tmp_path / image), text, "stop", 1, "00"))
    assert {Path(path).name: r.caption for path, r in log.read().items()} == {"a.png": "3", "b.png": "2"}
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"image": "torn')
    log.add(Record(str(tmp_path / "c.png"), "4", "stop", 1, "00"))
    assert len(log.read()) == 3
    log.tidy()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert SidecarLog(tmp_path / "none").read() == {}
    SidecarLog(tmp_path / "no folder" / "log").add(Record("a", "b", "stop", 1, ""))
