"""Keys of results: found once, whatever happens to the files, and never those of other weights."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import TinyFiles, noisy_image

from mllama_gguf import Aborted, ImageError, Mllama
from mllama_gguf.cache.disk import ImageCache

Files = Callable[[str], TinyFiles]
KEY = "ab" * 32


def tiles(model: Mllama) -> object:
    return model._shared.images.prepare(noisy_image(1))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose weights were hashed, in order."""
    from mllama_gguf.cache.identity import weights_sha256

    paths: list[Path] = []

    def counted(file: object, *args: object) -> str:
        paths.append(file.path)  # type: ignore[attr-defined]
        return weights_sha256(file, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("mllama_gguf.cache.keys.weights_sha256", counted)
    return paths


def test_opening_hashes_nothing(folder: Path, tiny_files: Files, hashed: list[Path]) -> None:
    files = tiny_files("gqa")
    with Mllama(files.text, files.mmproj) as model:
        assert model.create_chat_completion([{"role": "user", "content": "the"}], max_tokens=1)
        assert hashed == []
        model.encode_image(noisy_image(1))
        assert hashed == [files.mmproj]
        model.caption(noisy_image(2), max_tokens=1)
        assert hashed == [files.mmproj, files.text]


def test_threads_hash_once(folder: Path, tiny_files: Files, hashed: list[Path]) -> None:
    with Mllama(tiny_files("gqa").one) as model:
        keys, image, found = model._shared.keys, tiles(model), []
        threads = [threading.Thread(target=lambda: found.append(keys.states(image))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert len(hashed) == 1


def test_who_waits_for_another_s_hash_can_be_stopped(
    folder: Path, tiny_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args: object) -> str:
        begun.set()
        go_on.wait(20)
        return "0" * 64

    monkeypatch.setattr("mllama_gguf.cache.keys.weights_sha256", slow)
    with Mllama(tiny_files("gqa").one) as model:
        keys, image = model._shared.keys, tiles(model)
        thread = threading.Thread(target=keys.states, args=(image,))
        thread.start()
        assert begun.wait(20)
        with pytest.raises(Aborted):
            keys.states(image, lambda: True)
        go_on.set()
        thread.join()
        assert keys.states(image) == keys.states(image, lambda: True)  # nobody waits any more


@pytest.mark.parametrize("how", ["remove", "leave the folder", "replace", "shorten"])
def test_files_that_change_after_they_were_opened(
    folder: Path, tmp_path: Path, tiny_files: Files, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    files = tiny_files("gqa")
    with Mllama(files.text, files.mmproj) as model:
        expected = model.caption(noisy_image(1), max_tokens=5)
        known = model.encode_image(noisy_image(1)).key
    home = tmp_path / "home"
    home.mkdir()
    text, mmproj = home / "text.gguf", home / "mmproj.gguf"
    shutil.copy(files.text, text)
    shutil.copy(files.mmproj, mmproj)
    monkeypatch.chdir(home)
    with Mllama("text.gguf", "mmproj.gguf") as model:
        if how == "leave the folder":
            monkeypatch.chdir(tmp_path)
        elif how == "remove":
            text.unlink()
            mmproj.unlink()
        else:
            other = home / "other"
            data = bytearray(mmproj.read_bytes())
            data[-1] ^= 1
            other.write_bytes(data if how == "replace" else data[:-1000])
            other.replace(mmproj)
        assert model.caption(noisy_image(1), max_tokens=5) == expected
        key = model.encode_image(noisy_image(1)).key
        # What cannot be hashed any more has a key of its own.
        assert (key == known) == (how == "leave the folder")
        assert model.caption(noisy_image(1), max_tokens=5) == expected
    if how == "replace":
        with Mllama(files.text, mmproj) as model:
            assert model.encode_image(noisy_image(1)).key not in (key, known)


def test_pipes_in_the_cache_are_no_entries(tmp_path: Path) -> None:
    """Nobody would ever write to them."""
    cache = ImageCache(tmp_path, 10**6)
    cache.directory.mkdir()
    for name in ("states", "image_kv", "prefix_kv", "weights"):
        os.mkfifo(cache.directory / f"{KEY}.{name}")
    assert cache.read_states(KEY) is None
    assert not cache.has_kv(KEY)
    for kind in ("image_kv", "prefix_kv"):
        with pytest.raises(ImageError):
            list(cache.read_kv(KEY, 8, kind))  # type: ignore[arg-type]
    assert cache.read_digest(KEY) is None
    cache.add_states(KEY, np.ones((1, 2, 3), np.float32), 1)
    cache.add_digest(KEY, KEY)
    cache.add_kv(KEY, 8, [np.zeros(8, np.uint8)])
    assert cache.read_digest(KEY) == KEY
    found = cache.read_states(KEY)
    assert found is not None
    assert found[0].shape == (1, 2, 3)
    assert cache.is_intact(KEY, 8)


def test_a_digest_that_is_none(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 10**6)
    path = cache.directory / f"{KEY}.weights"
    path.parent.mkdir()
    for content in (b"", b"x" * 64, KEY.encode() + b"0", b"\xff" * 64, KEY.upper().encode()):
        path.write_bytes(content)
        assert cache.read_digest(KEY) is None
    path.write_bytes(KEY.encode())
    assert cache.read_digest(KEY) == KEY
