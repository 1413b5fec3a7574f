"""Which images a batch is about: files, folders, patterns and lists to paths, in order."""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from ..errors import RequestError
from ..reading import decode_text, read_regular
from ..words import os_reason, show_name

# What a folder is searched for; a file that is named is tried whatever its name.
SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))  # fmt: skip
# How image files begin; others of them hold control characters soon.
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0", b"P6\n", b"P5\n")
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
# What no caption may be called: all that, and what cameras and editors write.
MEDIA_SUFFIXES = SUFFIXES | {
    ".3fr", ".ai", ".apng", ".arw", ".avi", ".cr2", ".cr3", ".crw", ".cur", ".dcr", ".dds", ".djvu", ".dng",
    ".emf", ".eps", ".erf", ".exr", ".fff", ".gpr", ".hdr", ".heics", ".heifs", ".hif", ".icns", ".iiq",
    ".j2c", ".jfi", ".jif", ".jpc", ".jpf", ".jps", ".jpx", ".jxl", ".jxr", ".kdc", ".kra", ".m4v", ".mef",
    ".mkv", ".mos", ".mov", ".mp4", ".mpeg", ".mpg", ".mrw", ".nef", ".nrw", ".orf", ".ori", ".pam", ".pcx",
    ".pdf", ".pef", ".pfm", ".psb", ".psd", ".qoi", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw",
    ".svg", ".svgz", ".tga", ".wdp", ".webm", ".wmf", ".x3f", ".xcf",
}  # fmt: skip

_ADDRESS = re.compile(r"(?:data|file|https?):", re.IGNORECASE)


def list_images(
    sources: Sequence[str],
    *,
    recursive: bool = False,
    sidecar: str | None = None,
    full_name: bool = False,
    exclude: Iterable[str] = (),
    stdin: bytes = b"",
) -> list[str]:
    """The paths of the images that sources name, each once.

    sources:   files; folders (their images, hidden files left out); patterns for `glob`, `**` included;
               lists, which are files called *.txt; "-", a list on standard input. Lists have a path a line,
               or separated by NUL, relative to the current folder.
    recursive: search the folders in the folders too; links to folders are not followed
    sidecar:   suffix of caption files: photos/a.txt is not a list if photos/a.png is named beside it
    full_name: caption files are called photos/a.png.txt
    exclude:   files that are not images, the batch's own outputs

    Natural order (2.png before 10.png), except that what lists hold follows in the lists' own order.
    Raises RequestError for a list that cannot be read, a pattern that fits nothing, and no image at all.
    """
    from natsort import natsorted, ns

    own = {os.path.basename(path): os.path.realpath(path) for path in exclude}
    captions = _captions_among(sources, sidecar, full_name)
    named: list[str] = []
    listed: list[str] = []
    for source in sources:
        if source == "-":
            listed += _listed_paths(stdin, "standard input")
        elif os.path.isdir(source):
            named += _in_folder(source, recursive)
        elif source in captions:
            continue  # `DIR/*` names the captions of the last run too
        elif source.lower().endswith(".txt"):
            listed += _listed_paths(_read_list(source), source)
        elif not os.path.lexists(source) and glob.has_magic(source):
            named += _matches(source)
        else:
            named.append(source)
    ordered = [*natsorted(named, alg=ns.PATH | ns.IGNORECASE), *listed]
    for path in ordered:
        if _ADDRESS.match(path) and not os.path.lexists(path):
            raise RequestError(f"{show_name(path, 60)}: with --out or --sidecar an image is a file")
    images = [
        path
        for path in dict.fromkeys(ordered)
        if (name := os.path.basename(path)) not in own or os.path.realpath(path) != own[name]
    ]
    if not images:
        hint = "" if recursive else "; --recursive looks in the folders below too"
        shown = ", ".join("standard input" if source == "-" else show_name(source) for source in sources)
        raise RequestError(f"{shown}: no images there{hint if any(map(os.path.isdir, sources)) else ''}")
    return images


def lists_among(sources: Iterable[str], sidecar: str | None, full_name: bool = False) -> list[str]:
    """The sources that `list_images` reads as lists."""
    captions = _captions_among(sources, sidecar, full_name)
    return [path for path in sources if path.lower().endswith(".txt") and path not in captions]


def _captions_among(sources: Iterable[str], sidecar: str | None, full_name: bool) -> set[str]:
    """The sources that are caption files of images named beside them."""
    if sidecar is None:
        return set()
    if full_name:
        return {path + sidecar for path in sources} & set(sources)
    parts = [os.path.splitext(path) for path in sources]
    stems = {stem for stem, suffix in parts if suffix.lower() in SUFFIXES}
    return {stem + suffix for stem, suffix in parts if suffix == sidecar and stem in stems}


def home_of(source: str) -> str:
    """The folder that a source is about: itself, a list's, what of a pattern is fixed, or the current one."""
    if source == "-":
        return "."
    if os.path.isdir(source):
        return source
    folder = os.path.dirname(source)
    while glob.has_magic(folder) and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder or "."


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _in_folder(folder: str, recursive: bool) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise RequestError(f"{error.filename}: cannot be listed: {os_reason(error)}") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        yield from (path for path in (os.path.join(parent, name) for name in files) if _is_image(path))


def _matches(pattern: str) -> list[str]:
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path) and _is_image(path)]
    if not found:
        raise RequestError(f"{pattern}: no image fits this pattern")
    return found


def _read_list(path: str) -> bytes:
    try:
        return read_regular(path)
    except OSError as e:
        raise RequestError(f"{path}: this list of images cannot be read: {os_reason(e)}") from e


def _listed_paths(data: bytes, origin: str) -> list[str]:
    """The paths in a list, a path a line or separated by NUL. Raises RequestError for an image or another
    binary file."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            data = os.fsencode(decode_text(data))
        except UnicodeDecodeError as e:
            raise RequestError(f"{origin}: this list of images is damaged UTF-16") from e
    data = data.removeprefix(codecs.BOM_UTF8)
    if _is_binary(data[:4096]):
        raise RequestError(
            f"{origin}: a list of images is expected, a path on each line; this is an image or another "
            "binary file (without --out and --sidecar, - takes one image)"
        )
    parts = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(_name_in(part)) for part in parts if part.strip()]


def _name_in(line: bytes) -> bytes:
    """The path that a line names: blanks around it are parts of it only if there is such a file."""
    bare = line.strip()
    return line if bare == line or os.path.lexists(line) or not os.path.lexists(bare) else bare


def _is_binary(head: bytes) -> bool:
    """Whether a file that begins so is not a list of paths. Paths may have any encoding, and in principle
    control characters too; files of other kinds soon have both."""
    if head.startswith(_IMAGES) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        return True
    if not _CONTROL.search(head):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.start < len(head) - 3  # else a character that the cut parts
    return False
