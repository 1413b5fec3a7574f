"""The page of `mllama serve` in Chromium: what people do with it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from serving import EXAMPLES, Running

FIGURES = re.compile(r"^\d+(\.\d)? s · \d+ tokens? · \d+(\.\d)? tokens/s$")
PUT = """([target, kind, name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const more = kind === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
  const made = kind === "paste" ? ClipboardEvent : DragEvent;
  document.querySelector(target).dispatchEvent(new made(kind, { bubbles: true, cancelable: true, ...more }));
}"""


def turn(page: Page, number: int = 1, state: str = "done") -> Any:
    """A question with its answer, which has come to a state."""
    found = page.locator(f".turn:nth-child({number})[data-state={state}]")
    found.wait_for()
    return found


def put(page: Page, target: str, kind: str, name: str, type_: str, data: bytes) -> None:
    page.evaluate(PUT, [target, kind, name, type_, base64.b64encode(data).decode()])


def text_of(found: Any) -> str:
    return found.locator(".text").inner_text().strip()


@pytest.mark.parametrize("path", ["/ui", "/"])
def test_a_conversation_about_an_image(opening: Any, served: Running, artefacts: Path, path: str) -> None:
    one = opening(served.url, path)
    page = one.page
    expect(page.get_by_role("heading", name="What is in your image?")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.set_input_files("#files", EXAMPLES / "apple.png")
    page.get_by_role("textbox", name="Your question").fill("What is this?")
    page.get_by_role("button", name="Send").click()
    first = turn(page)
    assert "apple" in text_of(first)
    assert FIGURES.match(first.locator(".figures").inner_text())
    page.get_by_role("textbox", name="Your question").fill("Which colour has it?")
    page.keyboard.press("Enter")
    turn(page, 2)
    page.screenshot(path=artefacts / f"page-{'root' if path == '/' else 'ui'}.png")
    asked, again = one.bodies
    assert asked["model"] == "demo:latest"
    # The bytes of the file itself, and the same image before the second question.
    assert base64.b64decode(asked["messages"][0]["images"][0]) == (EXAMPLES / "apple.png").read_bytes()
    assert again["messages"][0] == asked["messages"][0]
    assert [message["role"] for message in again["messages"]] == ["user", "assistant", "user"]
    assert again["messages"][1]["content"].strip() == text_of(first)
    assert again["messages"][2] == {"role": "user", "content": "Which colour has it?"}


def test_images_come_in_by_each_way(opening: Any, served: Running) -> None:
    one = opening(served.url)
    page = one.page
    data = (EXAMPLES / "apple.png").read_bytes()
    put(page, "main", "dragenter", "a.png", "image/png", data)
    expect(page.locator("#drop")).to_be_visible()
    put(page, "main", "drop", "dropped.png", "image/png", data)
    expect(page.locator("#drop")).to_be_hidden()
    put(page, "body", "paste", "pasted.png", "image/png", data)
    page.set_input_files("#camera", EXAMPLES / "tall.png")
    assert page.locator("#camera").get_attribute("capture") == "environment"
    expect(page.locator("#tray li")).to_have_count(3)
    page.get_by_role("button", name="Remove pasted.png").click()
    expect(page.locator("#tray li")).to_have_count(2)
    put(page, "main", "drop", "notes.txt", "text/plain", b"not an image")
    expect(page.get_by_role("alert")).to_contain_text("Not an image: notes.txt.")
    page.get_by_role("button", name="Send").click()
    turn(page)
    (message,) = one.bodies[0]["messages"]
    assert message["content"] == "Describe these images."
    assert [base64.b64decode(image) for image in message["images"]] == [
        data,
        (EXAMPLES / "tall.png").read_bytes(),
    ]


def test_an_image_that_no_browser_shows_is_sent(opening: Any, served: Running, tmp_path: Path) -> None:
    path = tmp_path / "scan.tiff"
    Image.open(EXAMPLES / "apple.png").save(path)
    one = opening(served.url)
    one.page.set_input_files("#files", path)
    expect(one.page.locator("#tray .unshown")).to_contain_text("TIFF")
    one.page.get_by_role("button", name="Send").click()
    assert text_of(turn(one.page))
    assert base64.b64decode(one.bodies[0]["messages"][0]["images"][0]) == path.read_bytes()


def test_json_by_a_schema(opening: Any, served: Running) -> None:
    one = opening(served.url)
    page = one.page
    page.set_input_files("#files", EXAMPLES / "apple.png")
    page.get_by_role("button", name="Text", exact=True).click()
    page.get_by_role("radio", name="JSON by a schema").check()
    box = page.get_by_role("textbox", name="JSON schema")
    for wrong, words in (("{", "not JSON"), ("[1]", "a JSON object"), ("", "not JSON")):
        box.fill(wrong)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#schema-words")).to_contain_text(words)
        expect(box).to_be_focused()
        assert box.get_attribute("aria-invalid") == "true"
    assert one.bodies == []
    schema = {"type": "object", "properties": {"ripe": {"type": "boolean"}}, "required": ["ripe"]}
    box.fill(json.dumps({**schema, "additionalProperties": False}))
    page.get_by_role("button", name="Send").click()
    found = turn(page)
    assert isinstance(json.loads(text_of(found))["ripe"], bool)
    assert one.bodies[0]["format"]["required"] == ["ripe"]


def test_text_of_the_model_is_never_html(opening: Any, fake: Any) -> None:
    """An image can hold text that makes the model write this."""
    hostile = (
        '<img src=x onerror="window.hacked=1"> **<script>window.hacked=2</script>**\n\n'
        "- <b onclick=alert(1)>item</b>\n# <iframe src=javascript:alert(1)>\n`<svg/onload=alert(1)>`\n"
        "```\n</code></pre><img src=y onerror=alert(1)>\n```\n[link](javascript:alert(1)) &lt;i&gt;"
    )
    one = opening(fake.url)
    page = one.page
    page.get_by_role("textbox", name="Your question").fill('<img src=z onerror="window.hacked=3">')
    page.keyboard.press("Enter")
    fake.say(hostile)
    fake.finish()
    found = turn(page)
    names = found.locator(".text *").evaluate_all("all => all.map((one) => one.localName)")
    assert sorted(set(names)) == ["code", "h3", "li", "p", "pre", "strong", "ul"]
    shown = found.locator(".text").text_content()
    for words in ('<img src=x onerror="window.hacked=1">', "<script>window.hacked=2</script>", "&lt;i&gt;"):
        assert words in shown
    assert found.locator(".question").text_content() == '<img src=z onerror="window.hacked=3">'
    assert found.locator(".question *").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_question_before_the_models_are_known_is_sent_once_they_are(opening: Any, fake: Any) -> None:
    fake.knows_models.clear()
    one = opening(fake.url)
    page = one.page
    box = page.get_by_role("textbox", name="Your question")
    box.fill("Who are")
    page.keyboard.press("Enter")
    page.keyboard.type(" you?")  # there was more to say: the first Enter counts no longer
    fake.knows_models.set()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert one.bodies == []

    fake.knows_models.clear()
    page.reload()
    box.fill("Who are you?")
    page.keyboard.press("Enter")
    assert one.bodies == []
    fake.knows_models.set()
    fake.say("A model.")
    fake.finish()
    assert text_of(turn(page)) == "A model."
    assert [body["messages"][0]["content"] for body in one.bodies] == ["Who are you?"]
    assert box.input_value() == ""


def test_words_come_one_by_one_and_can_be_stopped(opening: Any, fake: Any) -> None:
    one = opening(fake.url)
    page = one.page
    box = page.get_by_role("textbox", name="Your question")
    box.fill("Tell me.")
    page.keyboard.press("Enter")
    waiting = turn(page, 1, "waiting")
    assert waiting.get_attribute("aria-busy") == "true"
    fake.write({"message": {"content": ""}, "done": False})  # a sign of life is no word
    fake.say("One")
    writing = turn(page, 1, "writing")
    expect(writing.locator(".text")).to_have_text("One")
    fake.say(" two ä")
    expect(writing.locator(".text")).to_have_text("One two ä")
    page.get_by_role("button", name="Stop").click()
    stopped = turn(page, 1, "stopped")
    assert fake.gone.wait(5)
    expect(stopped.locator(".text")).to_have_text("One two ä")
    expect(stopped.locator(".figures")).to_contain_text("Stopped after")
    expect(box).to_be_focused()
    box.fill("And more?")
    page.keyboard.press("Enter")
    turn(page, 2, "waiting")
    fake.gone.clear()
    page.keyboard.press("Escape")
    turn(page, 2, "stopped")
    assert fake.gone.wait(5)
    assert one.bodies[1]["messages"][1] == {"role": "assistant", "content": "One two ä"}


def test_lists_headings_and_code(opening: Any, fake: Any) -> None:
    page = opening(fake.url).page
    page.get_by_role("textbox", name="Your question").fill("Hello")
    page.keyboard.press("Enter")
    fake.say(
        "## Fruit\n\n3. one\n   * a\n   - b\n4. two **bold**\n\n5. three\n\nEnd 2 * 3 * 4 ** 5\nof `it`."
    )
    fake.finish()
    shape = """(box) => { const tell = (one) => one.nodeType === 3 ? one.data
      : `<${one.localName}>${[...one.childNodes].map(tell).join("")}</>`;
      return [...box.children].map(tell).join(""); }"""
    assert turn(page).locator(".text").evaluate(shape) == (
        "<h3>Fruit</><ol><li>one<ul><li>a</><li>b</></></><li>two <strong>bold</></><li>three</></>"
        "<p>End 2 * 3 * 4 ** 5\nof <code>it</>.</>"
    )
    assert page.locator(".text ol").get_attribute("start") == "3"


def test_figures_are_of_the_last_object(opening: Any, fake: Any) -> None:
    page = opening(fake.url).page
    page.get_by_role("textbox", name="Your question").fill("Hello")
    page.keyboard.press("Enter")
    fake.say("Hello")
    fake.finish(done_reason="length")
    found = turn(page)
    figures = "3.2 s · 44 tokens · 22 tokens/s · cut off: no room for more"
    expect(found.locator(".figures")).to_have_text(figures)
    assert found.get_attribute("aria-busy") == "false"


def test_errors_in_words(opening: Any, served: Running, fake: Any) -> None:
    one = opening(served.url)
    page = one.page
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\nno image"}
    page.set_input_files("#files", [broken])
    page.get_by_role("button", name="Send").click()
    expect(turn(page, 1, "failed").locator(".problem")).to_contain_text("image")
    # The failed question is not told again: it would spoil every one that follows.
    page.get_by_role("textbox", name="Your question").fill("Hello")
    page.keyboard.press("Enter")
    turn(page, 2)
    assert len(one.bodies[1]["messages"]) == 1

    page = opening(fake.url).page
    page.get_by_role("textbox", name="Your question").fill("Hello")
    page.keyboard.press("Enter")
    fake.say("Well")
    fake.write({"error": "the device is lost"}, None)
    failed = turn(page, 1, "failed")
    expect(failed.locator(".problem")).to_have_text("the device is lost")
    expect(failed.locator(".text")).to_have_text("Well")
    page.get_by_role("button", name="Try again").click()
    fake.say("Better")
    fake.write(None)  # the stream ends without an end
    expect(turn(page, 1, "failed").locator(".problem")).to_contain_text("ended before the answer did")
    page.get_by_role("button", name="Change the question").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_role("textbox", name="Your question")).to_have_value("Hello")
    fake.close()
    page.keyboard.press("Enter")
    expect(turn(page, 1, "failed").locator(".problem")).to_contain_text("cannot be reached")


def test_the_model_is_chosen_and_remembered(opening: Any, served: Running) -> None:
    one = opening(served.url)
    page = one.page
    choice = page.get_by_role("combobox", name="Model")
    expect(choice.locator("option")).to_have_text(["demo", "other"])
    choice.select_option("other:latest")
    page.set_input_files("#files", EXAMPLES / "apple.png")
    page.get_by_role("button", name="Send").click()
    turn(page)
    assert one.bodies[0]["model"] == "other:latest"
    page.reload()
    expect(choice).to_have_value("other:latest")


def test_copy_a_new_conversation_and_a_large_image(opening: Any, served: Running) -> None:
    one = opening(served.url, permissions=["clipboard-read", "clipboard-write"])
    page = one.page
    page.set_input_files("#files", EXAMPLES / "apple.png")
    page.get_by_role("button", name="Send").click()
    answer = text_of(turn(page))
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").strip() == answer
    page.get_by_role("button", name="Show apple.png").click()
    viewer = page.get_by_role("dialog", name="apple.png")
    expect(viewer.get_by_role("img")).to_be_visible()
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    page.get_by_role("button", name="Show apple.png").click()
    viewer.get_by_role("button", name="Ask about it alone").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#tray li")).to_have_count(1)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#tray li")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_a_large_image_keeps_its_pixels(opening: Callable[..., Any], fake: Any) -> None:
    data = BytesIO()
    Image.effect_noise((2000, 1400), 40).convert("RGB").save(data, "JPEG", quality=90)
    one = opening(fake.url)
    noise = {"name": "noise.jpg", "mimeType": "image/jpeg", "buffer": data.getvalue()}
    one.page.set_input_files("#files", [noise])
    one.page.get_by_role("button", name="Send").click()
    fake.say("Noise")
    fake.finish()
    turn(one.page)
    assert base64.b64decode(one.bodies[0]["messages"][0]["images"][0]) == data.getvalue()
