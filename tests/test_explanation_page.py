"""The interactive view in a real browser: mouse, keyboard, what a screen reader hears, light and dark."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import laps
import numpy as np
import PIL.Image
import pytest
from _models import CAPTIONS, bert_tokenizer, tiny_laps
from laps.explanation import Explanation

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "no Chromium with its chromedriver (Debian: chromium chromium-driver)"
if (BROWSER is None or DRIVER is None) and os.environ.get("LAPS_REQUIRE_BROWSER"):
    raise RuntimeError(MISSING)
pytestmark = [
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason=MISSING),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def why() -> Explanation:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return laps.explain(tiny_laps(tokenizer=bert_tokenizer()), PIL.Image.fromarray(pixels), CAPTIONS[0])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,700"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, why: Explanation, tmp_path: Path) -> Iterator[Any]:
    why.save(tmp_path / "why.html")
    browser.get((tmp_path / "why.html").as_uri())
    yield browser
    # Neither an error nor a request for anything else.
    assert browser.get_log("browser") == []


def words(page: Any) -> list[Any]:
    return list(page.find_elements(By.CSS_SELECTOR, ".words button"))


def cells(page: Any) -> list[Any]:
    return list(page.find_elements(By.CSS_SELECTOR, ".cell"))


def note(page: Any) -> str:
    return str(page.find_element(By.CSS_SELECTOR, ".note").text)


def paint(page: Any) -> list[float]:
    """How strongly each patch is painted."""
    script = "return [...document.querySelectorAll('.cell')].map(e => getComputedStyle(e).backgroundColor)"
    channels = [re.findall("[0-9.]+", colour) for colour in page.execute_script(script)]
    return [float(alpha[3]) if len(alpha) > 3 else 1.0 for alpha in channels]


def move(page: Any, element: Any) -> None:
    webdriver.ActionChains(page).move_to_element(element).perform()


def test_dropped_patches_are_dark_at_first(page: Any, why: Explanation) -> None:
    kept = why.attribution.kept
    assert [alpha > 0 for alpha in paint(page)] == (~kept).tolist()
    assert f"{why.score:.3f}" in page.find_element(By.CSS_SELECTOR, ".sum").text
    frame = page.find_element(By.CSS_SELECTOR, ".frame").rect
    assert frame["width"] / frame["height"] == pytest.approx(60 / 40, rel=0.01)
    # Every patch has its place on the picture.
    last = cells(page)[-1].rect
    assert last["x"] + last["width"] == pytest.approx(frame["x"] + frame["width"], abs=1)
    assert last["y"] + last["height"] == pytest.approx(frame["y"] + frame["height"], abs=1)


def test_a_word_lights_up_its_patches(page: Any, why: Explanation) -> None:
    move(page, words(page)[2])
    shares = np.abs(why.words[2].patch_shares)
    np.testing.assert_allclose(paint(page), 0.85 * shares / shares.max(), atol=0.01)
    assert note(page).startswith(f"“{why.words[2].text}” adds")
    assert why.token_names[why.words[2].token] in note(page)
    move(page, page.find_element(By.CSS_SELECTOR, "h1"))
    assert note(page).startswith("Point at a word")


def test_a_patch_lights_up_its_words(page: Any, why: Explanation) -> None:
    index = int(np.flatnonzero(why.attribution.kept)[3])
    move(page, cells(page)[index])
    assert note(page).startswith(f"Row {index // 4 + 1}, column {index % 4 + 1}: kept")
    shown = [
        float(b.find_element(By.TAG_NAME, "small").text.replace("\N{MINUS SIGN}", "-")) for b in words(page)
    ]
    np.testing.assert_allclose(shown, [w.patch_shares[index] for w in why.words], atol=6e-4)
    marked = [i for i, cell in enumerate(cells(page)) if "marked" in (cell.get_attribute("class") or "")]
    groups = why.attribution.groups
    assert marked == np.flatnonzero(groups == groups[index]).tolist()


def test_a_click_keeps_a_word_and_escape_lets_go(page: Any) -> None:
    word = words(page)[1]
    word.click()
    assert word.get_attribute("aria-pressed") == "true"
    move(page, page.find_element(By.CSS_SELECTOR, "h1"))
    page.execute_script("document.activeElement.blur()")
    assert note(page).startswith("“a” adds")
    word.send_keys(Keys.ESCAPE)
    assert word.get_attribute("aria-pressed") == "false"


def test_the_keyboard_reaches_everything(page: Any, why: Explanation) -> None:
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    first = page.switch_to.active_element
    assert first.accessible_name.startswith("row 1, column 1")
    assert note(page).startswith("Row 1, column 1")
    for key, name in (
        (Keys.ARROW_RIGHT, "row 1, column 2"),
        (Keys.ARROW_DOWN, "row 2, column 2"),
        (Keys.ARROW_LEFT, "row 2, column 1"),
        (Keys.ARROW_LEFT, "row 2, column 1"),
        (Keys.END, "row 2, column 4"),
        (Keys.ARROW_DOWN, "row 3, column 4"),
        (Keys.HOME, "row 3, column 1"),
        (Keys.ARROW_UP, "row 2, column 1"),
        (Keys.ARROW_UP, "row 1, column 1"),
        (Keys.ARROW_UP, "row 1, column 1"),
    ):
        page.switch_to.active_element.send_keys(key)
        assert page.switch_to.active_element.accessible_name.startswith(name)
    # One stop for all patches, then the words.
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element.accessible_name.startswith("[start], adds")
    assert note(page).startswith("“[start]” adds")
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.get_attribute("aria-pressed") == "true"
    names = {page.switch_to.active_element.accessible_name}
    for _ in range(len(why.words) + 2):
        page.switch_to.active_element.send_keys(Keys.TAB)
        names.add(page.switch_to.active_element.accessible_name)
    assert "patches merged into tokens" in names


def test_what_a_screen_reader_is_told(page: Any) -> None:
    grid = page.find_element(By.CSS_SELECTOR, ".cells")
    assert (grid.aria_role, grid.accessible_name) == ("grid", "patches of the image")
    assert cells(page)[0].aria_role == "gridcell"
    assert page.find_element(By.CSS_SELECTOR, ".note").get_attribute("aria-live") == "polite"
    for button in page.find_elements(By.TAG_NAME, "button"):
        assert button.aria_role == "button"
        assert button.accessible_name
    assert page.find_element(By.TAG_NAME, "img").accessible_name == "the image"


def test_other_pictures(page: Any, why: Explanation) -> None:
    for button in page.find_elements(By.CSS_SELECTOR, ".modes button"):
        button.click()
        pressed = [b.text for b in page.find_elements(By.CSS_SELECTOR, '.modes [aria-pressed="true"]')]
        assert pressed == [button.text]
        if "likeness to the image" in button.text:
            values = why.attribution.self_scores
            expected = 0.9 * (values - values.min()) / np.ptp(values)
            np.testing.assert_allclose(paint(page), expected, atol=0.01)


def test_a_mode_outlives_a_glance_at_a_word(page: Any) -> None:
    groups = next(b for b in page.find_elements(By.CSS_SELECTOR, ".modes button") if "merged" in b.text)
    groups.click()
    before = paint(page)
    move(page, words(page)[2])
    assert paint(page) != before
    move(page, page.find_element(By.CSS_SELECTOR, "h1"))
    assert groups.get_attribute("aria-pressed") == "true"
    assert paint(page) == before


def test_a_patch_that_adds_nothing_colours_no_word(page: Any, why: Explanation) -> None:
    shares = np.array([word.patch_shares for word in why.words])
    weakest = int(np.abs(shares).max(0).argmin())
    move(page, cells(page)[weakest])
    script = "return getComputedStyle(arguments[0]).borderBottomColor"
    colours = [page.execute_script(script, word) for word in words(page)]
    strengths = [float(re.findall("[0-9.]+", c)[3]) for c in colours if "rgba" in c]
    assert len(strengths) == len(colours)
    allowed = np.abs(shares[:, weakest]).max() / np.abs(shares).max()
    assert max(strengths) <= allowed + 0.02
    assert "\N{MINUS SIGN}0.000" not in page.find_element(By.CSS_SELECTOR, ".words").text


def test_a_word_that_looks_like_a_script_ends_nothing(browser: Any, why: Explanation, tmp_path: Path) -> None:
    hostile = [replace(word, text="<!--<script>") for word in why.words]
    replace(why, words=hostile).save(tmp_path / "hostile.html")
    browser.get((tmp_path / "hostile.html").as_uri())
    assert len(browser.find_elements(By.CSS_SELECTOR, ".modes button")) >= 3
    assert words(browser)[0].text.startswith("<!--<script>")


def test_on_a_phone_the_picture_stays_in_sight(browser: Any, tmp_path: Path) -> None:
    caption = " ".join(CAPTIONS * 3)
    picture = PIL.Image.new("RGB", (40, 400))
    model = tiny_laps(tokenizer=bert_tokenizer())
    laps.explain(model, picture, caption).save(tmp_path / "long.html")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 700, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        browser.get((tmp_path / "long.html").as_uri())
        last = words(browser)[-2]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", last)
        frame = "document.querySelector('.frame').getBoundingClientRect()"
        place = browser.execute_script(f"const r = {frame}; return [r.top, r.bottom, r.height]")
        assert place[0] >= 0
        assert 100 < place[2] <= 351
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_several_on_one_page_do_not_mix(browser: Any, why: Explanation, tmp_path: Path) -> None:
    from laps.explanation_view import fragment

    other = laps.explain(tiny_laps(tokenizer=bert_tokenizer()), PIL.Image.new("RGB", (32, 32)), CAPTIONS[2])
    file = tmp_path / "two.html"
    file.write_text(f"<!doctype html><body>{fragment(why)}{fragment(other)}</body>", encoding="utf-8")
    browser.get(file.as_uri())
    views = browser.find_elements(By.CSS_SELECTOR, ".laps-why")
    assert [len(view.find_elements(By.CSS_SELECTOR, ".words button")) for view in views] == [
        len(why.words),
        len(other.words),
    ]
    move(browser, views[1].find_elements(By.CSS_SELECTOR, ".words button")[1])
    assert views[1].find_element(By.CSS_SELECTOR, ".note").text.startswith("“two” adds")
    assert views[0].find_element(By.CSS_SELECTOR, ".note").text.startswith("Point at a word")


def luminance(colour: str) -> float:
    channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(page: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    for selector, behind in (
        (".note", None),
        (".sum", None),
        (".words small", ".words button"),
        (".scale", None),
    ):
        of = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        text = page.execute_script(of, selector, "color")
        under = page.execute_script(of, behind, "backgroundColor") if behind else ground
        low, high = sorted([luminance(text), luminance(under)])
        # WCAG AA.
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def test_a_phone_needs_no_sideways_scrolling(page: Any) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True},
    )
    wide = page.execute_script("return document.documentElement.scrollWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 360
