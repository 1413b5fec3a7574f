"""The page of a batch, whatever the captions and the names are. tests/page shows it to a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import noisy_image
from PIL import Image

from mllama_gguf.batch.records import Csv, Jsonl, Record
from mllama_gguf.cli.main import run
from mllama_gguf.gallery import page as pages
from mllama_gguf.gallery.entries import common_folder
from mllama_gguf.vision.preprocess import preprocess_image
from mllama_gguf.vision.thumbnail import thumbnail

Captured = pytest.CaptureFixture[str]


@dataclass
class Parsed(HTMLParser):
    """A page as a parser sees it: blocks of script, the style sheet, the policy, the rest."""

    scripts: list[tuple[dict[str, str | None], str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str | None]] = field(default_factory=list)
    policy: str = ""
    title: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            about, text = self.scripts[-1]
            self.scripts[-1] = (about, text + data)
        elif self.tags[-1:] == ["style"]:
            self.styles.append(data)
        elif self.tags[-1:] == ["title"]:
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    @property
    def entries(self) -> list[dict[str, Any]]:
        (text,) = [text for about, text in self.scripts if about.get("id") == "entries"]
        found: list[dict[str, Any]] = json.loads(text)
        return found

    def image(self, number: int) -> Image.Image | None:
        block = f"images-{number // pages.BLOCK}"
        (text,) = [text for about, text in self.scripts if about.get("id") == block]
        line = text.split("\n")[number % pages.BLOCK]
        return Image.open(io.BytesIO(base64.b64decode(line, validate=True))) if line else None


def parsed(path: str | Path) -> Parsed:
    data = Path(path).read_bytes()
    assert data.startswith(pages.BEGINS)
    found = Parsed()
    found.feed(data.decode("utf-8"))
    found.close()
    return found


def batch(
    records: list[Record], path: str = "captions.jsonl", failures: dict[str, str] | None = None
) -> None:
    form = Csv() if path.endswith(".csv") else Jsonl()
    Path(path).write_bytes(form.head + b"".join(form.line(record) for record in records))
    lines = [
        json.dumps({"image": image, "error": "ImageError", "message": words})
        for image, words in (failures or {}).items()
    ]
    if lines:
        Path(path).with_name("errors.jsonl").write_text("\n".join(lines) + "\n")


def gallery(*args: str) -> Parsed:
    assert run(["gallery", *args, "-o", "index.html", "--overwrite"]) == 0
    return parsed("index.html")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["captions.jsonl", "captions.csv", "captions"])
def test_what_a_page_shows(here: Path, path: str, capsys: Captured) -> None:
    os.mkdir("photos")
    Image.fromarray(noisy_image(1, 300, 500)).save("photos/a.png")
    Image.fromarray(noisy_image(2, 40, 30)).save("photos/b.jpg")
    Path("photos/bad.jpg").write_bytes(b"\xff\xd8 no")
    batch(
        [
            Record("photos/a.png", "an old caption", "stop", 3, ""),
            Record("photos/b.jpg", "cut", "length", 1, "", "photos/a.png"),
            Record("photos/gone.png", "still known", "stop", 1, ""),
            Record("photos/a.png", "a caption", "stop", 2, ""),
        ],
        path,
        {"photos/bad.jpg": "photos/bad.jpg: corrupt", "photos/a.png": "photos/a.png: an old failure"},
    )
    page = gallery(path, "--thumbnail", "100")
    assert page.entries == [
        {"name": "a.png", "caption": "a caption"},
        {"name": "b.jpg", "caption": "cut", "cut": True, "same": "a.png"},
        {"name": "gone.png", "caption": "still known", "unseen": "missing"},
        {"name": "bad.jpg", "caption": "", "error": "corrupt", "unseen": page.entries[3]["unseen"]},
    ]
    assert "not an image" in page.entries[3]["unseen"] or "corrupt" in page.entries[3]["unseen"]
    assert [image and image.size for image in map(page.image, range(4))] == [(100, 60), (30, 40), None, None]
    assert page.title == Path(path).stem
    assert "index.html: 4 images, 2 of them missing or not readable" in capsys.readouterr().err


def test_nothing_of_others_is_run_or_leads_away(here: Path) -> None:
    """Captions, names, failures and titles that end a script, a tag, a line or a text."""
    hostile = (
        "</script><script>alert(1)</script>", "<!--<script>", "]]>--><img src=x onerror=alert(1)>",
        "\"'`&amp;&#60;", "a\u2028b\u2029c", "\ud800\udcff\x00\x1b[31m", "two\nlines\r\ttab",
        "javascript:alert(1)", "\u202egpj.exe", "{{data}}\n{{script}}", "{{title}}",
    )  # fmt: skip
    names = [f"{number} {text}".replace("\0", "") for number, text in enumerate(hostile)]
    entries = dict(zip(names, hostile, strict=True))
    records = [Record(name, text, "stop", 1, "", name) for name, text in entries.items()]
    plain = gallery_of([Record("a", "b", "stop", 1, "")], {}, "captions")
    page = gallery_of(
        records, {f"failed {name}": text for name, text in entries.items()}, hostile[0] + "{{data}}\n"
    )
    assert page.tags == plain.tags  # the same elements: no text became one
    assert page.title == hostile[0] + "{{data}}\\n"
    assert [one["caption"] for one in page.entries[:5]] == [*hostile[:4], "a\\u2028b\\u2029c"]
    assert [one["error"] for one in page.entries[len(names) :]][:4] == list(hostile[:4])
    for one in page.entries:
        assert all(c.isprintable() or c in "\n\t" for value in one.values() for c in str(value))
        assert one["unseen"] == "missing" and "link" not in one
    # Only our script and our style sheet run, and nothing leads elsewhere.
    (script,) = [text for about, text in page.scripts if not about]
    assert {about.get("type") for about, _ in page.scripts} == {None, "application/json", "text/plain"}
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, *page.styles)
    ]
    assert page.policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[1]}'; "
        f"script-src 'sha256-{digests[0]}'; base-uri 'none'; form-action 'none'"
    )
    assert script == (pages.PARTS / "gallery.js").read_text("utf-8").strip()
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name != "style", (tag, name)
        if name in ("src", "href"):
            assert value is not None and value.startswith(("#", "data:image/svg+xml;base64,")), (tag, value)


@pytest.mark.parametrize("named", ["links/l.jsonl", "real/c.jsonl"])
def test_failures_of_an_output_that_is_a_link(here: Path, named: str) -> None:
    os.mkdir("links")
    os.mkdir("real")
    Path("links/l.jsonl").symlink_to("../real/c.jsonl")
    Image.fromarray(noisy_image(1, 20, 20)).save("a.png")
    assert run(["caption", "a.png", "gone.png", "--out", named, "-n", "2", "-m", "demo"]) == 3
    page = gallery("links/l.jsonl")
    assert [bool(one.get("error")) for one in page.entries] == [False, True]


def gallery_of(records: list[Record], failures: dict[str, str], title: str) -> Parsed:
    batch(records, failures=failures)
    return gallery("captions.jsonl", "--title", title)


def test_names_that_are_no_text(here: Path) -> None:
    """A name of bytes that are not UTF-8, and a name with quotes and line ends, are found and linked."""
    odd = [os.fsdecode(b"caf\xe9.png"), "a\n\"b'.png", "ein#100%?.png", "~home.png"]
    for name in odd:
        Image.fromarray(noisy_image(3, 20, 20)).save(name)
    batch([Record(name, "x", "stop", 1, "") for name in odd])
    page = gallery("captions.jsonl", "--links")
    assert [one["name"] for one in page.entries] == [
        "caf\\udce9.png",
        "a\\n\"b'.png",
        "ein#100%?.png",
        "~home.png",
    ]
    assert [one["link"] for one in page.entries] == [
        "./caf%E9.png", "./a%0A%22b%27.png", "./ein%23100%25%3F.png", "./~home.png",
    ]  # fmt: skip
    assert all(page.image(number) for number in range(4))


def test_images_are_upright_and_tell_nothing_else(here: Path) -> None:
    """As the model sees them: orientation, transparency, colour model. No place, no comment, no profile."""
    array = np.zeros((60, 80, 3), np.uint8)
    array[:30, :40] = (250, 10, 10)  # a red corner
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif.get_ifd(0x8825)[1] = "N"
        Image.fromarray(array).save(f"{orientation}.jpg", exif=exif, comment=b"secret", quality=95)
        small = Image.open(io.BytesIO(thumbnail(Path(f"{orientation}.jpg"), 40)))
        (whole,) = [preprocess_image(f"{orientation}.jpg", tile_size=80, max_tiles=1)]
        assert small.size == ((40, 30) if orientation < 5 else (30, 40))
        seen = np.asarray(
            whole.tile_picture(0).crop((0, 0, *whole.resized_size)).resize(small.size), np.int16
        )
        assert np.abs(np.asarray(small, np.int16) - seen).mean() < 8
        assert not small.getexif() and "comment" not in small.info and "icc_profile" not in small.info
    Image.new("RGBA", (900, 30), (0, 0, 0, 0)).save("clear.png")
    clear = Image.open(io.BytesIO(thumbnail(Path("clear.png"), 64)))
    assert clear.size == (64, 2) and np.asarray(clear).min() > 250
    Image.new("CMYK", (1200, 1000), (0, 255, 255, 0)).save("print.jpg")
    red = np.asarray(Image.open(io.BytesIO(thumbnail(Path("print.jpg"), 64))).convert("RGB"), np.int16)
    assert np.abs(red - np.array([255, 0, 0])).max() < 12
    whole_file = Path("1.jpg").read_bytes()
    Path("cut.jpg").write_bytes(whole_file[: len(whole_file) - 200])
    assert Image.open(io.BytesIO(thumbnail(Path("cut.jpg"), 40))).size == (40, 30)


def test_a_folder_with_caption_files(here: Path) -> None:
    os.makedirs("photos/more")
    for name in ("photos/2.png", "photos/10.png", "photos/more/3.png"):
        Image.fromarray(noisy_image(1, 20, 20)).save(name)
    Path("photos/2.txt").write_text("two\n")
    Path("photos/more/3.txt").write_text("three\n")
    Path("photos/10.png.txt").write_text("ten\n")
    assert gallery("photos").entries == [
        {"name": "2.png", "caption": "two"},
        {"name": "10.png", "caption": ""},
    ]
    found = gallery("photos", "--recursive", "--sidecar-full-name").entries
    assert [(one["name"], one["caption"]) for one in found] == [
        ("2.png", ""), ("10.png", "ten"), (os.path.join("more", "3.png"), "")
    ]  # fmt: skip


def test_many_images_and_blocks(here: Path) -> None:
    """More images than one block holds, in their order, and images of the folder of the captions."""
    os.makedirs("a/photos")
    names = [f"photos/{number}.png" for number in range(2 * pages.BLOCK + 1)]
    for number, name in enumerate(names):
        Image.new("RGB", (2 + number, 2)).save(f"a/{name}")
    batch([Record(name, "x", "stop", 1, "") for name in names], "a/captions.jsonl")
    page = gallery("a/captions.jsonl")
    assert [one["name"] for one in page.entries] == [os.path.basename(name) for name in names]
    assert [page.image(n).size[0] for n in range(len(names))] == list(range(2, 2 + len(names)))  # type: ignore
    assert len([about for about, _ in page.scripts if about.get("type") == "text/plain"]) == 3


def test_folders_are_not_told(here: Path) -> None:
    """Not in names, nor in the words of failures or about images that cannot be shown."""
    home = str(here / "photos")
    os.makedirs("photos/a")
    os.makedirs("photos/caf\u00e9 \x1b")
    bad = [f"{home}/a/1.png", f"{home}/caf\u00e9 \x1b/2.png", f"{home}//a/./3.png"]
    for name in bad:
        Path(name).write_bytes(b"\x89PNG no image at all")
    batch(
        [Record(bad[0], "x", "stop", 1, "", bad[1])],
        failures={bad[1]: f"would share {home}/a/x", bad[2]: "no"},
    )
    page = gallery("captions.jsonl")
    assert [one["name"] for one in page.entries] == ["a/1.png", "caf\u00e9 \\x1b/2.png", "a/3.png"]
    assert page.entries[1]["error"] == "would share a/x"
    assert str(here) not in Path("index.html").read_text("utf-8")
    assert common_folder(["/home/me/a/1.png", "/home/me/b/2.png"]) == "/home/me/"
    assert common_folder(["/home/me/a/1.png"]) == "/home/me/a/"
    assert common_folder(["/1.png"]) == "/"
    for none in (["1.png", "a/2.png"], ["/x/1.png", "2.png"], []):
        assert common_folder(none) == ""


BAD = {
    "nothing.jsonl": b"", "half.jsonl": b'{"image": "a', "other.json": b'{"mine": true}\n',
    "list.txt": b"a.png\n", "deep.jsonl": b'{"image": ' + b"[" * 100_000, "binary.csv": bytes(range(256)),
    "number.jsonl": b'{"image": 3, "caption": "x", "finish_reason": "stop", "tokens": 1, "sha256": ""}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_batch(here: Path, name: str, capsys: Captured) -> None:
    Path(name).write_bytes(BAD[name])
    assert run(["gallery", name, "-o", "index.html"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"Error: {name}: ") and err.count("\n") == 1 and "unexpected" not in err
    assert os.listdir() == [name]


def test_sources_that_are_no_file(here: Path, capsys: Captured) -> None:
    os.mkfifo("fifo.jsonl")
    os.mkdir("empty")
    for source in ("none.jsonl", "fifo.jsonl", "/dev/null", "empty", "", "x" * 300):
        assert run(["gallery", source, "-o", "index.html"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("Error: ") and err.count("\n") == 1 and "unexpected" not in err
    assert sorted(os.listdir()) == ["empty", "fifo.jsonl"]


def test_a_failure_leaves_the_old_page(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    batch([Record("a.png", "x", "stop", 1, "")])
    gallery("captions.jsonl")
    old = Path("index.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages, "_write_block", full)
    assert run(["gallery", "captions.jsonl", "-o", "index.html", "--overwrite"]) == 1
    assert "index.html: the disk is full" in capsys.readouterr().err
    assert Path("index.html").read_bytes() == old
    assert sorted(os.listdir()) == ["captions.jsonl", "index.html"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c.jsonl", b'{"image":"a.png","caption":"one"}\n\n{"caption":"two","image":"b.png","more":[1]}'),
        ("c.jsonl", b'\xef\xbb\xbf{"image":"a.png","caption":"one"}\r\n{"image":"b.png","caption":"two"}\n'),
        ("c.csv", b'caption,image\none,a.png\n"two",b.png\n'),
        ("c", b'{"image":"a.png","caption":"one","tokens":null}\n{"image":"b.png","caption":"two"}\n{"ima'),
    ],
)  # fmt: skip
def test_captions_that_went_through_another_program(here: Path, name: str, data: bytes) -> None:
    Path(name).write_bytes(data)
    shown = [(one["name"], one["caption"]) for one in gallery(name).entries]
    assert shown == [("a.png", "one"), ("b.png", "two")]


NO_CAPTIONS = [
    *(b'{"text": "x"}\n', b'{"image": 5, "caption": "x"}\n', b"[1]\n[2]\n", b"a,b\n1,2\n"),
    *(b"\x89PNG\r\n\x1a\n\0\0,\n", b'{"image":\n'),
]


@pytest.mark.parametrize("data", NO_CAPTIONS)
def test_files_without_captions(here: Path, data: bytes, capsys: Captured) -> None:
    Path("c.jsonl").write_bytes(data)
    assert run(["gallery", "c.jsonl", "-o", "index.html"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: c.jsonl: ") and err.count("\n") == 1 and "captions" in err
