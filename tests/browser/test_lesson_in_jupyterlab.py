"""A lesson in a real browser: run it, move a slider, answer an exercise, save, reopen.

Run with ``make browser``: it needs playwright and a Chromium, which ``make test`` does not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import nbformat
import pytest

import lab

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

FOLDER = lab.ROOT / "build" / "browser"
LESSON = FOLDER / "00_meet_your_gpus.ipynb"
MINUTES = 60_000  # milliseconds
ANSWER = "import math\ndef largest_side(free_bytes):\n    return math.isqrt(free_bytes // 4)"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a Jupyter server as ``make lab`` starts it."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    nbformat.write(lab.without_outputs(lab.NOTEBOOKS / LESSON.name), LESSON)
    flags = [
        f"--ServerApp.root_dir={lab.ROOT}",
        "--no-browser", "--allow-root", "--IdentityProvider.token=", "--ServerApp.port=0",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "COURSE_DEVICES": "virtual",
            "JUPYTER_CONFIG_PATH": str(lab.ROOT / "tools" / "jupyter"),
        },
    )
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"http://(?:localhost|127\.0\.0\.1):\d+", line)
        if found:
            break
    yield found.group()
    process.terminate()
    process.wait()


@pytest.fixture
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser, server: str) -> sync_api.Page:
    return open_lesson(browser, server)


def open_lesson(browser: sync_api.Browser, server: str) -> sync_api.Page:
    """The lesson in a window of its own, as on another day: nothing is remembered."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(MINUTES)
    page.goto(f"{server}/lab/tree/{LESSON.relative_to(lab.ROOT).as_posix()}?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    return page


def cell(page: sync_api.Page, cell_id: str) -> sync_api.Locator:
    """The cell of the page, scrolled to; JupyterLab makes only those that are in view."""
    index = [each["id"] for each in nbformat.read(LESSON, 4).cells].index(cell_id)
    found = page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{index}"]')
    area = page.locator(".jp-WindowedPanel-outer")
    area.evaluate("area => { area.scrollTop = 0 }")
    while not found.count():
        area.evaluate("area => { area.scrollTop += 400 }")
        page.evaluate("() => new Promise(requestAnimationFrame)")
    found.scroll_into_view_if_needed()
    return found


def saved(page: sync_api.Page) -> dict[str, nbformat.NotebookNode]:
    # JupyterLab stores where its windows are with a PUT as well.
    with page.expect_response(
        lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url
    ):
        page.get_by_role("button", name="Save and create checkpoint").click()
    return {each["id"]: each for each in nbformat.read(LESSON, 4).cells}


def answer(page: sync_api.Page, cell_id: str, source: str) -> None:
    """Type an answer in place of what stands in a cell, then run it and the check below."""
    cell(page, cell_id).locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(source)
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")


def test_a_lesson_runs_its_slider_moves_answers_are_judged_and_all_is_there_when_reopened(
    browser: sync_api.Browser, page: sync_api.Page, server: str
) -> None:
    page.get_by_text("| Idle").wait_for()  # what is run before the kernel is there is forgotten
    page.get_by_role("button", name="Restart the kernel and run all cells").click()
    page.locator(".jp-Dialog .jp-mod-accept").click()

    explorer = cell(page, "explorer")
    explorer.locator("img[alt*='side of the matrices: 256']").wait_for(timeout=5 * MINUTES)
    cell(page, "check-fits").get_by_text("not attempted").wait_for()
    explorer = cell(page, "explorer")
    side = explorer.get_by_role("slider", name="side of the matrices")
    side.press("ArrowRight")
    explorer.locator("img[alt*='side of the matrices: 512']").wait_for()
    assert side.get_attribute("aria-valuetext") == "512", "and not its place in a list"

    answer(page, "ex-fits", ANSWER.replace("free_bytes // 4", "free_bytes // 8"))
    cell(page, "check-fits").get_by_text("there is room for a larger one").wait_for()
    answer(page, "ex-fits", ANSWER)
    cell(page, "check-fits").get_by_text("it fits, and nothing larger would").wait_for()

    cells = saved(page)
    (output,) = cells["explorer"].outputs
    assert "image/png" in output.data and WIDGET_VIEW not in output.data
    assert cells["ex-fits"].source == ANSWER
    assert not [out for each in cells.values() for out in each.get("outputs", [])
                if out.output_type == "error"]  # fmt: skip
    page.close()

    page = open_lesson(browser, server)
    picture = cell(page, "explorer").locator("img")
    picture.wait_for()
    assert picture.evaluate("img => img.naturalWidth") > 0
    assert cell(page, "explorer").get_by_text("model not found").count() == 0
    cell(page, "ex-fits").get_by_text("math.isqrt(free_bytes // 4)").wait_for()
    cell(page, "check-fits").get_by_text("it fits, and nothing larger would").wait_for()


def test_every_picture_of_the_page_is_found(page: sync_api.Page) -> None:
    broken = page.evaluate(
        "() => [...document.querySelectorAll('.jp-Notebook img')]"
        ".filter(img => img.complete && !img.naturalWidth).map(img => img.src)"
    )
    assert broken == []
