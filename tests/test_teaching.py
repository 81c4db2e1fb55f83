"""The guide for teachers adds up, and leads to headings that are there."""

from __future__ import annotations

import re
from functools import cache

import nbformat
import pytest

from notebook_tools import NOTEBOOKS, ROOT

GUIDE = (ROOT / "docs" / "teaching" / "README.md").read_text(encoding="utf-8")


def rows_of(text: str) -> list[list[str]]:
    """The cells of each row that begins with minutes."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and row[0].isdecimal()]


PATHS = {
    title: rows_of(text)
    for title, text in re.findall(r"^### (.+?)\n(.*?)(?=^##)", GUIDE, re.MULTILINE | re.DOTALL)
    if "minutes" in title
}


@cache
def headings(lesson: str) -> list[str]:
    """Of the second and the third rank, in order."""
    cells = nbformat.read(NOTEBOOKS / lesson, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^##+ (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("title", PATHS)
def test_a_path_takes_the_minutes_that_it_says(title: str) -> None:
    said = re.search(r"(\d+) minutes", title)
    assert said and sum(int(row[0]) for row in PATHS[title]) == int(said[1])


@pytest.mark.parametrize("title", PATHS)
def test_nobody_sits_for_more_than_two_hours_without_a_break(title: str) -> None:
    since = 0
    for minutes, what, *_ in PATHS[title]:
        is_break = what in ("break", "lunch") or "second day" in what
        since = 0 if is_break else since + int(minutes)
        assert since <= 120, what


ROWS = [(title, *row[1:]) for title, rows in PATHS.items() for row in rows if row[1][0] == "["]


@pytest.mark.parametrize("title, what, first, last, how", ROWS)
def test_a_row_names_headings_of_its_lesson_in_their_order(title, what, first, last, how) -> None:
    (lesson,) = re.findall(r"notebooks/(\S+\.ipynb)\)", what)
    found = headings(lesson)
    assert found.index(first) <= found.index(last)
    assert how in ("together", "show", "alone")
