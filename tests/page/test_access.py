"""The page for everybody: keyboard, screen readers, contrast, phones, a server with a key."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect
from serving import EXAMPLES, Running, running

from mllama_gguf.server.settings import ServerSettings, digest_of

# Each visible text with its colours and size; colours of the backgrounds from the element up to the page.
COLOURS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const one = walk.currentNode.parentElement;
    const seen = one.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!walk.currentNode.data.trim() || !seen || !one.getClientRects().length) continue;
    if (one.closest(".unseen, :disabled, option, template, noscript, script")) continue;
    const style = getComputedStyle(one);
    const under = [];
    for (let up = one; up; up = up.parentElement) under.push(rgba(getComputedStyle(up).backgroundColor));
    found.push({
      text: walk.currentNode.data.trim().slice(0, 40),
      ink: rgba(style.color),
      under,
      large: parseFloat(style.fontSize) >= 24,
    });
  }
  for (const box of document.querySelectorAll("textarea[placeholder]")) {
    const under = [];
    for (let up = box; up; up = up.parentElement) under.push(rgba(getComputedStyle(up).backgroundColor));
    const ink = rgba(getComputedStyle(box, "::placeholder").color);
    found.push({ text: box.placeholder, ink, under, large: false });
  }
  return found;
}"""


def luminance(colour: list[float]) -> float:
    shares = [c / 255 for c in colour[:3]]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def over(top: list[float], below: list[float]) -> list[float]:
    share = top[3] / 255
    return [t * share + b * (1 - share) for t, b in zip(top[:3], below[:3], strict=True)] + [255.0]


def contrast(ink: list[float], under: list[list[float]]) -> float:
    """WCAG's ratio of a text to what is under it."""
    ground = [255.0, 255.0, 255.0, 255.0]
    for layer in reversed(under):
        ground = over(layer, ground)
    light, dark = sorted((luminance(over(ink, ground)), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def assert_readable(page: Page) -> None:
    found = page.evaluate(COLOURS)
    assert len(found) > 5
    ratios = {one["text"]: contrast(one["ink"], one["under"]) for one in found if not one["large"]}
    ratios |= {one["text"]: contrast(one["ink"], one["under"]) * 1.5 for one in found if one["large"]}
    assert {text: round(ratio, 2) for text, ratio in ratios.items() if ratio < 4.5} == {}


def test_contrast_is_measured() -> None:
    """The measure itself: black on white, and a grey that just fails."""
    white, clear = [255, 255, 255, 255], [0, 0, 0, 0]
    assert round(contrast([0, 0, 0, 255], [clear, white]), 1) == 21.0
    assert contrast([120, 120, 120, 255], [white]) < 4.5 < contrast([117, 117, 117, 255], [white])
    assert contrast([0, 0, 0, 100], [white]) < 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable(opening: Any, fake: Any, artefacts: Any, scheme: str) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    page = opening(fake.url, color_scheme=scheme, reduced_motion="reduce", **phone).page
    page.wait_for_timeout(100)
    assert_readable(page)
    page.set_input_files("#files", [EXAMPLES / "apple.png", EXAMPLES / "wide.png"])
    page.get_by_role("button", name="Text", exact=True).click()
    page.get_by_role("radio", name="JSON by a schema").check()
    page.get_by_role("textbox", name="JSON schema").fill("{")
    assert_readable(page)
    page.get_by_role("radio", name="Text").check()
    page.get_by_role("button", name="Text", exact=True).click()
    page.get_by_role("button", name="Send").click()
    fake.say("# Title\n\n**A fruit.** It is `red`:\n\n1. round\n2. sweet\n\n```\ncode\n```")
    page.locator("[data-state=writing]").wait_for()
    assert_readable(page)
    fake.write({"error": "the device is lost"}, None)
    page.locator("[data-state=failed]").wait_for()
    assert_readable(page)
    page.screenshot(path=artefacts / f"page-phone-{scheme}.png")
    page.get_by_role("button", name="Try again").tap()
    fake.say("A fruit.")
    fake.finish()
    page.locator("[data-state=done]").wait_for()
    assert_readable(page)


def test_names_and_roles(opening: Any, served: Running) -> None:
    page = opening(served.url).page
    page.set_input_files("#files", EXAMPLES / "apple.png")
    page.get_by_role("button", name="Send").click()
    page.locator("[data-state=done]").wait_for()
    assert page.locator("html").get_attribute("lang") == "en"
    for role in ("banner", "main", "contentinfo", "form"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    talk = page.get_by_role("log", name="Conversation")
    assert talk.get_attribute("aria-live") == "polite"
    expect(talk.get_by_role("article")).to_have_count(1)
    expect(page.locator("#status")).to_have_text("The answer is complete.")
    nameless = page.locator("button, input, select, textarea, a, dialog, img, fieldset").evaluate_all(
        """all => all.filter((one) => {
          if (one.localName === "img") return !one.hasAttribute("alt");
          if (["viewer", "notice-act"].includes(one.id)) return false;  // named when they are shown
          const ids = (one.getAttribute("aria-labelledby") ?? "").split(" ");
          const by = ids.map((id) => document.getElementById(id)?.textContent);
          const label = one.labels?.length ? one.labels[0].textContent : "";
          const legend = one.querySelector?.("legend")?.textContent ?? "";
          const words = [one.getAttribute("aria-label"), label, legend, ...by, one.textContent];
          return !words.some((it) => it?.trim());
        }).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert nameless == []
    ids = page.locator("[id]").evaluate_all("all => all.map((one) => one.id)")
    assert len(ids) == len(set(ids))


def test_by_keyboard_alone(opening: Any, served: Running) -> None:
    page = opening(served.url).page
    expect(page.get_by_role("textbox", name="Your question")).to_be_focused()
    page.get_by_role("textbox", name="Your question").blur()
    page.set_input_files("#files", EXAMPLES / "apple.png")
    reached = []
    page.locator(".skip").focus()
    page.keyboard.press("Shift+Tab")
    for _ in range(30):
        page.keyboard.press("Tab")
        name, is_seen = page.evaluate(
            """() => { const one = document.activeElement; const style = getComputedStyle(one);
              const box = one.closest("#composer") && one.id === "question" ? one.closest("#composer") : one;
              const seen = style.outlineStyle !== "none" || getComputedStyle(box).boxShadow !== "none";
              return [one.id || one.className || one.localName, seen]; }"""
        )
        reached.append(name)
        assert is_seen, name
        if name == "send":
            break
    assert reached[-1] == "send"
    assert {"skip", "brand", "model", "theme", "new", "question", "form-toggle"} <= set(reached)
    page.keyboard.press("Enter")
    page.locator("[data-state=done]").wait_for()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_the_screen(opening: Any, fake: Any, width: int) -> None:
    size = {"viewport": {"width": width, "height": 640}, "has_touch": True, "is_mobile": True}
    page = opening(fake.url, **size).page
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    page.set_input_files("#files", [EXAMPLES / "wide.png", EXAMPLES / "tall.png"])
    page.get_by_role("textbox", name="Your question").fill("w" * 300)
    page.get_by_role("button", name="Send").tap()
    fake.say("long" * 200 + "\n\n```\n" + "x" * 400 + "\n```")
    fake.finish()
    page.locator("[data-state=done]").wait_for()
    assert page.evaluate(wide) == 0
    small = page.locator("button:visible").evaluate_all(
        """all => all.map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
          .filter(([, box]) => box.width < 24 || box.height < 24).map(([name]) => name)"""
    )
    assert small == []


def test_the_theme_is_chosen(opening: Any, fake: Any) -> None:
    page = opening(fake.url, color_scheme="light").page
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Theme: as the system").click()
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Theme: light").click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
    page.emulate_media(color_scheme="dark")
    page.get_by_role("button", name="Theme: dark").click()
    assert page.evaluate(ground) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == light


def test_a_server_with_a_key(opening: Any) -> None:
    settings = ServerSettings(port=0, keys=(digest_of("open sesame"),))
    with running(settings) as served:
        one = opening(served.url)
        page = one.page
        box = page.get_by_role("dialog", name="This server asks for a key")
        expect(box).to_be_visible()
        key = box.get_by_label("Key", exact=True)
        assert key.get_attribute("type") == "password"
        key.fill("wrong")
        page.keyboard.press("Enter")
        expect(box.get_by_role("alert")).to_have_text("The server does not accept this key.")
        # A browser may tell late that the box was closed, when it is open again.
        page.locator("#key-dialog").dispatch_event("close")
        key.fill("open sesame")
        box.get_by_role("button", name="Use this key").click()
        expect(box).to_be_hidden()
        page.set_input_files("#files", EXAMPLES / "apple.png")
        page.get_by_role("button", name="Send").click()
        page.locator("[data-state=done]").wait_for()
        assert page.evaluate("sessionStorage.getItem('mllama-key')") == "open sesame"
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        expect(page.get_by_role("combobox", name="Model")).to_be_enabled()
        expect(box).to_be_hidden()
