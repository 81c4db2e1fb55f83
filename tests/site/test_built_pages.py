"""The web page that ``make site`` built: links lead somewhere, and nothing comes from afar."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import explorer_frames
from course_lib.explorers import frames
from notebook_tools import ROOT, exercises, lessons

SITE = ROOT / "build" / "site"
if not (SITE / "index.html").exists():
    pytest.skip("first: make site", allow_module_level=True)

PAGES = sorted(SITE.rglob("*.html"))
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}
of_each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda path: path.relative_to(SITE).as_posix()
)


class Page(HTMLParser):
    """The places, links, pictures and loaded files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.images: list[dict[str, str]] = []
        self.explorers: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = {key: value or "" for key, value in attrs}
        self.ids |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(LOADED.get(tag, "")):
            self.loaded.append(values[LOADED[tag]])
        if tag == "img":
            self.images.append(values)
        if values.get("class") == "explorer":
            self.explorers.append(values["data-source"])


@cache
def read(path: Path) -> Page:
    return Page(path)


def broken(page: Path, link: str) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_file():
        return True
    is_place = parts.fragment and target.suffix == ".html"
    return bool(is_place) and unquote(parts.fragment) not in read(target).ids | {""}


@of_each_page
def test_every_link_of_the_page_leads_somewhere(page: Path) -> None:
    found = read(page)
    assert [link for link in found.links + found.loaded if broken(page, link)] == []


@of_each_page
def test_nothing_is_loaded_from_elsewhere(page: Path) -> None:
    afar = [url for url in read(page).loaded if re.match(r"(https?:)?//", url)]
    assert afar == []


def test_no_style_loads_anything_from_elsewhere() -> None:
    for path in SITE.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", text), path.name


@of_each_page
def test_every_picture_has_words(page: Path) -> None:
    assert [image["src"] for image in read(page).images if not image.get("alt", "").strip()] == []


@of_each_page
def test_a_table_is_drawn_as_one(page: Path) -> None:
    assert "<p>| " not in page.read_text(encoding="utf-8")


def test_no_page_is_missing() -> None:
    built = {path.relative_to(SITE / "notebooks").stem for path in (SITE / "notebooks").glob("*")}
    assert built >= {path.stem for path in lessons()}


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_a_lesson_has_its_solutions_folded_and_its_sliders(lesson: Path) -> None:
    import nbformat

    notebook = nbformat.read(lesson, as_version=4)
    html = (SITE / "notebooks" / f"{lesson.stem}.html").read_text(encoding="utf-8")
    assert html.count("<summary>Solution</summary>") == len(exercises(notebook))
    shown = sum("explore_" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    page = read(SITE / "notebooks" / f"{lesson.stem}.html")
    assert len(page.explorers) == shown


@pytest.mark.parametrize("name", explorer_frames.makers())
def test_every_position_of_an_explorer_has_its_frame(name: str) -> None:
    path = frames.path_of(name)
    assert path.exists(), f"run: make frames EXPLORER={name}"
    kept = frames.read(path)
    explorer = explorer_frames.makers()[name]()
    assert len(kept.frames) == len(kept.titles) == len(list(explorer_frames.positions(explorer)))
    assert all(frame.startswith("<svg") for frame in kept.frames)
    assert kept.controls == explorer_frames.described(explorer)
    script = SITE / "frames" / f"{name}.js"
    assert script.stat().st_size <= explorer_frames.MOST_BYTES
