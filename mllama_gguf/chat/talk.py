"""The conversation of a chat: its turns, what belongs to the next one, and how it is kept in a file."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ..decode.options import DEFAULTS, ReplyOptions
from ..decode.reply import Reply
from ..errors import ImageError, RequestError
from ..files import AnyPath, Kind, check_output, replacing
from ..model import Mllama
from ..reading import open_regular, read_text
from ..vision.embedding import ImageEmbedding
from ..vision.loading import load_image
from ..words import brief, os_reason, show_name

VERSION = 1
_T = TypeVar("_T")

FORMAT = "mllama chat"
MAX_FILE = 1 << 30  # bytes, of an image or of a chat


@dataclass
class Attached:
    """An image of a question. data: its file; states: what the encoder made, once it was asked about."""

    name: str
    data: bytes
    size: tuple[int, int]  # width, height
    states: ImageEmbedding | None = None


@dataclass
class Turn:
    """A question and its reply, as far as that was written."""

    images: list[Attached]
    text: str
    reply: str = ""


@dataclass
class Talk:
    """A conversation with a model.

    name:     of the model, for people; "": that of its file
    system:   the system message; "": none; None: the model's own, if it brings one
    images:   for the next question
    options:  of `create_chat_completion`, those that were set
    form:     response_format of the replies, or None
    last:     the last reply, for its figures
    """

    model: Mllama
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    images: list[Attached] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    form: Mapping[str, Any] | None = None
    last: Reply | None = None
    name: str = ""
    _saved: dict[Path, _Stamp | None] = field(default_factory=dict, repr=False)  # its files

    def attach(self, name: str, data: bytes | None = None) -> Attached:
        """Take an image for the next question: a file's name, or a name and the bytes of a file. Raises
        ImageError."""
        if data is None:
            data = _read(name)
        try:
            size = load_image(data).size
        except ImageError as e:
            raise ImageError(f"{show_name(name)}: {str(e).removeprefix('image bytes: ')}") from e
        image = Attached(name, data, size)
        self.images.append(image)
        return image

    def ask(self, text: str) -> Iterator[str]:
        """Ask a question about the images that wait, or another one. Gives the pieces of the reply.

        A reply that is stopped stays as far as it was written. A question that cannot be asked leaves
        everything as it was. Raises what `Answers.reply` raises.
        """
        turn = Turn(self.images, text)
        self.turns.append(turn)
        self.images = []
        try:
            yield from self._write(turn)
        except BaseException:
            if not turn.reply and self.turns[-1:] == [turn]:
                self.turns.pop()
                self.images = turn.images + self.images
            raise

    def again(self) -> Iterator[str]:
        """Another reply to the last question. Raises RequestError if there is none."""
        if not self.turns:
            raise RequestError("there is no question yet")
        turn = self.turns[-1]
        old, turn.reply = turn.reply, ""
        try:
            yield from self._write(turn)
        except BaseException:
            turn.reply = turn.reply or old
            raise

    def undo(self) -> Turn | None:
        """Forget the last question and its reply. Returns it, or None if there is none."""
        return self.turns.pop() if self.turns else None

    def clear(self) -> None:
        """Forget all questions, replies and images. The system message and the options stay."""
        self.turns.clear()
        self.images.clear()
        self.last = None
        self._saved.clear()

    def set(self, name: str, value: Any) -> None:
        """Set an option; None: as at first. Raises RequestError."""
        options = {key: old for key, old in self.options.items() if key != name}
        if value is not None:
            options[name] = value
        ReplyOptions.checked({**options, name: DEFAULTS.get(name) if value is None else value})
        self.options = options

    @property
    def temperature(self) -> float:
        """Temperature of the next reply: as set here, else the model's own, else the default."""
        for options in (self.options, self.model.defaults.options, DEFAULTS):
            if options.get("temperature") is not None:
                return float(options["temperature"])
        return 0.0

    def messages(self) -> list[dict[str, Any]]:
        """What the model gets, up to the last question."""
        messages: list[dict[str, Any]] = []
        # An empty one takes the place of the model's own. Without one it would be a turn without words.
        if self.system or (self.system is not None and self.model.defaults.system):
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            parts: list[dict[str, Any]] = [
                {"type": "image", "image": image.states or image.data} for image in turn.images
            ]
            parts.append({"type": "text", "text": turn.text})
            messages.append({"role": "user", "content": parts if turn.images else turn.text})
            if turn is not self.turns[-1]:
                messages.append({"role": "assistant", "content": turn.reply})
        return messages

    def _write(self, turn: Turn) -> Iterator[str]:
        for image in turn.images:
            if image.states is None:
                image.states = self.model.encode_image(image.data)
        reply = self.last = self.model.reply(
            self.messages(), **{**self.options, "response_format": self.form}
        )
        try:
            for piece in reply:
                turn.reply += piece
                yield piece
        finally:
            reply.close()

    # ---- files ---------------------------------------------------------------------------------------------

    def save(self, path: str) -> Path:
        """Write the conversation with its images to a file. It replaces a saved chat only if that is of
        this conversation: written or loaded by it, and not changed since. Raises RequestError, OSError."""
        target = check_output(path, SAVED, overwrite=True)
        there = _stamp(target)
        is_own = there is not None and self._saved.get(target) == there
        if there is not None and there.size and not is_own:
            words = "it is another saved chat; give another name, or move it away"
            raise RequestError(f"cannot write {show_name(path)}: {words}")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "system": self.system,
            "options": {**self.options, **({"response_format": self.form} if self.form else {})},
            "turns": [
                {"images": [_packed(image) for image in turn.images], "text": turn.text, "reply": turn.reply}
                for turn in self.turns
            ],
        }
        with replacing(target, overwrite=is_own, kind=SAVED) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")
        self._saved[target] = _stamp(target)
        return target

    def load(self, path: str) -> None:
        """Continue a conversation from a file, in place of this one. Raises RequestError, ImageError."""
        shown, stamp = show_name(path), _stamp(path)
        try:
            content = json.loads(read_text(path))
            if content["format"] != FORMAT:
                raise ValueError
            if content["version"] != VERSION:
                raise RequestError(f"{shown}: version {brief(content['version'])} of the format is not known")
            turns = [
                Turn(list(map(_unpacked, turn["images"])), _a(str, turn["text"]), _a(str, turn["reply"]))
                for turn in _a(list, content["turns"])
            ]
            system = None if content["system"] is None else _a(str, content["system"])
            options = dict(content["options"])
        except OSError as e:
            raise RequestError(f"{shown}: cannot be read: {os_reason(e)}") from e
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            if isinstance(e, ImageError):
                raise ImageError(f"{shown}: an image in it cannot be read: {e}") from e
            if isinstance(e, RequestError):
                raise
            raise RequestError(f"{shown}: it is not a chat that /save wrote") from e
        form = options.pop("response_format", None)
        try:
            ReplyOptions.checked({**options, "response_format": form})
        except RequestError as e:
            raise RequestError(f"{shown}: {e}") from e
        self.system, self.options, self.form, self.turns = system, options, form, turns
        self.images, self.last = [], None
        self._saved = {Path(os.path.realpath(path)): stamp}


class _Stamp(NamedTuple):
    """Tells a state of a file from later ones."""

    device: int
    file: int
    size: int
    changed: int


def _stamp(path: AnyPath) -> _Stamp | None:
    """None: there is no such file."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None
    return _Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def _is_saved(file: BinaryIO) -> bool:
    return f'"format": "{FORMAT}"'.encode() in file.read(100)


SAVED = Kind("saved chat", _is_saved)


def _read(path: str) -> bytes:
    shown = show_name(path)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_FILE + 1)
    except OSError as e:
        raise ImageError(f"{shown}: {os_reason(e)}") from e
    except ValueError as e:  # a NUL
        raise ImageError(f"{shown}: the name cannot be used") from e
    if len(data) > MAX_FILE:
        raise ImageError(f"{shown}: larger than 1 GiB")
    return data


def _a(kind: type[_T], value: Any) -> _T:
    """A value of a file, if it is of this kind. Raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError
    return value


def _packed(image: Attached) -> dict[str, str]:
    return {"name": image.name, "data": base64.b64encode(image.data).decode("ascii")}


def _unpacked(packed: Mapping[str, str]) -> Attached:
    data = base64.b64decode(packed["data"], validate=True)
    return Attached(_a(str, packed["name"]), data, load_image(io.BytesIO(data)).size)
