"""The conversation behind a chat."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import TinyFiles

from mllama_gguf import ImageError, Mllama, MllamaError, RequestError
from mllama_gguf.chat.commands import Commands, Leave
from mllama_gguf.chat.talk import Talk, Turn
from mllama_gguf.store.defaults import Defaults

EXAMPLES = Path(__file__).parents[2] / "examples"
APPLE, TALL = str(EXAMPLES / "apple.png"), str(EXAMPLES / "tall.png")
QUESTION = "Describe this image."


@pytest.fixture(scope="module")
def model() -> Iterator[Mllama]:
    with Mllama.from_pretrained("demo", image_cache=False) as opened:
        yield opened


def ask(talk: Talk, text: str = QUESTION) -> str:
    return "".join(talk.ask(text))


def commands(talk: Talk) -> tuple[Commands, list[str]]:
    lines: list[str] = []
    return Commands(
        talk, lines.append, lambda pieces: lines.append("".join(pieces)), lambda image: None
    ), lines


def test_a_question_has_the_images_that_wait(model: Mllama) -> None:
    talk = Talk(model)
    talk.attach(APPLE)
    assert ask(talk) == model.caption(APPLE) == "a red apple"
    assert talk.images == [] and talk.turns[0].images[0].size[0] > 0
    ask(talk, "And now?")
    roles = [message["role"] for message in talk.messages()]
    assert roles == ["user", "assistant", "user"]
    assert talk.last is not None and talk.last.stats.cached_tokens > 10  # only what is new was computed


def test_system_message_and_options(model: Mllama) -> None:
    talk = Talk(model, "Be brief.")
    talk.set("max_tokens", 2)
    talk.attach(APPLE)
    ask(talk)
    assert talk.messages()[0] == {"role": "system", "content": "Be brief."}
    assert talk.last is not None and talk.last.finish_reason == "length"
    talk.set("max_tokens", None)
    assert talk.options == {}
    with pytest.raises(RequestError):
        talk.set("top_p", 7)
    assert talk.options == {}


def test_redo_and_undo(model: Mllama) -> None:
    talk = Talk(model)
    with pytest.raises(RequestError, match="no question yet"):
        list(talk.again())
    talk.attach(APPLE)
    first = ask(talk)
    assert "".join(talk.again()) == first and len(talk.turns) == 1
    turn = talk.undo()
    assert turn is not None and turn.reply == first and talk.turns == [] and talk.undo() is None


def test_a_stopped_reply_stays_and_a_failed_question_does_not(model: Mllama) -> None:
    talk = Talk(model)
    talk.attach(APPLE)
    pieces = talk.ask(QUESTION)
    piece = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.turns[0].reply == piece
    ask(talk, "Go on.")

    talk.attach(TALL)
    with pytest.raises(MllamaError):
        ask(talk, "x " * 200_000)
    assert len(talk.turns) == 2 and len(talk.images) == 1
    ask(talk)


def test_an_image_that_is_none(model: Mllama, tmp_path: Path) -> None:
    talk = Talk(model)
    for name, words in (("none.png", "No such file"), ("a\0b", "name")):
        with pytest.raises(ImageError, match=words):
            talk.attach(name)
    bad = tmp_path / "bad.png"
    bad.write_text("nothing")
    with pytest.raises(ImageError, match=r"bad\.png"):
        talk.attach(str(bad))
    with pytest.raises(ImageError, match="folder"):
        talk.attach(str(tmp_path))
    assert talk.images == []


def test_save_and_load(model: Mllama, tmp_path: Path) -> None:
    talk = Talk(model, "Be brief.")
    talk.set("temperature", 0.0)
    talk.attach(APPLE)
    reply = ask(talk)
    path = tmp_path / "chat.json"
    talk.save(str(path))
    talk.save(str(path))  # its own file may be replaced

    other = Talk(model)
    other.load(str(path))
    assert (other.system, other.options, other.turns[0].reply) == ("Be brief.", {"temperature": 0.0}, reply)
    assert other.turns[0].images[0].data == Path(APPLE).read_bytes()
    assert "".join(other.again()) == reply

    other.save(str(path))  # what was loaded may go on there


def test_saved_chats_of_other_shapes(model: Mllama, tmp_path: Path) -> None:
    path, talk = tmp_path / "chat.json", Talk(model, "Mine.")
    whole = {"format": "mllama chat", "version": 1, "system": None, "options": {}, "turns": []}
    turn = {"images": [], "text": "a", "reply": "b"}
    for change in (
        {"system": []},
        {"turns": {}},
        {"turns": [{**turn, "text": None}]},
        {"turns": [{**turn, "reply": {}}]},
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(RequestError, match=r"chat\.json: it is not a chat that /save wrote"):
            talk.load(str(path))
    path.write_text(json.dumps({**whole, "options": {"temperature": "x"}}))
    with pytest.raises(RequestError, match=r"chat\.json: temperature must be a number"):
        talk.load(str(path))
    assert talk.system == "Mine."


def test_a_chat_of_somebody_else_is_not_replaced(model: Mllama, tmp_path: Path) -> None:
    first, second = Talk(model, "First."), Talk(model, "Second.")
    path, empty = tmp_path / "chat.json", tmp_path / "empty.json"
    first.save(str(path))
    empty.touch()
    (tmp_path / "link.json").symlink_to(path)
    os.link(path, tmp_path / "hard.json")
    for name in ("chat.json", "link.json", "hard.json"):
        with pytest.raises(RequestError, match="another saved chat; give another name"):
            second.save(str(tmp_path / name))
    second.save(str(empty))
    second.load(str(path))
    with pytest.raises(RequestError, match="another saved chat"):
        second.save(str(empty))  # of the conversation before
    second.save(str(tmp_path / "link.json"))  # its own, by another name
    with pytest.raises(RequestError, match="another saved chat"):
        first.save(str(path))  # changed since
    second.clear()
    with pytest.raises(RequestError, match="another saved chat"):
        second.save(str(path))  # it is another conversation now
    assert json.loads(path.read_text())["system"] == "First."
    assert json.loads(empty.read_text())["system"] == "Second."


def test_foreign_files_are_neither_replaced_nor_read(model: Mllama, tmp_path: Path) -> None:
    talk = Talk(model, "Mine.")
    foreign = tmp_path / "notes.json"
    foreign.write_text('{"mine": 1}')
    with pytest.raises(RequestError, match="not a saved chat"):
        talk.save(str(foreign))
    assert foreign.read_text() == '{"mine": 1}'
    hostile: list[str | bytes] = [
        '{"mine": 1}', "[]", "", b"\xff", "[" * 100_000, '{"format": "mllama chat", "version": 9}',
        '{"format": "mllama chat", "version": 1, "system": "", "options": {"top_p": 9}, "turns": []}',
        '{"format": "mllama chat", "version": 1, "system": "", "options": {}, "turns": [{"images": [{}]}]}',
        '{"format": "mllama chat", "version": 1, "system": "", "options": {}, "turns": 5}',
    ]  # fmt: skip
    for content in hostile:
        foreign.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(RequestError):
            talk.load(str(foreign))
    packed = {"name": "x", "data": "bm90aGluZw=="}
    turn = {"images": [packed], "text": "", "reply": ""}
    content = {"format": "mllama chat", "version": 1, "system": "", "options": {}, "turns": [turn]}
    foreign.write_text(json.dumps(content))
    with pytest.raises(ImageError):
        talk.load(str(foreign))
    with pytest.raises(RequestError, match="cannot be read"):
        talk.load(str(tmp_path / "none.json"))
    assert talk.system == "Mine."


def test_the_commands(model: Mllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(model)
    run, lines = commands(talk)
    run.run("image", f"'{APPLE}' '{TALL}'")
    assert [image.name for image in talk.images] == [APPLE, TALL]
    run.run("clear", "")
    assert talk.images == []

    run.run("image", APPLE)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
    run.run("json", str(schema))
    run.run("set", "max_tokens 60")
    assert isinstance(json.loads(ask(talk))["a"], int)
    run.run("json", "")
    run.run("redo", "")
    assert lines[-1].startswith("a red apple")
    run.run("system", "Be brief.")
    assert talk.system == "Be brief."
    run.run("info", "")
    assert any(line.startswith("last ") and "tokens" in line for line in lines)
    run.run("save", str(tmp_path / "c.json"))
    run.run("undo", "")
    run.run("load", str(tmp_path / "c.json"))
    assert lines[-1] == talk.turns[0].reply
    run.run("?", "")
    assert any("/redo" in line for line in lines)
    for name, rest, words in (
        ("frob", "", "no command /frob"),
        ("set", "nothing 5", "no option 'nothing'"),
        ("set", "seed x", "whole number"),
        ("set", "", "name an option: temperature"),
        ("json", str(tmp_path / "none.json"), "cannot be read"),
        ("json", APPLE, "it is not JSON"),
        ("save", "", "name a file"),
        ("image", "", "name a file"),
    ):
        with pytest.raises(RequestError, match=words):
            run.run(name, rest)
    with pytest.raises(ImageError, match="No such file"):
        run.run("image", "none.png")
    with pytest.raises(Leave):
        run.run("quit", "")


def test_names_as_they_are_typed(model: Mllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~, quotes and file:// for every command that takes a file; each name that is wrong is an error."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my apple.png").write_bytes(Path(APPLE).read_bytes())
    talk = Talk(model, name="ollama:x")
    run, lines = commands(talk)
    for typed in ("~/my apple.png", r"~/my\ apple.png", f"file://{tmp_path}/my%20apple.png"):
        run.run("image", typed)
    assert {image.name for image in talk.images} == {f"{tmp_path}/my apple.png"}
    run.run("save", '"~/my chat.json"')
    run.run("load", r"~/my\ chat.json")
    with pytest.raises(RequestError, match="it is not JSON"):
        run.run("json", "'~/my apple.png'")
    with pytest.raises(ImageError, match=r"none\.png: No such file"):
        run.run("image", f"{APPLE} none.png")
    with pytest.raises(RequestError, match=r"not fetched from the web"):
        run.run("image", "https://example.com/x.png")
    with pytest.raises(RequestError, match=r"/no/such\.png: there is no such image"):
        run.run("no/such.png", "what?")
    run.run("info", "")
    assert any(line.startswith("model     ollama:x,") for line in lines)


def test_options_as_ollama_has_them(model: Mllama) -> None:
    talk = Talk(model)
    run, _ = commands(talk)
    run.run("set", "parameter temperature 0.5")
    run.run("set", 'system "Be brief."')
    assert talk.options == {"temperature": 0.5} and talk.system == "Be brief."
    run.run("show", "info")
    for value in ("nan", "inf", "-1", "x", "1e999"):
        with pytest.raises(RequestError, match="temperature"):
            run.run("set", f"temperature {value}")
    for line in (
        "seed 1.5",
        "max_tokens 0",
        "top_k 1.5",
        "top_p 2",
        "min_p -1",
        "Seed x",
    ):
        with pytest.raises(RequestError):
            run.run("set", line)
    assert talk.options == {"temperature": 0.5}


def test_what_a_model_brings(tiny_files: Callable[[str], TinyFiles], tmp_path: Path) -> None:
    """Its system message holds until another one is set, or none; its temperature makes replies differ."""
    brought = Defaults({"temperature": 0.7}, "Mine.")
    with Mllama(tiny_files("gqa").one, defaults=brought, n_ctx=256, image_cache=False) as model:
        talk = Talk(model)
        run, lines = commands(talk)

        def system() -> str | None:
            talk.turns[:] = [Turn([], "Hello")]
            first = brought.precede(talk.messages())[0]
            return first["content"] if first["role"] == "system" else None

        run.run("info", "")
        assert system() == "Mine." and any("Mine." in line for line in lines)
        assert (talk.temperature, Talk(model, options={"temperature": 0.0}).temperature) == (0.7, 0.0)
        run.run("save", str(tmp_path / "c.json"))
        run.run("system", "Yours.")
        assert system() == "Yours."
        run.run("system", "")
        assert system() is None
        run.run("load", str(tmp_path / "c.json"))
        assert talk.system is None and system() == "Mine."


def test_no_system_message_is_no_empty_one(model: Mllama) -> None:
    talk = Talk(model, "")
    talk.turns.append(Turn([], "Hello"))
    assert [message["role"] for message in talk.messages()] == ["user"]


def test_paste(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image, ImageGrab

    run, _ = commands(talk := Talk(model))
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: None)
    with pytest.raises(ImageError, match="no image in the clipboard"):
        run.run("paste", "")
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: [APPLE])
    run.run("paste", "")
    with Image.open(APPLE) as image:
        image.load()
        monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: image)
        run.run("paste", "")
        assert [attached.size for attached in talk.images] == [image.size] * 2

    def missing() -> None:
        raise NotImplementedError("wl-paste or xclip is required for ImageGrab.grabclipboard() on Linux")

    monkeypatch.setattr(ImageGrab, "grabclipboard", missing)
    with pytest.raises(ImageError, match="xclip"):
        run.run("paste", "")
