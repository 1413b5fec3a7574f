"""Standard streams that are closed or hold something unexpected, and text files from other systems."""

from __future__ import annotations

import codecs
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import elsewhere

from mllama_gguf import RequestError
from mllama_gguf.batch.sources import list_images
from mllama_gguf.cli.main import run
from mllama_gguf.reading import decode_text

EXAMPLES = Path(__file__).parents[2] / "examples"
APPLE = EXAMPLES / "apple.png"
Captured = pytest.CaptureFixture[str]


def shell(command: str, **files: bytes | None) -> subprocess.CompletedProcess[bytes]:
    """Run a line of sh in which $MLLAMA is the command."""
    line = command.replace("$MLLAMA", f"'{sys.executable}' -m mllama_gguf")
    return subprocess.run(["sh", "-c", line], **elsewhere(), capture_output=True, timeout=60, **files)


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    done = shell(f"$MLLAMA caption '{APPLE}' {closed}")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a red apple\n", b"")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", ">&- 2>&-"])
def test_nobody_listens(closed: str, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    done = shell(f"$MLLAMA caption '{APPLE}' --out '{out}' {closed}")
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["caption"] == "a red apple"
    assert shell(f"$MLLAMA caption '{APPLE}' {closed}").returncode == 0
    assert shell(f"$MLLAMA caption missing.png {closed}").returncode == 1


@pytest.mark.parametrize("command", ["--help", f"caption '{APPLE}' --json"])
def test_a_full_disk_is_one_line(command: str) -> None:
    done = shell(f"$MLLAMA {command} > /dev/full")
    words = b"Error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, words)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_messages_on_a_full_disk(unbuffered: str, tmp_path: Path) -> None:
    """They are lost; the work continues, and the exit code is as ever."""
    more = f"PYTHONUNBUFFERED={unbuffered} $MLLAMA"
    out = tmp_path / "captions.jsonl"
    done = shell(f"{more} caption '{APPLE}' missing.png --out '{out}' --json 2> /dev/full")
    assert (done.returncode, json.loads(out.read_text())["caption"]) == (3, "a red apple")
    assert shell(f"{more} caption missing.png 2> /dev/full").returncode == 1


def test_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["caption", str(APPLE)]) == 0
    assert run(["caption", str(APPLE), "--out", "c.jsonl"]) == 1
    assert capsys.readouterr().err == "Error: the current folder is gone; go to another one\n"


def test_closed_standard_input_is_an_empty_one(tmp_path: Path) -> None:
    done = shell("$MLLAMA caption - <&-")
    assert done.returncode == 1 and done.stderr.startswith(b"Error: ") and done.stderr.count(b"\n") == 1
    done = shell(f"$MLLAMA caption - --out '{tmp_path / 'c.jsonl'}' <&-")
    assert done.returncode == 1 and b"no images" in done.stderr


@pytest.mark.parametrize("how", [["--out", "c.jsonl"], ["--sidecar", ".txt"]])
def test_an_image_where_a_list_is_expected(how: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mllama_gguf", "caption", "-", *how],
        **{**elsewhere(), "cwd": tmp_path},
        input=APPLE.read_bytes(),
        capture_output=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: standard input: a list of images is expected, a path on each line")
    assert done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000", "ICO", "PPM"])
def test_images_are_no_lists(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(APPLE) as image:
        image.convert("RGB").save(tmp_path / "list.txt", kind)
    with pytest.raises(RequestError, match=r"list\.txt: a list of images is expected"):
        list_images([str(tmp_path / "list.txt")])


@pytest.mark.parametrize(
    "names",
    [
        ["RIFF/a.png", "GIF8.gif"],
        ["BM.bmp", "II.tif"],
        ["caf\u00e9 \U0001f600.png", "\u732b" * 1400 + ".png"],
        ["a\x1bb.png", "x\x01y.png"],
    ],
)
def test_lists_of_odd_names(names: list[str]) -> None:
    for separator in ("\n", "\0"):
        assert list_images(["-"], stdin=separator.join(names).encode()) == names
    assert list_images(["-"], stdin="\r\n".join(["", *names, ""]).encode()) == names


def test_lists_of_names_that_are_not_utf8() -> None:
    (path,) = list_images(["-"], stdin=b"caf\xe9.png\n")
    assert path == "caf\udce9.png"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_byte_order_marks(encoding: str, tmp_path: Path, capsys: Captured) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_bytes(mark + text.encode(encoding))
        return str(tmp_path / name)

    shutil.copy(APPLE, tmp_path / "\u732b.png")
    listed = write("list.txt", str(tmp_path / "\u732b.png") + "\r\n")
    prompt = write("prompt.txt", "Describe this image.")
    schema = write("schema.json", json.dumps({"type": "object", "properties": {}}))
    assert list_images([listed]) == [str(tmp_path / "\u732b.png")]
    assert decode_text((tmp_path / "prompt.txt").read_bytes()) == "Describe this image."
    out = str(tmp_path / "c.jsonl")
    assert run(["caption", listed, "--prompt-file", prompt, "--out", out]) == 0
    assert json.loads(Path(out).read_text("utf-8"))["caption"] == "a red apple"
    capsys.readouterr()
    assert run(["caption", str(APPLE), "--json-schema", schema, "-n", "5"]) == 0


def test_damaged_text_files_are_one_line(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(codecs.BOM_UTF16_LE + b"a\0b")
    out = str(tmp_path / "c.jsonl")
    for args in ([str(path), "--out", out], [str(APPLE), "--prompt-file", str(path)]):
        assert run(["caption", *args]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"Error: {path}: ") and err.count("\n") == 1
