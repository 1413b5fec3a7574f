"""The page of `mllama gallery` in Chromium, from the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import noisy_image
from PIL import Image
from playwright.sync_api import expect

from mllama_gguf.cli.main import run

HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = 1">'


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of 300 images, one with a hostile caption, one cut off, one of JSON, and a failure."""
    records = []
    for number in range(300):
        image = tmp_path / f"{number}.png"
        if number != 4:
            Image.fromarray(noisy_image(number, 160 if number == 0 else 30, 40)).save(image)
        caption = {1: HOSTILE, 4: "it is missing", 3: '{"colour": "red", "tags": ["apple", "leaf"]}'}.get(
            number, f"image {number} here"
        )
        finish = "length" if number == 2 else "stop"
        records.append(
            {"image": str(image), "caption": caption, "finish_reason": finish, "tokens": 1, "sha256": ""}
        )
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    failure = {
        "image": str(tmp_path / "bad.jpg"),
        "error": "ImageError",
        "message": "bad.jpg: <b>corrupt</b>",
    }
    (tmp_path / "errors.jsonl").write_text(json.dumps(failure) + "\n")
    target = tmp_path / "index.html"
    assert run(["gallery", str(tmp_path / "captions.jsonl"), "-o", str(target), "--title", "A & <b>"]) == 0
    return target


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_of_a_batch(opening: Callable[..., Any], page: Path, artefacts: Path, scheme: Any) -> None:
    # The data addresses of images are the page's own; `opening` refuses every other.
    one = opening("file://", str(page), color_scheme=scheme).page
    expect(one.get_by_role("heading", name="A & <b>")).to_be_visible()
    expect(one.locator("#count")).to_have_text("301 images")
    expect(one.locator(".card").nth(1)).to_contain_text(HOSTILE)
    assert one.title() == "A & <b>"
    one.wait_for_function("document.querySelector('.card img').naturalWidth === 40")
    assert one.locator(".card img").count() < 200  # the rest waits until it is near
    # A tall image is whole, and none is higher than its frame.
    heights = """[...document.querySelectorAll(".frame img")].map(
        (image) => image.clientHeight - image.parentElement.clientHeight)"""
    assert set(one.evaluate(heights)) == {0}
    expect(one.locator(".card img").first).to_have_class("whole")
    one.screenshot(path=artefacts / f"gallery-{scheme}.png")

    one.get_by_role("button", name="Failed 1").click()
    expect(one.locator("#count")).to_have_text("1 of 301 images")
    expect(one.locator(".card:visible")).to_contain_text("<b>corrupt</b>")
    one.get_by_role("button", name="All").click()

    one.keyboard.press("/")
    one.keyboard.type("APPLE leaf")
    expect(one.locator("#count")).to_have_text("1 of 301 images")
    one.keyboard.press("Tab")
    while one.evaluate("document.activeElement.className") != "card":
        one.keyboard.press("Tab")
    one.keyboard.press("Enter")
    expect(one.locator("#words dd")).to_have_text(["red", "apple, leaf"])
    one.keyboard.press("ArrowRight")  # there is no other
    expect(one.locator("#name")).to_have_text("3.png")
    one.keyboard.press("Escape")
    assert one.evaluate("document.activeElement.className") == "card"
    one.locator("#find").fill("")
    expect(one.locator("#count")).to_have_text("301 images")

    last = one.locator(".card").nth(299)
    last.scroll_into_view_if_needed()
    expect(last.locator("img")).to_have_js_property("naturalWidth", 40)
    last.click()
    expect(one.locator("#words")).to_have_text("image 299 here")
    one.keyboard.press("ArrowLeft")
    expect(one.locator("#name")).to_have_text("298.png")
    one.get_by_role("button", name="Close").click()
    one.locator("#find").fill("4.png missing")
    expect(one.locator("#count")).to_have_text("1 of 301 images")
    expect(one.locator(".card:visible")).to_contain_text("The image is missing")
    one.locator("#find").fill("no such words")
    expect(one.locator("#nothing")).to_be_visible()


def test_a_page_on_a_phone(opening: Callable[..., Any], page: Path, artefacts: Path) -> None:
    one = opening("file://", str(page), viewport={"width": 360, "height": 740}, has_touch=True).page
    one.wait_for_function("document.querySelector('.card img').naturalWidth === 40")
    assert one.evaluate("document.documentElement.scrollWidth") <= 360
    one.screenshot(path=artefacts / "gallery-phone.png")
    one.locator(".card").first.tap()
    expect(one.locator("#viewer")).to_be_visible()
    assert one.evaluate("document.documentElement.scrollWidth") <= 360
