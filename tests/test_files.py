"""What may be written, and files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import elsewhere

from mllama_gguf import MllamaError, RequestError
from mllama_gguf.files import (
    Kind,
    check_distinct,
    check_folder,
    check_output,
    check_room,
    replacing,
    write_whole,
)
from mllama_gguf.temporary import open_locked, remove_leftovers, temporary_name

OURS = Kind.begins_with("file of ours", b"OURS")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what may be written -----------------------------------------------------------------------------------


def test_a_new_file_and_files_of_ours(tmp_path: Path) -> None:
    new, empty, ours = (tmp_path / name for name in ("new", "empty", "ours"))
    empty.touch()
    ours.write_bytes(b"OURS and more")
    assert check_output(new, OURS) == new
    assert check_output(empty, OURS) == empty
    assert check_output(ours, OURS, overwrite=True) == ours
    with pytest.raises(RequestError, match=r"cannot write .*ours: it exists; --overwrite replaces it"):
        check_output(ours, OURS)
    assert names(tmp_path) == ["empty", "ours"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others(tmp_path: Path, overwrite: bool) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"OUR")
    (tmp_path / "link").symlink_to(other)
    os.link(other, tmp_path / "hard")
    for name in ("other", "link", "hard"):
        with pytest.raises(RequestError, match=r"it exists and is not a file of ours; give another name"):
            check_output(tmp_path / name, OURS, overwrite=overwrite)


def test_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    source = folder / "in"
    source.write_bytes(b"OURS")
    (folder / "empty").touch()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "folder2").symlink_to(folder)
    os.link(source, tmp_path / "hard")
    monkeypatch.chdir(folder)
    for name in (
        source, "in", "./in", "../folder/in", "../folder//in", "../link", "../hard", "../folder2/in", "empty",
    ):  # fmt: skip
        with pytest.raises(RequestError, match=r"cannot write .*: it is the input"):
            check_output(name, OURS, inputs=["missing", "a\0b", source, "empty"], overwrite=True)
    with pytest.raises(RequestError, match=r"hard: it is the input .*/in by another name"):
        check_output("../hard", OURS, inputs=[source], overwrite=True)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "target"
    link, chain = tmp_path / "link", tmp_path / "chain"
    link.symlink_to(Path("there") / "target")
    chain.symlink_to(link)
    assert check_output(chain, OURS) == target  # which may be missing
    for content in (b"OURS 1", b"OURS 2"):
        with replacing(chain) as file:
            file.write(content)
        assert target.read_bytes() == content
    assert link.is_symlink() and chain.is_symlink()
    assert names(tmp_path / "there") == ["target"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "none" / "x")
    with pytest.raises(RequestError, match=r"nowhere: there is no folder .*none; make it first"):
        check_output(tmp_path / "nowhere", OURS)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RequestError, match=r"loop: Too many levels of symbolic links"):
        check_output(tmp_path / "loop", OURS, overwrite=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "the output has an empty name"),
        ("new/", "names a folder"),
        ("folder/", "names a folder"),
        (".", "names a folder"),
        ("folder/..", "names a folder"),
        ("folder", "is a folder, no regular file"),
        ("fifo", "is a pipe, no regular file"),
        ("socket", "is a socket, no regular file"),
        ("/dev/null", "is a device, no regular file"),
        ("to-null", "is a device, no regular file"),
        ("none/new", "there is no folder"),
        ("file/new", "file is not a folder"),
        ("x" * 256, "File name too long"),
        ("a\0b", "the name cannot be used"),
        ("protected", "write-protected"),
        ("/proc/self/new", "cannot be written"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_bytes(b"OURS")
    os.mkfifo("fifo")
    Path("to-null").symlink_to("/dev/null")
    Path("protected").write_bytes(b"OURS")
    Path("protected").chmod(0o444)
    if name.startswith("/proc") and os.access(Path(name).parent, os.W_OK):
        Path("closed").mkdir(mode=0o555)  # another system: not root, we hope
        name = "closed/new"
    with socket.socket(socket.AF_UNIX) as there:
        there.bind("socket")
        with pytest.raises(RequestError) as error:
            check_output(name, OURS, overwrite=True)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_of_full_length(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127 + "x")
    check_output(path, OURS)
    write_whole(path, "text")
    assert names(tmp_path) == [path.name]


def test_a_kind_that_stumbles(tmp_path: Path) -> None:
    def stumbles(file: object) -> bool:
        raise ValueError("no such header")

    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(RequestError, match="is not a thing"):
        check_output(tmp_path / "x", Kind("thing", stumbles), overwrite=True)


def test_two_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder2").symlink_to("folder")
    Path("old").touch()
    os.link("old", "hard")
    Path("link").symlink_to("new")
    check_distinct("a", "b")
    check_distinct("a", "folder/a")
    for first, second in (
        ("a", "a"), ("a", "./a"), ("a", "folder/../a"), ("folder/a", "folder2/a"), ("old", "hard"),
        ("link", "new"), ("a.gguf", "A.GGUF"), ("caf\u00e9", "cafe\u0301"), (tmp_path / "a", "a"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="name two different files"):
            check_distinct(first, second)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    os.mkfifo("fifo")
    for name in (".", "new", "new/", "a/b/c", str(tmp_path)):
        assert check_folder(name) == Path(name)
    for name, words in (
        ("", "empty name"),
        ("/dev/null", "/dev/null is a device, not a folder"),
        ("/dev/null/x", "/dev/null is a device, not a folder"),
        ("file", "file is a file, not a folder"),
        ("file/x", "is a file, not a folder"),
        ("fifo/x", "is a pipe, not a folder"),
        ("x" * 256, "File name too long"),
        ("a\0b", "cannot be used"),
    ):
        with pytest.raises(RequestError) as error:
            check_folder(name)
        assert words in str(error.value)
    assert names(tmp_path) == ["fifo", "file"]


def test_room(tmp_path: Path) -> None:
    check_room([(tmp_path / "a", 1000), (tmp_path / "b", 1000)])
    with pytest.raises(MllamaError, match=r"b: the disk is too full: .* needed, .* free; make room"):
        check_room([(tmp_path / "a", 1000), (tmp_path / "b", 1 << 62)])


# ---- whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_what_fails_leaves_the_old_file(
    tmp_path: Path, old: bytes | None, error: type[BaseException]
) -> None:
    path = tmp_path / "x"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error), replacing(path) as file:
        file.write(b"new")
        raise error("stop")
    assert names(tmp_path) == ([] if old is None else ["x"])
    assert old is None or path.read_bytes() == old


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [2000, 200_000])  # within the buffer: found at the end; and beyond it
def test_a_full_disk(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with file_size_limit(1000), pytest.raises(OSError, match="File too large") as error:
        write_whole(path, b"n" * size)
    assert error.value.filename == str(path)
    assert names(tmp_path) == ["x"]
    assert path.read_bytes() == b"old"


def test_permissions_stay(tmp_path: Path) -> None:
    path, new = tmp_path / "x", tmp_path / "new"
    path.touch()
    path.chmod(0o640)
    for p in (path, new):
        write_whole(p, b"text")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~mask


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError) as error, replacing(folder / "x") as file:
        file.write(b"new")
        temporary_name(folder / "x").unlink()
        folder.rmdir()
    assert error.value.filename == str(folder / "x")
    with pytest.raises(FileNotFoundError), replacing(folder / "x"):
        pass


def test_a_file_that_came_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for _ in range(2):  # the second time without hard links
        for content, kept in ((b"theirs", b"theirs"), (b"", b"ours"), (None, b"ours")):
            path = tmp_path / "x"
            path.unlink(missing_ok=True)
            try:
                with replacing(path, overwrite=False) as file:
                    file.write(b"ours")
                    if content is not None:
                        path.write_bytes(content)
            except FileExistsError as e:
                assert "made it meanwhile" in str(e)
            assert path.read_bytes() == kept
            assert names(tmp_path) == ["x"]
        monkeypatch.setattr(os, "link", no_links)


def test_what_became_another_file_meanwhile_stays(tmp_path: Path) -> None:
    """The work may have taken hours since `check_output` allowed the output."""
    kind, path = Kind.begins_with("thing", b"THING"), tmp_path / "x"
    others: list[Callable[[], object]] = [
        lambda: path.write_bytes(b"notes"),
        lambda: (path.unlink(), path.mkdir()),
        lambda: (path.unlink(), os.mkfifo(path)),
        lambda: (path.unlink(), path.symlink_to(tmp_path / "notes")),
    ]
    (tmp_path / "notes").write_bytes(b"notes")
    for other in others:
        path.write_bytes(b"THING old")
        check_output(path, kind, overwrite=True)
        with (
            pytest.raises(FileExistsError, match="has become another file, which is not a thing; it stays"),
            replacing(path, kind=kind) as file,
        ):
            file.write(b"THING new")
            other()
        assert not list(tmp_path.glob(".mllama*"))
        if path.is_dir():
            path.rmdir()
        else:
            assert not path.is_file() or path.read_bytes() == b"notes"
            path.unlink()
    assert (tmp_path / "notes").read_bytes() == b"notes"
    for fine in (b"THING other", b""):
        path.write_bytes(b"THING old")
        with replacing(path, kind=kind) as file:
            file.write(b"THING new")
            path.write_bytes(fine)
        assert path.read_bytes() == b"THING new"


# ---- temporary files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", ["symlink", "dangling", "fifo", "folder"])
def test_nothing_planted_is_followed(tmp_path: Path, plant: str) -> None:
    precious, path = tmp_path / "precious", tmp_path / "x"
    precious.write_bytes(b"precious")
    path.write_bytes(b"old")
    planted = temporary_name(path)
    if plant == "fifo":
        os.mkfifo(planted)
    elif plant == "folder":
        planted.mkdir()
    else:
        planted.symlink_to(precious if plant == "symlink" else tmp_path / "none")
    before = names(tmp_path)
    with pytest.raises(FileExistsError, match="is in the way; move it away"):
        write_whole(path, b"new")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == before
    assert precious.read_bytes() == b"precious"
    assert path.read_bytes() == b"old"


def test_a_hard_link_planted_is_not_written_to(tmp_path: Path) -> None:
    precious, path = tmp_path / "precious", tmp_path / "x"
    precious.write_bytes(b"precious")
    os.link(precious, temporary_name(path))
    write_whole(path, b"new")
    assert precious.read_bytes() == b"precious"
    assert path.read_bytes() == b"new"


WRITE = """
import sys, time
from mllama_gguf.files import replacing
with replacing(sys.argv[1], wait=float(sys.argv[2])) as file:
    file.write(b"n" * 100_000)
    file.flush()
    print("writing", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def writer(path: Path, wait: float, seconds: float) -> subprocess.Popen[str]:
    args = [sys.executable, "-c", WRITE, str(path), str(wait), str(seconds)]
    return subprocess.Popen(args, **elsewhere(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_in_the_middle(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "other"
    path.write_bytes(b"old")
    for clean in (lambda: write_whole(path, b"old"), lambda: check_folder(tmp_path)):
        child = writer(path, 0, 60)
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert len(names(tmp_path)) == 2
        assert path.read_bytes() == b"old"
        clean()
        assert names(tmp_path) == ["x"]
    write_whole(other, b"")


def test_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    first = writer(path, 0, 1)
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    with pytest.raises(BlockingIOError, match="another process is writing it"), replacing(path, wait=0):
        pass
    remove_leftovers(tmp_path)
    begin = time.monotonic()
    with replacing(path) as file:  # waits
        assert path.read_bytes() == b"n" * 100_000
        file.write(b"second")
    assert time.monotonic() - begin > 0.1
    assert first.communicate()[1] == ""
    assert path.read_bytes() == b"second"
    assert names(tmp_path) == ["x"]


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    """Each reads the old content and adds to it."""
    path = tmp_path / "x"
    path.write_bytes(b"")

    def add(letter: bytes) -> None:
        for _ in range(20):
            with replacing(path) as file:
                file.write(path.read_bytes() + letter)

    threads = [threading.Thread(target=add, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_bytes()) == sorted(b"abcd" * 20)
    assert names(tmp_path) == ["x"]


def test_leftovers(tmp_path: Path) -> None:
    ours = tmp_path / ".mllama-0123456789abcdef.tmp"
    foreign = [
        ".mllama-1.tmp", ".mllama-0123456789ABCDEF.tmp", "mllama-0123456789abcdef.tmp", "x.tmp", ".x.tmp",
        ".mllama-0123456789abcdef.tmp2", ".mllama-0123456789abcdef.partial",
    ]  # fmt: skip
    for name in (ours.name, *foreign):
        (tmp_path / name).write_bytes(b"x")
    with open(ours, "r+b") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert ours.exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(foreign)
    remove_leftovers(tmp_path / "none")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    path = tmp_path / "x"
    temporary_name(path).write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    remove_leftovers(tmp_path)
    assert temporary_name(path).exists()  # its writer may be alive
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)])
def test_only_a_regular_file_is_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x"
    make(path)
    with pytest.raises(OSError, match=r"regular file|directory|symbolic links"):
        open_locked(path)


def test_an_open_file_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError):
        open_locked(path, create=False)
    file, locks = open_locked(path)
    assert locks
    file.write(b"text")
    with pytest.raises(BlockingIOError):
        open_locked(path)
    file.close()
    file, _ = open_locked(path, create=False)
    assert file.readall() == b"text"
    file.close()
