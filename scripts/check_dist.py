#!/usr/bin/env python3
"""Check the built sdist and wheel: nothing is missing, nothing else is inside, and both work when installed.

    python -m build --outdir DIR && python scripts/check_dist.py DIR

The wheel must hold the files of the package, the C library and its header, and the licences; the sdist must
hold every file that git tracks. Then each is installed into an environment of its own, which captions a
image and writes a model file, outside the source tree. `--contents` leaves the installing out.
"""

from __future__ import annotations

import argparse
import email
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mllama_gguf"
LICENCES = {"LICENSE", "THIRD_PARTY.md"}
# Named here, so that a file that is lost from the source tree is missed as well.
PAGE = {f"server/static/{name}" for name in ("index.html", "app.js", "style.css", "icon.svg")}
PAGE |= {f"gallery/static/gallery.{suffix}" for suffix in ("html", "css", "js")}
DATA = {"data/demo.gguf", "data/models.lock", "data/selftest.json"} | PAGE
NEEDED = DATA | {"lib/mllama.h", "py.typed", "__main__.py"}


def fail(words: str) -> None:
    sys.exit(f"check_dist: {words}")


def compare(what: str, found: set[str], expected: set[str]) -> None:
    for words, names in (("misses", expected - found), ("should not hold", found - expected)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            fail(f"{what} {words} {', '.join(sorted(names)[:8])}{more}")
    print(f"{what}: {len(found)} files, as expected")


def tracked() -> set[str]:
    """The files of the working tree that git tracks, with / between folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    return {name for name in os.fsdecode(listed).split("\0") if name and os.path.lexists(ROOT / name)}


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive if not member.isdir()}
        compare(path.name, set(members), tracked() | {"PKG-INFO"})
        for name, member in members.items():
            if member.islnk() or (member.issym() and not member_target(name, member.linkname) & set(members)):
                fail(f"{path.name}: {name} is a link to {member.linkname}, which is not inside")
        info = archive.extractfile(members["PKG-INFO"])
        assert info is not None
        check_metadata(path.name, info.read())


def member_target(name: str, link: str) -> set[str]:
    return {os.path.normpath(os.path.join(os.path.dirname(name), link))}


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        info = metadata.rpartition("/")[0]
        package = {name for name in tracked() if name.startswith(f"{PACKAGE}/")}
        library = "libmllama.dylib" if sys.platform == "darwin" else "libmllama.so"
        expected = package | {f"{PACKAGE}/{name}" for name in NEEDED} | {f"{PACKAGE}/lib/{library}"}
        expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
        expected |= {f"{info}/licenses/{name}" for name in LICENCES}
        compare(path.name, names, expected)
        for name in LICENCES:
            if archive.read(f"{info}/licenses/{name}") != (ROOT / name).read_bytes():
                fail(f"{path.name}: {name} is not the one of the source tree")
        check_metadata(path.name, archive.read(metadata))


def check_metadata(what: str, data: bytes) -> None:
    headers = email.message_from_bytes(data)
    if headers["License-Expression"] != "MIT" or set(headers.get_all("License-File", [])) != LICENCES:
        fail(f"{what}: no licence in its metadata")


def check_installed(path: Path, folder: Path) -> None:
    """Install a built file as a user does, without anything else of this environment, and use it."""
    where = folder / ("sdist" if path.name.endswith(".tar.gz") else "wheel")
    venv.create(where, with_pip=True)
    binaries = where / "bin"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["MLLAMA_IMAGE_CACHE"] = str(where / "cache")

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            fail(f"{path.name}: {' '.join(map(str, words))}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    run(binaries / "python", "-m", "pip", "install", "-q", path.resolve())
    caption = run(binaries / "mllama", "caption", ROOT / "examples" / "apple.png")
    if caption != "a red apple":
        fail(f"{path.name}: the caption of the apple is {caption!r}")
    (demo,) = where.glob(f"lib/python*/site-packages/{PACKAGE}/data/demo.gguf")
    small = where / "small.gguf"
    run(binaries / "mllama", "quantize", demo, small, "--type", "q8_0")
    run(binaries / "mllama", "info", small)
    print(f"{path.name}: installed, captions and quantizes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the sdist and the wheel are")
    parser.add_argument("--contents", action="store_true", help="do not install them")
    arguments = parser.parse_args()
    sdists = sorted(arguments.folder.glob("*.tar.gz"))
    wheels = sorted(arguments.folder.glob("*.whl"))
    if len(sdists) != 1 or len(wheels) != 1:
        fail(f"{arguments.folder}: one sdist and one wheel are expected")
    check_sdist(sdists[0])
    check_wheel(wheels[0])
    if not arguments.contents:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            install = partial(check_installed, folder=Path(folder).resolve())
            list(pool.map(install, (*sdists, *wheels)))  # raises what one of them raised


if __name__ == "__main__":
    main()
