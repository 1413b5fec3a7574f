"""XMP sidecars: what is written, what of other programs stays, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from mllama_gguf.batch.sidecars import XmpForm
from mllama_gguf.batch.xmp import XmpError, parts_of, read_description, write_description
from mllama_gguf.cli.main import run

Captured = pytest.CaptureFixture[str]
APPLE = Path(__file__).parents[2] / "examples" / "apple.png"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"
LANG = "{http://www.w3.org/XML/1998/namespace}lang"
DARKTABLE = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <!-- a comment -->
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:darktable="http://darktable.sf.net/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
   exif:DateTimeOriginal="2024:01:02"
   darktable:history_end="7">
   <dc:subject>
    <rdf:Bag><rdf:li>mine</rdf:li></rdf:Bag>
   </dc:subject>
   <darktable:history>
    <rdf:Seq><rdf:li darktable:num="0" darktable:operation="exposure" darktable:params="00ff"/></rdf:Seq>
   </darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""


def rdf(data: bytes) -> ET.Element:
    return next(ET.fromstring(data.decode("utf-8")).iter(f"{RDF}RDF"))


def tags(data: bytes) -> list[str | None]:
    return [item.text for item in rdf(data).iterfind(f".//{DC}subject/*/{RDF}li")]


def test_a_new_file() -> None:
    data = write_description(b"", 'a <b> & "c"\r\nd\x00\x1b', ["red", "two words", "red"])
    assert data.startswith(b'<?xml version="1.0" encoding="UTF-8"?>\n<?xpacket begin="\xef\xbb\xbf"')
    assert data.endswith(b'<?xpacket end="w"?>\n')
    (item,) = rdf(data).findall(f"{RDF}Description/{DC}description/{RDF}Alt/{RDF}li")
    assert item.get(LANG) == "x-default" and item.text == 'a <b> & "c"\nd\ufffd\ufffd'
    assert read_description(data) == item.text
    assert tags(data) == ["red", "two words"]
    assert b"<rdf:RDF" in data and b"<dc:description>" in data and b"<x:xmpmeta" in data
    assert b"dc:subject" not in write_description(b"", "x")
    block = rdf(data).find(f"{RDF}Description")
    assert block is not None and block.get(f"{RDF}about") == ""


def test_the_work_of_others_stays() -> None:
    data = write_description(DARKTABLE.encode(), "a red apple", ["red", "mine"])
    assert tags(data) == ["mine", "red"]
    assert read_description(data) == "a red apple"
    for kept in (b"<!-- a comment -->", b'darktable:params="00ff"', b'exif:DateTimeOriginal="2024:01:02"'):
        assert kept in data
    again = write_description(data, "other")
    assert read_description(again) == "other" and tags(again) == ["mine", "red"]
    assert write_description(again, "other") == again


def test_other_languages_stay() -> None:
    old = write_description(b"", "x").replace(
        b'<rdf:li xml:lang="x-default">x</rdf:li>', b'<rdf:li xml:lang="de-DE">ein Apfel</rdf:li>'
    )
    assert read_description(old) == "ein Apfel"
    data = write_description(old, "an apple")
    assert read_description(data) == "an apple" and b"ein Apfel" in data


@pytest.mark.parametrize(
    "old",
    [
        DARKTABLE.encode("utf-16"),
        b"\xef\xbb\xbf" + DARKTABLE.encode(),
        b"<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?>"
        + DARKTABLE.split("\n", 1)[1].encode()
        + b"<?xpacket end='w'?>",
        b'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>',
        b'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:rdf="evil:" xmlns:ns1="x:">'
        b'<rdf:a ns1:b="c"/></r:RDF>',
        b'<RDF xmlns="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><Description/></RDF>',
    ],
)
def test_other_spellings(old: bytes) -> None:
    data = write_description(old, "text", ["tag"])
    assert read_description(data) == "text" and "tag" in tags(data)
    assert b"evil:" not in old or b'"evil:"' in data


BLOCK = (
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:dc="http://purl.org/dc/elements/1.1/" %s>%s</rdf:Description></rdf:RDF>'
)


@pytest.mark.parametrize(
    ("attributes", "inside", "expected"),
    [
        ('dc:subject="old"', "", ["old", "new"]),
        ("", "<dc:subject> old </dc:subject>", ["old", "new"]),
        ("", "<dc:subject><rdf:Alt><rdf:li>old</rdf:li></rdf:Alt></dc:subject>", ["old", "new"]),
        ("", "<dc:subject/>", ["new"]),
        ('dc:subject="new"', "", ["new"]),
    ],
)
def test_tags_that_are_no_list_stay(attributes: str, inside: str, expected: list[str]) -> None:
    data = write_description((BLOCK % (attributes, inside)).encode(), "text", ["new"])
    assert tags(data) == expected
    assert write_description(data, "text", ["new"]) == data


@pytest.mark.parametrize("kind", ["Bag", "Seq", "Alt"])
def test_a_description_in_another_list(kind: str) -> None:
    """It is found, and replaced rather than put beside the new one."""
    inside = f"<dc:description><rdf:{kind}><rdf:li>old</rdf:li></rdf:{kind}></dc:description>"
    old = (BLOCK % ("", inside)).encode()
    assert read_description(old) == "old"
    data = write_description(old, "new")
    assert read_description(data) == "new" and b"old" not in data and b"Alt>" in data


def test_a_description_of_a_form_that_is_not_known_stays() -> None:
    inside = '<dc:description rdf:parseType="Resource"><rdf:value>old</rdf:value></dc:description>'
    with pytest.raises(XmpError, match="its description is of a form that is not known"):
        write_description((BLOCK % ("", inside)).encode(), "new")


@pytest.mark.parametrize(
    ("attributes", "inside", "expected"),
    [
        ('dc:description="my words"', "", "my words"),
        (
            "",
            "<dc:description><rdf:Alt><rdf:li><!-- c -->my<?p i?> words</rdf:li></rdf:Alt></dc:description>",
            "my words",
        ),
        ("", "<dc:description><!-- c -->my words</dc:description>", "my words"),
        ("", "<dc:description><rdf:Alt><rdf:li> </rdf:li></rdf:Alt></dc:description>", ""),
    ],
)
def test_a_description_is_found_wherever_it_is(attributes: str, inside: str, expected: str) -> None:
    """In the second block, as an attribute, beside comments."""
    first = '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="3"/>'
    old = (BLOCK % (attributes, inside)).replace("<rdf:Description", f"{first}<rdf:Description", 1).encode()
    assert read_description(old) == expected
    data = write_description(old, "new")
    assert read_description(data) == "new" and b"my" not in data and b"words" not in data
    assert b'xmp:Rating="3"' in data and write_description(data, "new") == data


def test_elements_in_a_description_stay() -> None:
    inside = "<dc:description><rdf:Alt><rdf:li><rdf:value>old</rdf:value></rdf:li></rdf:Alt></dc:description>"
    old = (BLOCK % ("", inside)).encode()
    assert read_description(old) == "old"
    with pytest.raises(XmpError, match="its description is of a form that is not known"):
        write_description(old, "new")


def test_what_is_around_and_carriage_returns_stay() -> None:
    inside = "<dc:subject><rdf:Bag><rdf:li><!-- c -->a&#xD;b</rdf:li></rdf:Bag></dc:subject>"
    old = f"<!-- before --><?mine x?>{BLOCK % ('', inside)}<!-- after -->".encode()
    data = write_description(old, "text", ["a\rb"])
    for kept in (b"<!-- before -->", b"<?mine x?>", b"<!-- after -->", b"<!-- c -->a&#xD;b<"):
        assert data.count(kept) == 1
    assert write_description(data, "text") == data


def test_what_a_file_gives_back_is_what_was_shown() -> None:
    """Else a caption would count as edited by somebody."""
    form = XmpForm()
    for caption in ("a\0b\x1b[31m\ufffe", "one\r\ntwo\rthree", '{"caption": "a\\u0007b"}', " a\t"):
        shown = form.shown(caption)
        assert form.read(form.write(b"", shown, caption)) == shown


@pytest.mark.parametrize(
    "old",
    [
        b"not XML",
        b"<a/>",
        b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>",
        b'<!DOCTYPE a [<!ENTITY b "c">]><a/>',
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
        '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a><a/>'.encode("utf-16"),
        b"<a>" * 100_000,
        b"<a " + b" ".join(b'a%d=""' % i for i in range(3)) + b" a1=''/>",
        b"\xff\xfe\xfd",
        b"x" * (17 << 20),
        b"\0\0\0",
    ],
)
def test_what_is_no_xmp(old: bytes) -> None:
    with pytest.raises(XmpError):
        write_description(old, "text")
    with pytest.raises(XmpError):
        read_description(old)


def test_prefixes_are_few_and_not_kept_for_other_files() -> None:
    """Python keeps them for the whole process, and each further one took longer."""
    known = dict(ET._namespace_map)  # type: ignore[attr-defined]
    inside = "".join(f'<p{i}:a xmlns:p{i}="u{i}"/><dc:a xmlns:dc="u{i}"/>' for i in range(90))
    data = write_description((BLOCK % ("", inside)).encode(), "new")
    assert b'xmlns:p89="u89"' in data and read_description(data) == "new"
    assert ET._namespace_map == known  # type: ignore[attr-defined]
    inside = "".join(f'<p{i}:a xmlns:p{i}="u{i}"/>' for i in range(200))
    with pytest.raises(XmpError, match="it has more than 100 prefixes of namespaces"):
        write_description((BLOCK % ("", inside)).encode(), "new")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("plain", ("plain", [])),
        ('{"description": "d", "tags": ["a", " b ", 3, ""]}', ("d", ["a", "b"])),
        ('{"Keywords": ["k"], "Caption": "c"}', ("c", ["k"])),
        ('{"tags": "no list", "colour": "red"}', ('{"tags": "no list", "colour": "red"}', [])),
        ("[1, 2]", ("[1, 2]", [])),
        ("[" * 100_000, ("[" * 100_000, [])),
    ],
)
def test_parts(caption: str, expected: tuple[str, list[str]]) -> None:
    assert parts_of(caption) == expected


# ---- on the command line -----------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copy(APPLE, "a.png")
    return "a.png"


def test_captions_as_xmp(photo: str, capsys: Captured) -> None:
    before = Path(photo).read_bytes()
    assert run(["caption", photo, "--sidecar", ".xmp"]) == 0
    assert read_description(Path("a.xmp").read_bytes()) == "a red apple"
    data = Path("a.xmp").read_bytes()
    assert run(["caption", photo, "--sidecar", ".xmp"]) == 0
    assert "1 done before" in capsys.readouterr().err
    assert Path("a.xmp").read_bytes() == data
    assert run(["caption", photo, "--sidecar", ".xmp", "--sidecar-full-name"]) == 0
    assert read_description(Path("a.png.xmp").read_bytes()) == "a red apple"
    assert Path(photo).read_bytes() == before


def test_the_file_of_another_program_gets_a_description(photo: str) -> None:
    Path("a.xmp").write_text(DARKTABLE)
    assert run(["caption", photo, "--sidecar", ".xmp"]) == 0
    data = Path("a.xmp").read_bytes()
    assert read_description(data) == "a red apple" and b'darktable:params="00ff"' in data
    assert run(["caption", photo, "--sidecar", ".xmp", "--existing", "append", "--prefix", "and "]) == 0
    data = Path("a.xmp").read_bytes()
    assert read_description(data) == "a red apple\nand a red apple" and b'darktable:params="00ff"' in data
    Path("a.xmp").write_bytes(write_description(data, "by hand"))
    assert run(["caption", photo, "--sidecar", ".xmp", "--prefix", "and "]) == 0
    assert read_description(Path("a.xmp").read_bytes()) == "by hand"
    assert run(["caption", photo, "--sidecar", ".xmp", "--overwrite"]) == 0
    assert read_description(Path("a.xmp").read_bytes()) == "a red apple"


def test_a_description_of_another_program_is_not_made_again(photo: str, capsys: Captured) -> None:
    first = '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="3"/>'
    text = BLOCK % ('dc:description="my words"', "")
    Path("a.xmp").write_text(data := text.replace("<rdf:Description", f"{first}<rdf:Description", 1))
    assert run(["caption", photo, "--sidecar", ".xmp"]) == 0
    assert "1 done before" in capsys.readouterr().err
    assert Path("a.xmp").read_text() == data


@pytest.mark.parametrize("how", ["skip", "overwrite", "append"])
def test_a_file_that_is_no_xmp_is_never_lost(photo: str, how: str, capsys: Captured) -> None:
    for data in (b"mine, and no XML", b'<!DOCTYPE a [<!ENTITY b "c">]><a/>'):
        Path("a.xmp").write_bytes(data)
        assert run(["caption", photo, "--sidecar", ".xmp", "--existing", how]) == 3
        assert Path("a.xmp").read_bytes() == data
        assert (
            "a.xmp: cannot be written: it exists and is not a caption file in XMP; move it away"
            in capsys.readouterr().err
        )


def test_tags_of_a_schema(photo: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "description": {"enum": ["a red apple"]},
            "tags": {"type": "array", "items": {"enum": ["fruit", "red"]}, "minItems": 2, "maxItems": 3},
        },
        "required": ["description", "tags"],
        "additionalProperties": False,
    }
    Path("schema.json").write_text(json.dumps(schema))
    shutil.copy(photo, "twin.png")
    args = ["caption", photo, "twin.png", "--sidecar", ".xmp", "--json-schema", "schema.json"]
    assert run(args) == 0
    for name in ("a.xmp", "twin.xmp"):
        data = Path(name).read_bytes()
        assert read_description(data) == "a red apple"
        assert tags(data) and set(tags(data)) <= {"fruit", "red"}
    shutil.copy(photo, "late.png")
    assert run([*args[:2], "late.png", *args[3:]]) == 0
    assert tags(Path("late.xmp").read_bytes()) == tags(Path("a.xmp").read_bytes())
