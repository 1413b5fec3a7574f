"""Captions as lines: whatever stands in a name or a caption comes back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mllama_gguf import RequestError
from mllama_gguf.batch.outputs import RecordFile
from mllama_gguf.batch.records import Csv, Jsonl, Record, line_ends, read_records
from mllama_gguf.cli.main import run

RECORD = Record("a.png", "an apple", "stop", 3, "ab")
ODD = [
    *("\r", "a\rb", "a\r", "\ra", "\r\r", "\r\n", "\n\r", 'a"\rb', "a,\r"),
    *("\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\ufeff", '"', ",", "\n", "\\", os.fsdecode(b"\xff.png")),
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_odd_characters_come_back(tmp_path: Path, suffix: str, odd: str) -> None:
    path = tmp_path / f"captions{suffix}"
    records = [RECORD, replace(RECORD, image=f"b{odd}", caption=odd), replace(RECORD, image="c", caption=odd)]
    records.append(replace(RECORD, image=odd, duplicate_of=f"{odd}x"))
    written = RecordFile(path)
    for record in records:
        written.write(record)
    written.close()
    again = RecordFile(path)
    assert again.records() == records
    again.again(["c"])
    again.write(RECORD)
    again.finish()  # drops the first
    again.close()
    got = [replace(record, tokens=3) for record in read_records(path).values()]
    assert got == [*records[1:], RECORD]
    assert len(line_ends(path.read_bytes(), quotes=suffix == ".csv")) == len(records) + (suffix == ".csv")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_long_caption_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"captions{suffix}"
    record = replace(RECORD, caption="x" * 200_000)
    written = RecordFile(path)
    written.write(record)
    written.close()
    again = RecordFile(path)
    again.close()
    assert again.records() == [record]
    assert read_records(path)["a.png"].caption == record.caption


@pytest.mark.parametrize(
    "field",
    ['"sha256": ["a"]', '"tokens": "3"', '"duplicate_of": 1', '"finish_reason": {}', '"sha256": null'],
)
def test_fields_of_other_types_are_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "captions.jsonl"
    good = '{"image": "a.png", "caption": "b", "finish_reason": "stop", "tokens": 3, "sha256": ""}'
    path.write_text(f"{good}\n{good[:-1]}, {field}}}\n")
    with pytest.raises(RequestError, match=r"captions.jsonl: is not a file of captions"):
        RecordFile(path)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_rows_whose_carriage_return_is_not_quoted(tmp_path: Path, end: bytes) -> None:
    """As older versions wrote them."""
    rows = [b"a\r.png,an\rapple,stop,3,ab,", b'b.png,"x, ""\r""",stop,3,ab,c\r.png', b"c.png,\r,stop,3,ab,"]
    path = tmp_path / "captions.csv"
    path.write_bytes(b"".join(row + end for row in (Csv.head.strip(), *rows)))
    expected = [
        replace(RECORD, image="a\r.png", caption="an\rapple"),
        replace(RECORD, image="b.png", caption='x, "\r"', duplicate_of="c\r.png"),
        replace(RECORD, image="c.png", caption="\r"),
    ]
    got = list(read_records(path).values())
    assert [replace(record, tokens=3) for record in got] == expected
    if end == b"\n":
        opened = RecordFile(path)
        assert opened.records() == expected
        opened.close()


@pytest.mark.parametrize("form", [Csv(), Jsonl()])
def test_a_gallery_of_odd_names(tmp_path: Path, form: Csv | Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("c.csv" if form.quotes else "c.jsonl")
    odd = ODD if form.quotes else [*ODD, "\0"]  # Python 3.10 reads no NUL in a table
    records = [replace(RECORD, image=f"{n}{words}", caption=words) for n, words in enumerate(odd)]
    path.write_bytes(form.head + b"".join(map(form.line, records)))
    assert run(["gallery", str(path), "-o", "page.html"]) == 0
    assert (tmp_path / "page.html").read_text("utf-8").count('{"name"') == len(records)
