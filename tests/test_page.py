"""The page in a real browser, over the default model: it sends, streams, stops, switches, and says what is wrong."""

import os
import shutil

import pytest
import served
from playwright.sync_api import expect, sync_playwright

from sirius_ext import Engine, SiriusConfig
from sirius_ext.loading import DEFAULT_MODEL
from sirius_ext.serving.scheduler import Scheduler

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def scheduler():
    made = Scheduler(Engine.from_pretrained(None, SiriusConfig(period=6), progress=False))
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(scheduler):
    with served.running(scheduler, name=DEFAULT_MODEL) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        missing = "the page was not tested, since there is no browser; on Debian: apt install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, address):
    """Any request to another host, and any error in the console that is not a refusal, fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    opened, faults = context.new_page(), []
    opened.on("request", lambda request: request.url.startswith(address) or faults.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: "CSP" in message.text and faults.append(message.text))
    opened.set_default_timeout(60_000)
    opened.goto(address)
    expect(opened.locator("#model")).to_have_text(DEFAULT_MODEL)
    yield opened
    context.close()
    assert not faults


def say(page, text, tokens=24):
    page.fill("#max_tokens", str(tokens))
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def ended(page):
    expect(page.locator("#send")).to_be_enabled(timeout=60_000)


def test_a_conversation(page, scheduler):
    say(page, "Name three colours.", 40)
    ended(page)
    expect(page.locator(".said")).to_have_text("Name three colours.")
    answer = page.locator(".answer").inner_text()
    messages = [{"role": "user", "content": "Name three colours."}]
    tokenizer = scheduler.engine.tokenizer
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    out = scheduler.engine.generate(ids, max_new_tokens=40, do_sample=False)
    assert answer == tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    # Drafted and replaced tokens, ends of periods, what was counted.
    corrected = sum(period.accepted < min(period.drafted, period.committed) for period in out.stats.periods)
    expect(page.locator("#log .token.replaced")).to_have_count(corrected)
    expect(page.locator("#log .end")).to_have_count(len(out.stats.periods))
    assert page.locator("#log .token.draft").count() > 3 and corrected
    shown = page.locator(".stats").inner_text()
    assert f"AAL {out.stats.average_advance_length:.2f}" in shown and "tokens/s" in shown
    assert f"effective density {out.stats.effective_density:.3f}" in shown
    # A second turn knows the first.
    say(page, "And a fourth?", 4)
    ended(page)
    expect(page.locator(".answer")).to_have_count(2)
    prompt = int(page.locator(".stats").last.inner_text().split(" of ")[1].split()[0])
    assert prompt > ids.shape[1] + 40
    page.click("#reset")
    expect(page.locator(".answer")).to_have_count(0)


def test_where_a_token_comes_from(page):
    """By pointer, by keyboard and for a screen reader."""
    say(page, "Name three colours.", 40)
    ended(page)
    page.locator("#log .token.draft").first.hover()
    expect(page.locator("#detail")).to_contain_text("drafted by S and kept by F")
    replaced = page.locator("#log .token.replaced").first
    replaced.focus()
    expect(page.locator("#detail")).to_contain_text("in place of S's")
    assert "F's likelihood" in replaced.get_attribute("aria-label") and page.locator("#detail").get_attribute("role") == "status"
    drafted = page.locator("#log .token.draft").first
    colour = "element => getComputedStyle(element).backgroundColor"
    assert drafted.evaluate(colour) != "rgba(0, 0, 0, 0)"
    page.uncheck("#show")
    assert drafted.evaluate(colour) == "rgba(0, 0, 0, 0)"


def test_stop(page, scheduler):
    """By button and by Escape: what there is stays, and the server goes no further."""
    before = scheduler.totals.ended["cancelled"]
    for number, stop in enumerate((lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")), 1):
        # A text that is drawn may end by itself, and so may the second one of a conversation, whatever was left of the first.
        page.reload()
        page.evaluate("document.getElementById('temperature').value = 0")
        page.select_option("#accept", "match")
        say(page, "Tell me a very long story about a lighthouse.", 1000)
        page.locator(".answers").last.locator(".token").nth(5).wait_for()
        stop()
        ended(page)
        expect(page.locator(".stats").last).to_contain_text("stopped")
        page.wait_for_function("document.activeElement.id === 'prompt'")
        while not scheduler.idle:
            page.wait_for_timeout(20)
        assert scheduler.totals.ended["cancelled"] == before + number


def test_side_by_side_and_modes(page, scheduler):
    page.check("#both")
    page.select_option("#accept", "match")
    say(page, "Name three colours.")
    ended(page)
    expect(page.locator(".answer")).to_have_count(2)
    full, sirius = page.locator(".answer").all_inner_texts()
    assert full == sirius and page.locator("section .token.draft").count()
    assert page.locator("section").first.locator(".token.draft").count() <= page.locator(".legend .draft").count()
    page.uncheck("#both")
    page.click("#reset")
    page.select_option("#mode", "csparse")
    assert page.locator("#period").is_disabled() and page.locator("#accept").is_disabled()
    say(page, "Name three colours.")
    ended(page)
    assert page.locator("#log .token.sparse").count() > 5 and page.locator("#log .token.full").count() == 0


def test_errors_are_shown(page, scheduler, monkeypatch):
    page.fill("#tree_width", "16")
    page.fill("#period", "100")
    say(page, "Hello")
    expect(page.locator("#error")).to_contain_text("sirius.tree_width: expected a tree of at most 256 tokens")
    assert page.locator("#error").get_attribute("role") == "alert" and page.locator("#prompt").input_value() == "Hello"
    page.fill("#tree_width", "1")
    page.fill("#period", "soon")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    assert page.locator("#period").evaluate("element => !element.validity.valid") and page.locator(".said").count() == 0
    page.fill("#period", "auto")
    page.context.set_offline(True)
    page.focus("#prompt")
    page.keyboard.press("Enter")
    expect(page.locator("#error")).to_have_text("the server cannot be reached")
    page.context.set_offline(False)
    page.keyboard.press("Enter")
    ended(page)
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator(".answer")).to_have_count(1)


def test_a_key(browser, scheduler):
    with served.running(scheduler, name=DEFAULT_MODEL, api_key="secret") as address:
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#error")).to_contain_text("API key")
        page.fill("#key", "secret")
        page.fill("#prompt", "Hello")
        page.focus("#prompt")
        page.keyboard.press("Enter")
        page.locator("#log .token").first.wait_for()
        page.keyboard.press("Escape")
        page.close()


def test_dark_and_light(page):
    back = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(back)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    assert dark != light
    page.click("#theme")
    assert page.evaluate(back) == dark, "the page's own choice goes before the system's"
    page.reload()
    assert page.evaluate(back) == dark
    page.click("#theme")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(back) == light
    page.click("#theme")
    assert page.evaluate(back) == dark


def test_everything_has_a_name(page):
    """For a screen reader: each control has a label, and the order of Tab is that of the page."""
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, button')]
            .filter(each => !(each.labels?.length || each.getAttribute('aria-label') || each.textContent.trim()))
            .map(each => each.id)"""
    )
    assert unnamed == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#prompt"
