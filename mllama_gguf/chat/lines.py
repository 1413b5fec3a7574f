"""What a typed line says: a command, or a question with the names of images in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote_to_bytes

# Suffixes of what Pillow and pillow-heif read.
_SUFFIXES = """
.apng .avif .avifs .bmp .dib .gif .heic .heif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm
.ppm .tga .tif .tiff .webp"""
SUFFIXES = frozenset(_SUFFIXES.split())
# A word as a shell takes it, and as terminals write a file that is dropped: 'it'\''s here.png', my\ cat.png
_SHELL_WORD = re.compile(r"""(?:'[^'\n]{0,4096}'|"(?:\\.|[^"\\\n]){0,4096}"|\\.|[^\s'"\\]){1,1024}""")
_QUOTES = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)""")
_WORD = re.compile(r"\S+")
_LINK = re.compile(r"https?://[^?#]*", re.IGNORECASE)
# The end of a name with blanks that are not marked. Its beginning must look like a path.
_PATH = re.compile(r"~?\.{0,2}/|file://", re.IGNORECASE)
_END = re.compile(
    rf"(?:{'|'.join(map(re.escape, sorted(SUFFIXES, key=len, reverse=True)))})\b", re.IGNORECASE
)
_MOST_ENDS = 16  # of one name that are tried
_BEFORE, _AFTER, _KEPT = "([{<\"'\u201c\u2018\u00ab", ".,;:?!)]}>\"'\u201d\u2019\u00bb", ".,;:?!"


@dataclass(frozen=True)
class Command:
    """A line like `/set temperature 0.7`. rest: what stands after the name."""

    name: str
    rest: str


@dataclass(frozen=True)
class Question:
    """text:    without the names of the images
    links:   addresses of images, which are not fetched
    missing: names like those of images, of which there are no files
    """

    text: str
    images: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def parse(line: str, commands: frozenset[str]) -> Command | Question:
    """A line, or several lines that are one question. A line that begins with a slash is a command, unless it
    begins with the name of a file."""
    text = line.strip()
    if text.startswith("/") and "\n" not in text:
        name, *rest = text[1:].split(maxsplit=1) if text[1:2].strip() else ("", text[1:])
        if name.lower() in commands or not _begins_with_a_file(text):
            return Command(name.lower(), rest[0].strip() if rest else "")
    return find_images(text)


def find_images(text: str) -> Question:
    """Take the names of images out of a question: files that are there, and addresses that end like a
    image's."""
    if (whole := _image(_unquoted(text))) is not None:  # with blanks in its name
        return Question("", (whole,))
    images, links, missing, parts, at = [], [], [], [], 0
    while match := _WORD.search(text, at):
        parts.append(text[at : match.start()])
        found = _image_at(text, match)
        if found is not None:
            path, rest, at = found
            images.append(path)
            parts.append("\0" + rest)
            continue
        word = match[0].lstrip(_BEFORE).rstrip(_AFTER)
        if link := _LINK.match(word):
            links += [word] if _is_named_as_image(link[0]) else []
        elif _is_named_as_image(word) and not re.search(r"[*?\[\]{}<>|\0]", word):
            missing.append(word)
        parts.append(match[0].replace("\0", ""))
        at = match.end()
    rest = re.sub(r"[ \t]*\0[ \t]*", " ", "".join(parts) + text[at:])
    rest = re.sub(r" +([.,;:?!)])", r"\1", rest).strip()
    return Question(rest, tuple(images), tuple(links), tuple(missing))


def file_names(text: str) -> list[str]:
    """The files that words name: all words one file, or each word one. Some may be in quotes."""
    whole = file_name(text)
    words, at = [], 0
    while match := _WORD.search(text, at):
        shell = _SHELL_WORD.match(text, match.start())
        if shell is not None and not text[shell.end() : shell.end() + 1].strip():
            match = shell
        words.append(file_name(match[0]))
        at = match.end()
    return [whole] if os.path.lexists(whole) or not any(map(os.path.lexists, words)) else words


def file_name(words: str) -> str:
    """A file's name as it is typed or dropped: quotes, backslashes, file:// and ~ are read as a shell reads
    them. The name of a file that is there is taken as it is."""
    if not os.path.lexists(words):
        if _SHELL_WORD.fullmatch(words):
            words = _without_quotes(words)
        words = _local(words) or words
    return os.path.expanduser(words)


def _begins_with_a_file(text: str) -> bool:
    match = _WORD.match(text)
    return _image(_unquoted(text)) is not None or (match is not None and _image_at(text, match) is not None)


def _image_at(text: str, word: re.Match[str]) -> tuple[str, str, int] | None:
    """The image whose name begins where a word does: its path, the punctuation after it, and where that
    ends. None if there is no such file."""
    for name, end in _names_at(text, word):
        inner = name.lstrip(_BEFORE)
        bare = inner.rstrip(_AFTER)
        for one, rest in ((name, ""), (inner, ""), (bare, inner[len(bare) :])):
            if (path := _image(one)) is not None:
                return path, rest if inner == name else "".join(c for c in rest if c in _KEPT), end
    return None


def _names_at(text: str, word: re.Match[str]) -> Iterator[tuple[str, int]]:
    """What may be the name of an image, and where it ends: a word as a shell takes it, the word itself, a
    path with blanks."""
    shell = _SHELL_WORD.match(text, word.start())
    if shell is not None and _END.search(shell[0][-24:]):  # few do
        yield _without_quotes(shell[0]), shell.end()
    yield word[0], word.end()
    if _PATH.match(word[0].lstrip(_BEFORE)):
        line = text.find("\n", word.start())
        ends = _END.finditer(text, word.end(), len(text) if line < 0 else line)
        yield from ((text[word.start() : one.end()], one.end()) for one in islice(ends, _MOST_ENDS))


def _without_quotes(words: str) -> str:
    """A word without the quotes and backslashes that a shell takes away."""

    def inside(match: re.Match[str]) -> str:
        if match[2] is not None:
            return re.sub(r'\\(["\\$`])', r"\1", match[2])
        return match[1] if match[1] is not None else match[3]

    return _QUOTES.sub(inside, words)


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _local(name: str) -> str | None:
    """The path of an address file://; None for other names."""
    if name[:7].lower() != "file://":
        return None
    try:
        return os.fsdecode(unquote_to_bytes(b"/" + os.fsencode(name[7:]).partition(b"/")[2]))
    except UnicodeError:
        return None


def _is_named_as_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _image(name: str) -> str | None:
    """The path of an image file of this name, or None."""
    name = _local(name) or name
    if not name or "\0" in name or "\n" in name or not _is_named_as_image(name):
        return None
    path = os.path.expanduser(name)
    try:
        return path if os.path.isfile(path) else None
    except (OSError, ValueError):
        return None


def is_open(text: str) -> bool:
    """Whether a text in triple quotes is not closed yet."""
    return text.lstrip().startswith('"""') and text.count('"""') % 2 == 1


def without_quotes(text: str) -> str:
    """The text inside triple quotes, or the text itself."""
    stripped = text.strip()
    if stripped.startswith('"""') and stripped.count('"""') == 2 and stripped.endswith('"""'):
        return stripped[3:-3].strip("\n")
    return text
