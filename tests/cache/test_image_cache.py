"""The image cache on disk: what is found again, what is not, and all that may go wrong with its files."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import TinyFiles, elsewhere, noisy_image
from PIL import Image

from mllama_gguf import ImageEmbedding, Mllama, RequestError
from mllama_gguf.cache.disk import (
    DEFAULT_MAX_BYTES,
    DIRECTORY_VARIABLE,
    SIZE_VARIABLE,
    ImageCache,
    default_max_bytes,
)
from mllama_gguf.cache.entries import OLD_SUFFIXES
from mllama_gguf.cache.folder import MARK, MARKER, NAME, make
from mllama_gguf.cache.identity import weights_sha256
from mllama_gguf.cli.main import run
from mllama_gguf.files import replacing
from mllama_gguf.temporary import temporary_name

Files = Callable[[str], TinyFiles]
Captured = pytest.CaptureFixture[str]

HEADER = 64


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.states"))


def embedding(seed: int, n_values: int = 1000) -> ImageEmbedding:
    return ImageEmbedding(np.random.default_rng(seed).random((1, 10, n_values // 10), np.float32), 1)


def add(cache: ImageCache, item: ImageEmbedding) -> None:
    cache.add_states(item.key, item.states, item.aspect_ratio_id)


class Encoded:
    """Opens models and counts what their encoders do."""

    def __init__(self) -> None:
        self.images = 0

    def progress(self, phase: str, done: int, total: int) -> None:
        self.images += phase == "encode" and done == total

    def open(self, *paths: Path, **options: object) -> Mllama:
        return Mllama(*paths, n_ctx=512, progress=self.progress, **options)  # type: ignore[arg-type]


# ---- a model with the cache --------------------------------------------------------------------------------


def test_another_object_encodes_nothing_and_says_the_same(folder: Path, tiny_files: Files) -> None:
    files, encoded = tiny_files("gqa"), Encoded()
    with encoded.open(files.text, files.mmproj, image_cache=False) as model:
        expected = model.caption(noisy_image(1, 30, 100), max_tokens=20)
        states = model.encode_image(noisy_image(1, 30, 100)).states
    assert not folder.exists()
    for n_images in (2, 2, 2):
        with encoded.open(files.text, files.mmproj) as model:
            assert model.caption(noisy_image(1, 30, 100), max_tokens=20) == expected
            found = model.encode_image(noisy_image(1, 30, 100))
            assert np.array_equal(found.states, states)
            assert not found.states.flags.writeable
        assert encoded.images == n_images
        assert len(entries(folder)) == 1
    assert folder.stat().st_mode & 0o077 == 0
    assert not list(folder.glob(".*"))


def test_reset_keeps_what_is_on_disk(folder: Path, tiny_files: Files) -> None:
    encoded = Encoded()
    with encoded.open(tiny_files("gqa").one) as model:
        first = model.encode_image(noisy_image(1))
        model.reset()
        again = model.encode_image(noisy_image(1))
        assert again is not first
        assert again.key == first.key
        assert np.array_equal(again.states, first.states)
    assert encoded.images == 1


def test_a_path_and_no_cache(folder: Path, tmp_path: Path, tiny_files: Files) -> None:
    encoded = Encoded()
    for n in (1, 1):
        with encoded.open(tiny_files("gqa").one, image_cache=tmp_path / "mine") as model:
            model.encode_image(noisy_image(1))
        assert encoded.images == n
    with encoded.open(tiny_files("gqa").one, image_cache=False) as model:
        model.encode_image(noisy_image(1))
    assert encoded.images == 2
    assert not folder.exists()


def test_size_zero_is_no_cache(folder: Path, tiny_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, "0")
    with Mllama(tiny_files("gqa").one) as model:
        model.encode_image(noisy_image(1))
    assert not folder.exists()


def test_what_makes_a_key(folder: Path, tmp_path: Path, tiny_files: Files) -> None:
    """The pixels, the projector's content wherever it lies, and how it is computed."""
    files, encoded = tiny_files("gqa"), Encoded()
    with encoded.open(files.text, files.mmproj) as model:
        first = model.encode_image(noisy_image(1)).key
        assert model.encode_image(noisy_image(2)).key != first
    copy = tmp_path / "copy.gguf"
    shutil.copy(files.mmproj, copy)
    os.utime(copy, (1, 1))
    with encoded.open(files.text, copy) as model:
        assert model.encode_image(noisy_image(1)).key == first
        assert encoded.images == 2
    with encoded.open(files.text, copy, flash_attn=False) as model:
        assert model.encode_image(noisy_image(1)).key != first
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLAMA_CPU_KERNEL", "off")
        with encoded.open(files.text, copy) as model:
            patch.delenv("MLLAMA_CPU_KERNEL")  # that of an open model does not change
            assert model.encode_image(noisy_image(1)).key != first
            with model.image_encoder(1) as encoder:
                assert encoder.encode(noisy_image(1)).key == model.encode_image(noisy_image(1)).key
    with encoded.open(files.text, copy) as model, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLAMA_CPU_KERNEL", "off")
        assert model.encode_image(noisy_image(1)).key == first
    keys = {first}
    for at in (-1, -100_000):  # bytes of two weights
        data = bytearray(files.mmproj.read_bytes())
        data[at] ^= 1
        copy.write_bytes(data)  # the same path, size and inode
        with encoded.open(files.text, copy) as model:
            keys.add(model.encode_image(noisy_image(1)).key)
    assert len(keys) == 3


def test_the_projector_is_named_by_its_type_and_not_by_the_text(tiny_files: Files, tmp_path: Path) -> None:
    import tiny

    from mllama_gguf.convert.huggingface import convert
    from mllama_gguf.gguf.reader import read_gguf

    def named(path: Path) -> str:
        file = read_gguf(path)
        return weights_sha256(file, [t.name for t in file.tensors if t.name.startswith(("v.", "mm."))])

    checkpoint = tiny.make_checkpoint(tiny.ARCHS["gqa"], tmp_path / "hf")
    digests = [named(convert(checkpoint, tmp_path / f"{t}.gguf", type=t)[1]) for t in ("f32", "f16", "bf16")]
    assert len(set(digests)) == 3
    assert digests[0] == named(tiny_files("gqa").mmproj)


def test_the_projector_is_read_once(
    folder: Path, tmp_path: Path, tiny_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.gguf"
    shutil.copy(tiny_files("gqa").one, path)
    reads = []

    def counted(*args: object) -> str:
        reads.append(args)
        return weights_sha256(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("mllama_gguf.cache.keys.weights_sha256", counted)
    for seconds, n_reads in ((0.0, 1), (0.0, 2), (60.0, 3), (60.0, 3), (61.0, 4)):
        # A file of this moment may change again without its time telling, so it is not remembered yet.
        changed = time.time() - seconds if seconds == 0 else 1e9 + seconds
        os.utime(path, (changed, changed))
        with Mllama(path) as model:
            model.encode_image(noisy_image(1))
            model.encode_image(noisy_image(2))
        assert len(reads) == n_reads


def test_a_tap_sees_the_encoder_although_the_image_is_known(folder: Path, tiny_files: Files) -> None:
    names: list[str] = []

    def tap(name: str, values: object) -> bool:
        names.append(name)
        return False

    with Mllama(tiny_files("gqa").one) as model:
        model.encode_image(noisy_image(1))
        with model.tap(tap):
            model.encode_image(noisy_image(1))
        assert any(name.startswith("v.") for name in names)
        names.clear()
        model.encode_image(noisy_image(1))
        assert not names


# ---- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:HEADER],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        *(
            lambda data, at=at: data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
            for at in (0, 20, 40, 44, 48, 52, 56, 60, HEADER)
        ),
    ],
)
def test_a_damaged_entry_is_dropped_and_computed_again(
    folder: Path, tiny_files: Files, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    encoded = Encoded()
    with encoded.open(tiny_files("gqa").one) as model:
        expected = model.encode_image(noisy_image(1)).states
        (path,) = entries(folder)
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        model.reset()
        found = model.encode_image(noisy_image(1)).states
    assert np.array_equal(found, expected)
    assert encoded.images == 2
    assert path.read_bytes() == whole
    (record,) = [r for r in caplog.records if r.name == "mllama_gguf.cache.disk"]
    assert "the entry is dropped" in record.getMessage()


def test_an_entry_under_another_name_is_not_taken(tmp_path: Path) -> None:
    cache, one, other = ImageCache(tmp_path, 10**6), embedding(1), embedding(2)
    add(cache, one)
    os.rename(cache.directory / f"{one.key}.states", cache.directory / f"{other.key}.states")
    assert cache.read_states(other.key) is None
    assert cache.read_states(one.key) is None
    assert not entries(cache.directory)


# ---- size --------------------------------------------------------------------------------------------------


def test_the_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 3 * 4100)
    items = [embedding(seed) for seed in range(5)]
    for age, item in zip((90, 80, 70), items, strict=False):
        add(cache, item)
        changed = time.time() - age
        os.utime(cache.directory / f"{item.key}.states", (changed, changed))
    assert cache.read_states(items[0].key) is not None  # used now: the second is the oldest
    for item, gone in ((items[3], {1}), (items[4], {1, 2})):
        add(cache, item)
        present = {i for i, it in enumerate(items) if (cache.directory / f"{it.key}.states").exists()}
        assert not present & gone
        assert len(present) == 3
        assert cache.info().n_bytes <= cache.max_bytes
    add(cache, embedding(9, 5000))  # more than the whole cache
    assert cache.info().n_states == 3


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 10**6)
    add(cache, embedding(1))
    left = temporary_name(cache.directory / f"{'0' * 64}.states")
    left.write_bytes(b"half")
    with left.open("r+b") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        add(cache, embedding(2))
        assert left.exists()
    add(cache, embedding(3))
    assert not left.exists()


def test_an_entry_that_another_process_writes_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, one = ImageCache(tmp_path, 10**6), embedding(1)
    with replacing(make(cache.directory) or cache.directory / f"{one.key}.states"):
        add(cache, one)
        assert cache.read_states(one.key) is None
        assert not caplog.records
    add(cache, one)
    assert cache.read_states(one.key) is not None


@pytest.mark.parametrize(
    ("words", "n_bytes"),
    [("", DEFAULT_MAX_BYTES), ("0", 0), ("1000", 1000), ("500 MB", 500 * 10**6), ("8G", 8 << 30)],
)
def test_size_of_the_environment(words: str, n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, words)
    assert default_max_bytes() == n_bytes


@pytest.mark.parametrize("words", ["lots", "-1", "5 parsecs", "1e9", "5 Gigs"])
def test_a_size_that_is_none(words: str, monkeypatch: pytest.MonkeyPatch, tiny_files: Files) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, words)
    with pytest.raises(RequestError, match=SIZE_VARIABLE):
        Mllama(tiny_files("gqa").one)


# ---- a disk that will not --------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_is_one_warning(
    folder: Path, tmp_path: Path, tiny_files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with Mllama(tiny_files("gqa").one, image_cache=blocker / "images") as model:
        expected = model.caption(noisy_image(1), max_tokens=5)
        model.reset()
        assert model.caption(noisy_image(1), max_tokens=5) == expected
        model.encode_image(noisy_image(2))
    records = [r for r in caplog.records if r.name == "mllama_gguf.cache.disk"]
    assert [r.levelno for r in records] == [logging.WARNING]
    assert "cannot be used: Not a directory" in records[0].getMessage()


@pytest.mark.parametrize("name", ["cache.disk.replacing", "files.os.replace"])
def test_a_full_or_read_only_disk_is_one_warning(
    folder: Path,
    tiny_files: Files,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Root may write everywhere, so the failures are made up; what was there before is still found."""
    with Mllama(tiny_files("gqa").one) as model:
        known = model.encode_image(noisy_image(1)).states

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(f"mllama_gguf.{name}", fails)
    monkeypatch.setattr("mllama_gguf.cache.disk.os.utime", fails)
    encoded = Encoded()
    with encoded.open(tiny_files("gqa").one) as model:
        assert np.array_equal(model.encode_image(noisy_image(1)).states, known)
        assert encoded.images == 0
        for seed in (2, 3):
            model.encode_image(noisy_image(seed))
    assert encoded.images == 2
    records = [r.getMessage() for r in caplog.records if r.name == "mllama_gguf.cache.disk"]
    assert records == [f"{folder}: the image cache cannot be used: No space left on device"]
    assert len(entries(folder)) == 1
    assert not list(folder.glob(".*"))


# ---- several processes -------------------------------------------------------------------------------------

WORK = """
import sys
import numpy as np
from mllama_gguf.cache.disk import ImageCache

cache, hits = ImageCache(sys.argv[1], 6 * 4100), 0
items = [np.random.default_rng(i).random((1, 10, 100), np.float32) for i in range(10)]
rng = np.random.default_rng(int(sys.argv[2]))
for i in rng.integers(0, 10, 400):
    found = cache.read_states(f"{i:064x}")
    if found is None:
        cache.add_states(f"{i:064x}", items[i], 1)
    else:
        assert np.array_equal(found[0], items[i])
        hits += 1
assert not cache._warned
print(hits)
"""


def test_processes_at_once(tmp_path: Path) -> None:
    """They write, read and remove the same entries; nobody sees a half of one, or fails."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path), str(seed)],
            **elsewhere(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert int(out) > 50
    folder = tmp_path / NAME
    assert {path.suffix for path in folder.iterdir()} == {".states", ".TAG"}
    assert 1 <= len(entries(folder)) <= 8  # each may add one beside the others


# ---- files of others ---------------------------------------------------------------------------------------

KEY = "0123456789abcdef" * 4
FOREIGN = {
    "old.tmp": b"half", "model.weights": b"w", "physics.states": b"s", "tooth.filling": b"f", "x.prefix": b"",
    f"{KEY}.states": b"of another program", f"{KEY}.weights": b"0" * 63, f"{KEY}.weights.bak": b"0" * 64,
    f"{KEY.upper()}.filling": b"mllama\0\3", ".mllama-1.tmp": b"", "tmpabcdefgh.tmp": b"half",
}  # fmt: skip


def plant(folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FOREIGN.items():
        (folder / name).write_bytes(data)
        os.utime(folder / name, (1, 1))
    return FOREIGN


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("how", ["variable", "argument", "relative"])
def test_a_directory_with_files_of_others(
    folder: Path, tiny_files: Files, how: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plant(folder.parent)
    (folder.parent / "link.states").symlink_to("old.tmp")
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setenv(SIZE_VARIABLE, "200 kB")  # room is needed all the time
    if how == "relative":
        monkeypatch.setenv(DIRECTORY_VARIABLE, folder.parent.name)
    chosen = {"image_cache": folder.parent} if how == "argument" else {}
    for seed in range(4):
        with Mllama(tiny_files("gqa").one, n_ctx=512, **chosen) as model:
            model.caption(noisy_image(seed, 30, 100), max_tokens=3)
    assert entries(folder)
    assert run(["cache", "clear"]) == 0
    assert not folder.exists()
    assert files_in(folder.parent) == {**before, "link.states": b"half"}
    assert (folder.parent / "link.states").is_symlink()


def test_a_folder_of_the_caches_name_that_is_not_ours(
    folder: Path, tiny_files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    before = plant(folder)
    encoded = Encoded()
    for n in (1, 2):
        with encoded.open(tiny_files("gqa").one) as model:
            model.encode_image(noisy_image(1))
        assert encoded.images == n
    records = [r.getMessage() for r in caplog.records if r.name == "mllama_gguf.cache.disk"]
    assert len(records) == 2 and all("it has files of other programs; move them away" in r for r in records)
    assert run(["cache", "clear"]) == 0
    assert files_in(folder) == before


@pytest.mark.parametrize("marker", [b"Signature: 8a477f597d28d172789f06886806bc55\n# browser\n", b"mine"])
def test_a_marker_of_others(folder: Path, tiny_files: Files, marker: bytes) -> None:
    folder.mkdir(parents=True)
    for name, data in ((MARKER, marker), (f"{KEY}.states", b"mine")):
        (folder / name).write_bytes(data)
    with Mllama(tiny_files("gqa").one) as model:
        model.encode_image(noisy_image(1))
    assert run(["cache", "clear"]) == 0
    assert files_in(folder) == {MARKER: marker, f"{KEY}.states": b"mine"}


def test_files_of_others_in_our_folder(folder: Path, tmp_path: Path) -> None:
    """Somebody put them there later; a link of our kind of name is theirs too."""
    cache = ImageCache(max_bytes=10_000)
    add(cache, embedding(1))
    theirs = {name: data for name, data in FOREIGN.items() if not name.startswith(KEY)}
    for name, data in theirs.items():
        (folder / name).write_bytes(data)
    (tmp_path / "precious").write_bytes(b"precious")
    (folder / f"{'1' * 64}.states").symlink_to(tmp_path / "precious")
    (folder / f"{'2' * 64}.states").mkdir()
    for seed in range(2, 6):
        add(cache, embedding(seed))
    assert cache.info().n_states == 2
    cache.clear()
    assert files_in(folder) == {**theirs, f"{'1' * 64}.states": b"precious", MARKER: MARK}
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_suffixes_of_earlier_versions(folder: Path) -> None:
    """Such entries are never read, and go with the next entry that is written, or with the rest."""
    cache = ImageCache()
    add(cache, embedding(1))
    kept = files_in(folder)
    old = [folder / f"{KEY}{suffix}" for suffix in OLD_SUFFIXES]
    for path in old:
        path.write_bytes(b"mllama\0\3" + bytes(100))
    (folder / "x.filling").write_bytes(b"of another program")
    assert not cache.has_kv(KEY) and not cache.has_kv(KEY, "prefix_kv")
    assert (cache.info().n_states, cache.info().n_image_kv, cache.info().n_prefix_kv) == (1, 0, 0)
    add(cache, embedding(2))
    assert files_in(folder).keys() > kept.keys() | {"x.filling"}
    assert not any(path.exists() for path in old)
    for path in old:
        path.write_bytes(b"mllama\0\3" + bytes(100))
        (folder.parent / path.name).write_bytes(path.read_bytes())  # where the first version wrote
    (folder.parent / f"{'1' * 64}.filling").write_bytes(b"of another program")
    cache.clear()
    assert list(files_in(folder.parent)) == [f"{'1' * 64}.filling"]
    assert files_in(folder).keys() == {MARKER, "x.filling"}


def test_the_marker_comes_back(folder: Path) -> None:
    cache = ImageCache()
    add(cache, embedding(1))
    (folder / MARKER).unlink()
    add(cache, embedding(2))
    assert (folder / MARKER).read_bytes() == MARK
    assert cache.info().n_states == 2


@pytest.mark.parametrize("default", [False, True])
def test_entries_of_earlier_versions(
    folder: Path, tmp_path: Path, default: bool, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """They lay in the directory itself. `cache clear` removes what can only be ours."""
    cache = ImageCache()
    add(cache, embedding(1))
    (entry,) = entries(folder)
    if default:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.delenv(DIRECTORY_VARIABLE)
        monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "xdg" / name)
    old = tmp_path / "xdg" / "mllama_gguf" / "images" if default else folder.parent
    before = plant(old)
    for name, data in ((entry.name, entry.read_bytes()), (f"{'3' * 64}.weights", b"a1" * 32)):
        (old / name).write_bytes(data)
    assert run(["cache", "clear"]) == 0
    assert files_in(old) == before
    for name in before:
        (old / name).unlink()
    assert run(["cache", "clear"]) == 0
    assert old.exists() != default


# ---- the command line --------------------------------------------------------------------------------------


def test_cache_command(folder: Path, tmp_path: Path, tiny_files: Files, capsys: Captured) -> None:
    photo, one = str(tmp_path / "photo.png"), str(tiny_files("gqa").one)
    Image.fromarray(noisy_image(1)).save(photo)

    def info(*args: str) -> dict[str, object]:
        assert run(["cache", *args, "--json"]) == 0
        out = capsys.readouterr().out
        return dict(json.loads(out))

    assert run(["caption", photo, "-m", one, "-n", "5", "--no-cache"]) == 0
    expected = capsys.readouterr()
    assert not folder.exists()
    assert info()["n_states"] == info()["n_image_kv"] == info()["n_prefix_kv"] == 0
    for _ in range(2):
        assert run(["caption", photo, "-m", one, "-n", "5"]) == 0
        assert capsys.readouterr() == expected
        kinds = (".states", ".image_kv", ".prefix_kv")
        n_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds)
        assert info("info") == {
            "directory": str(folder), "n_states": 1, "n_image_kv": 1, "n_prefix_kv": 1,
            "n_bytes": n_bytes, "max_bytes": DEFAULT_MAX_BYTES,
        }  # fmt: skip
    assert run(["cache"]) == 0
    shown = f"1 image (states), 1 image_kv, 1 prefix_kv, {n_bytes / 1e3:.1f} kB"
    assert capsys.readouterr().out == f"{folder}: {shown} of at most 4.0 GB\n"
    assert info("clear")["n_bytes"] == n_bytes
    assert not folder.exists()
    assert run(["cache", "clear"]) == 0
    nothing = "0 images (states), 0 image_kv, 0 prefix_kv, 0 bytes"
    assert capsys.readouterr().out == f"{folder}: removed {nothing}\n"
    assert run(["cache", "burn"]) == 2


def test_a_cache_that_cannot_be_is_one_line(
    folder: Path, tmp_path: Path, tiny_files: Files, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, one = str(tmp_path / "photo.png"), str(tiny_files("gqa").one)
    Image.fromarray(noisy_image(1)).save(photo)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "file" / "images"))
    assert run(["caption", photo, photo, "-m", one, "-n", "5"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: ")
    assert line.endswith("the image cache cannot be used: Not a directory")
