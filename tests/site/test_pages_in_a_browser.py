"""The web page in a real browser, opened from the disk.

Run with ``make site-test``: it needs playwright and a Chromium, which ``make test`` does not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from course_lib.explorers import frames
from notebook_tools import ROOT, lessons

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

SITE = ROOT / "build" / "site"
AXE = ROOT / "build" / "axe" / "package" / "axe.min.js"
if not (SITE / "index.html").exists():
    pytest.skip("first: make site", allow_module_level=True)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
LESSONS = [f"notebooks/{path.stem}.html" for path in lessons()]
OTHERS = [
    "index.html", "start.html", "faq.html", "glossary.html", "formulas.html", "cite.html",
    "changelog.html", "reference/index.html", "reference/parallel.html", "search.html",
]  # fmt: skip
KINDS = [
    "index.html", "start.html", "glossary.html", "formulas.html", "reference/timeline.html",
    "teaching/index.html", LESSONS[0], LESSONS[2], LESSONS[-1],
]  # fmt: skip
A4 = 718  # pixels between margins of a centimetre


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser: sync_api.Browser, name: str, **options: object) -> sync_api.Page:
    """A page; the test fails if it asks another machine for anything."""
    page = browser.new_page(**options)
    page.on("request", lambda request: _is_here(request.url))
    name, _, query = name.partition("?")
    page.goto(f"{(SITE / name).as_uri()}?{query}")
    return page


def _is_here(url: str) -> None:
    assert url.startswith(("file:", "data:", "blob:")), url


def wake(page: sync_api.Page) -> sync_api.Locator:
    """The page's explorer, once its drawings are there."""
    page.evaluate("document.querySelector('.explorer').previousElementSibling.scrollIntoView()")
    page.locator(".explorer.live").wait_for()
    return page.locator(".explorer")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", OTHERS + LESSONS)
def test_a_page_is_no_wider_than_the_screen(browser, name: str, width: int) -> None:
    page = open_page(browser, name, viewport={"width": width, "height": 800})
    wide = page.evaluate(
        "() => [...document.querySelectorAll('article *')]"
        ".filter(e => document.documentElement.scrollWidth > innerWidth"
        " && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 90))"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width, wide[:3]
    page.close()


@pytest.mark.parametrize("name", LESSONS)
def test_a_key_moves_a_slider_and_the_picture_with_it(browser, name: str) -> None:
    page = open_page(browser, name)
    if not page.locator(".explorer").count():
        pytest.skip("its pictures are not kept")
    explorer = wake(page)
    picture, said = explorer.locator(".drawing"), explorer.get_by_role("status")
    kept = frames.read(frames.path_of(explorer.get_attribute("data-name")))
    before = picture.inner_html()
    first = kept.controls[0]
    slider = explorer.get_by_role("slider", name=first["label"], exact=True)
    assert slider.get_attribute("aria-valuetext") == first["options"][first["start"]]
    slider.focus()
    slider.press("Home")
    if first["start"] == 0:
        slider.press("ArrowRight")
    words = f"{first['label']}: {first['options'][1 if first['start'] == 0 else 0]}"
    assert words in picture.get_attribute("aria-label")
    assert said.text_content() in picture.get_attribute("aria-label")
    assert said.text_content() in kept.titles
    assert picture.inner_html() != before
    page.close()


def test_a_pointer_moves_a_slider_too(browser) -> None:
    page = open_page(browser, LESSONS[0])
    explorer = wake(page)
    explorer.get_by_role("slider").first.scroll_into_view_if_needed()
    box = explorer.get_by_role("slider").first.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    assert explorer.locator(".value").first.text_content() == "16"
    page.close()


def test_without_a_script_the_lesson_shows_its_own_picture(browser) -> None:
    page = open_page(browser, LESSONS[0], java_script_enabled=False)
    assert page.locator("img[alt^='An explorer']").is_visible()
    assert not page.locator(".explorer").is_visible()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", KINDS)
def test_axe_finds_nothing_serious(browser, name: str, scheme: str) -> None:
    if not AXE.exists():
        pytest.skip("axe-core is not there: make site-test fetches it with npm")
    page = open_page(browser, name, color_scheme=scheme)
    if page.locator(".explorer").count():
        wake(page)
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run()")["violations"]
    bad = [
        (each["id"], each["nodes"][0]["html"][:200], len(each["nodes"]))
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert bad == []
    page.close()


@pytest.mark.parametrize("name", LESSONS)
def test_on_paper_no_line_of_code_is_cut(browser, name: str) -> None:
    page = open_page(browser, name, viewport={"width": A4, "height": 1000})
    page.emulate_media(media="print")
    cut = page.evaluate(
        "() => [...document.querySelectorAll('pre')]"
        ".filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1)"
        ".map(e => e.textContent.slice(0, 80))"
    )
    assert cut == []
    page.close()


def test_the_search_finds_a_lesson(browser) -> None:
    page = open_page(browser, "search.html?q=reduce-scatter")
    page.get_by_role("link", name="All-reduce by hand").first.wait_for()
    page.close()


def test_a_word_of_the_glossary_leads_to_it(browser) -> None:
    page = open_page(browser, LESSONS[2])
    page.locator("a.word").first.click()
    page.wait_for_url("**/glossary.html#word-*")
    page.close()
