"""Memory, threads, file descriptors, temporary files and child processes stay as many over many uses."""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import children
from helpers import TinyFiles, noisy_image

from mllama_gguf import LoadedModel, Mllama
from mllama_gguf.errors import RequestError

MB = 1 << 20
Files = Callable[[str], TinyFiles]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@dataclass(frozen=True)
class Used:
    """What this process holds. memory: bytes"""

    memory: int
    threads: int
    descriptors: int
    children: int
    files: int

    @classmethod
    def now(cls) -> Used:
        for _ in range(3):
            gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # what is free, but kept for later, is not a leak
        process = psutil.Process()
        files = sum(len(found) for _, _, found in os.walk(tempfile.gettempdir()))
        return cls(
            process.memory_info().rss,
            len(os.listdir("/proc/self/task")),
            process.num_fds(),
            len(children()),
            files,
        )


def assert_flat(work: Callable[[], object], times: int, warm: int, growth: int) -> None:
    """Work is done so many times, the first `warm` of them before the first look. growth: most bytes that the
    memory may grow by meanwhile; what is lost each time adds up to more."""
    for _ in range(warm):
        work()
    before = Used.now()
    for _ in range(times - warm):
        work()
    after = Used.now()
    assert after.threads <= before.threads, [thread.name for thread in threading.enumerate()]
    assert after.descriptors <= before.descriptors
    assert after.children <= before.children
    assert after.files <= before.files
    grown = after.memory - before.memory
    assert grown < growth, f"{grown / MB:.1f} MB in {times - warm} times"
    print(f"{grown / (times - warm) / 1024:.1f} kB each")


@pytest.fixture(scope="module")
def demo() -> Iterator[Mllama]:
    with Mllama.from_pretrained("demo", image_cache=False) as model:
        yield model


def test_300_models_opened_and_closed(tiny_files: Files) -> None:
    files = tiny_files("gqa")

    def work() -> None:
        with Mllama(files.one, n_ctx=128) as model:
            assert model.tokenize("the cat")

    # The model's weights alone are 1 MB.
    assert files.one.stat().st_size > 0.5 * MB
    assert_flat(work, times=300, warm=60, growth=12 * MB)


def test_100_models_that_caption(tiny_files: Files) -> None:
    """With a conversation each, an image, and a form."""
    files = tiny_files("gqa")

    def work() -> None:
        with LoadedModel(files.one, n_ctx=256, image_cache=False) as model:
            with model.conversation() as conversation:
                conversation.caption(
                    noisy_image(1), max_tokens=2, response_format={"type": "regex", "regex": "(the|cat)+"}
                )
            model.conversation()  # closed with its model

    assert_flat(work, times=100, warm=30, growth=12 * MB)


def test_1000_captions_with_a_schema(demo: Mllama) -> None:
    image = noisy_image(2)
    n = 0

    def work() -> None:
        nonlocal n
        n += 1
        # Others now and then: grammars are kept.
        schema = {**SCHEMA, "title": "a title", "required": ["colour", "n"][: 1 + n // 50 % 2]}
        schema["properties"] = {**SCHEMA["properties"], f"p{n // 20}": {"const": n // 20}}
        demo.caption(
            image,
            max_tokens=3,
            response_format={"type": "json_schema", "json_schema": {"schema": schema}},
            temperature=1.0,
            seed=n,
        )

    assert_flat(work, times=1000, warm=300, growth=8 * MB)


def test_300_streams_left_unread(demo: Mllama) -> None:
    def work() -> None:
        stream: Any = demo.caption(noisy_image(3), stream=True)
        next(stream)
        chunks = demo.create_chat_completion([{"role": "user", "content": "the cat"}], stream=True)
        next(chunks)  # the role
        next(chunks)

    assert_flat(work, times=300, warm=60, growth=12 * MB)


def test_300_refusals(demo: Mllama, tiny_files: Files, tmp_path: Path) -> None:
    """What fails on its way leaves nothing either."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_files("gqa").one.read_bytes()[:-1000])
    forms: list[Any] = [{"type": "regex", "regex": "a{9}(b"}, {"type": "lark", "grammar": "start: nothing"}]

    def work() -> None:
        for form in forms:
            with pytest.raises(RequestError):
                demo.caption(noisy_image(4), response_format=form)
        with pytest.raises(ValueError):  # ModelError, ImageError
            Mllama(broken)
        with pytest.raises(ValueError):
            demo.caption(b"no image")

    assert_flat(work, times=300, warm=60, growth=8 * MB)
