"""What a typed line says: a command, or a question with the names of pictures in it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Suffixes of what Pillow and pillow-heif read.
_SUFFIXES = """
.apng .avif .avifs .bmp .dib .gif .heic .heif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm
.ppm .tga .tif .tiff .webp"""
SUFFIXES = frozenset(_SUFFIXES.split())
# A name in quotes, or one with backslashes before its blanks: as terminals write it when a file is dropped.
_WORDS = re.compile(r"'([^']*)'|\"([^\"]*)\"|((?:\\.|[^\s'\"\\])+)")


@dataclass(frozen=True)
class Command:
    """A line like `/set temperature 0.7`. rest: what stands after the name."""

    name: str
    rest: str


@dataclass(frozen=True)
class Question:
    """text: without the names of the pictures; links: addresses of pictures, which are not fetched."""

    text: str
    images: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


def parse(line: str, commands: frozenset[str]) -> Command | Question:
    """A line, or several lines that are one question. A line that begins with a slash is a command, unless it
    begins with the name of a file."""
    text = line.strip()
    if text.startswith("/") and "\n" not in text:
        name, _, rest = text[1:].partition(" ")
        if name.lower() in commands or not _begins_with_a_file(text):
            return Command(name.lower(), rest.strip())
    return find_images(text)


def find_images(text: str) -> Question:
    """Take the names of pictures out of a question: files that are there, and addresses that end like a
    picture's."""
    if (whole := _image(_unquoted(text))) is not None:  # with blanks in its name
        return Question("", (whole,))
    images, links = [], []

    def look(match: re.Match[str]) -> str:
        quoted = match[1] if match[1] is not None else match[2]
        word = quoted if quoted is not None else re.sub(r"\\(.)", r"\1", match[3])
        if re.match(r"https?://", word, re.IGNORECASE):
            if Path(urlsplit(word).path).suffix.lower() in SUFFIXES:
                links.append(word)
            return match[0]
        for name, rest in ((word, ""), (word.rstrip(".,;:?!)"), word[len(word.rstrip(".,;:?!)")) :])):
            if (found := _image(name)) is not None:
                images.append(found)
                return "\0" + (rest if quoted is None else "")
        return match[0]

    rest = _WORDS.sub(look, text)
    rest = re.sub(r"[ \t]*\0[ \t]*", " ", rest)
    return Question(re.sub(r" +([.,;:?!)])", r"\1", rest).strip(), tuple(images), tuple(links))


def _begins_with_a_file(text: str) -> bool:
    match = _WORDS.match(text)
    return _image(_unquoted(text)) is not None or (
        match is not None and _image(re.sub(r"\\(.)", r"\1", match[0])) is not None
    )


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _image(name: str) -> str | None:
    """The path of a picture file of this name, or None."""
    if name[:7].lower() == "file://":
        name = unquote(urlsplit(name).path)
    if not name or "\0" in name or "\n" in name or Path(name).suffix.lower() not in SUFFIXES:
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
