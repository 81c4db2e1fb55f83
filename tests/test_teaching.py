"""The guide for teachers adds up, and leads to headings that are there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

from editions import GUESS, answers_of, guesses
from notebook_tools import NOTEBOOKS, ROOT, lessons, said

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


def sources(lesson: str, first: str, last: str) -> list[str]:
    """Of the code cells from the heading ``first`` to the end of the part ``last``."""
    found: list[str] = []
    part, begun, rank = "", False, 9
    for cell in nbformat.read(NOTEBOOKS / lesson, as_version=4).cells:
        heading = re.search(r"^(##+) (.+)$", cell.source, re.MULTILINE)
        if cell.cell_type == "markdown" and heading:
            if part == last and begun and len(heading[1]) <= rank:
                break
            begun = begun or heading[2] == first
            if part != last:
                part, rank = heading[2], len(heading[1])
        if begun and cell.cell_type == "code":
            found.append(cell.source)
    return found


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


of_each_row = pytest.mark.parametrize("title, what, first, last, how, predictions", ROWS)


@of_each_row
def test_a_row_names_headings_of_its_lesson_in_their_order(
    title, what, first, last, how, predictions
) -> None:
    (lesson,) = re.findall(r"notebooks/(\S+\.ipynb)\)", what)
    found = headings(lesson)
    assert found.index(first) <= found.index(last)
    assert how in ("together", "show", "alone")


@of_each_row
def test_a_row_says_which_predictions_it_meets_and_which_it_leaves_open(
    title, what, first, last, how, predictions
) -> None:
    (lesson,) = re.findall(r"notebooks/(\S+\.ipynb)\)", what)
    numbers = {
        name: number
        for number, (name, _) in enumerate(guesses(nbformat.read(NOTEBOOKS / lesson, 4)), 1)
    }
    asked = [name for source in sources(lesson, first, last) for name, _ in GUESS.findall(source)]
    rows = [row[2:4] for row in ROWS if row[:2] == (title, what)]
    run = re.findall(r"\bguess_\w+", "\n".join("\n".join(sources(lesson, *row)) for row in rows))
    is_open = [numbers[name] for name in asked if run.count(name) == 1]
    expected = in_words([numbers[name] for name in asked])
    assert predictions == expected + (f" (tell {in_words(is_open)})" if is_open else "")


def in_words(numbers: list[int]) -> str:
    """Numbers in a row, as the guide has them."""
    assert numbers == list(range(1, max(numbers, default=0) + 1))[-len(numbers) :] or not numbers
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else ", ".join(map(str, numbers))


NOTES = sorted((ROOT / "docs" / "teaching" / "lessons").glob("*.md"))
PARTS = [
    "The predictions",
    "What people get wrong",
    "On the projector",
    "If time is short",
    "Ask the room",
    "Where to stop",
]
WITH_UNIT = re.compile(
    r"\d[\d,.]*(?=(?: ?%| ms| MB| kB| times| tokens| bytes| sequences| all-reduces| S\b))"
)


def lesson_of(notes: Path) -> nbformat.NotebookNode:
    (path,) = NOTEBOOKS.glob(f"{notes.stem}_*.ipynb")
    return nbformat.read(path, as_version=4)


def test_each_lesson_has_notes_for_teachers() -> None:
    assert [notes.stem for notes in NOTES] == [path.name[:2] for path in lessons()]


@pytest.mark.parametrize("notes", NOTES, ids=lambda path: path.stem)
def test_notes_have_the_parts_that_a_teacher_looks_for(notes: Path) -> None:
    text = notes.read_text("utf-8")
    assert text.splitlines()[0] == lesson_of(notes).cells[0].source.splitlines()[0]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == PARTS


@pytest.mark.parametrize("notes", NOTES, ids=lambda path: path.stem)
def test_each_guess_is_answered_by_a_result_that_stands_in_the_lesson(notes: Path) -> None:
    nb = lesson_of(notes)
    (path,) = NOTEBOOKS.glob(f"{notes.stem}_*.ipynb")
    answers = answers_of(path)
    assert len(answers) == len(guesses(nb)) > 0, "a row for each guess of the lesson"
    results = [answer.outcome for answer in answers]
    everything = "\n".join(cell_text(cell) for cell in nb.cells)
    for number in WITH_UNIT.findall("\n".join(results)):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", everything), number


@pytest.mark.parametrize("notes", NOTES, ids=lambda path: path.stem)
def test_what_notes_call_by_name_are_headings_and_exercises_of_the_lesson(notes: Path) -> None:
    nb = lesson_of(notes)
    titles = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    after = notes.read_text("utf-8").partition("## What people get wrong")[2]
    for name in re.findall(r"(?<![*\w])\*([A-Z1][^*]+)\*(?!\*)", after.replace("\n", " ")):
        name = re.sub(r" +", " ", name)
        assert re.search(rf"^##+ .*{re.escape(name)}", titles, re.MULTILINE), name


def cell_text(cell: nbformat.NotebookNode) -> str:
    """What stands in a cell and below it, tables included."""
    outputs = cell.get("outputs", [])
    tables = [output.get("data", {}).get("text/markdown", "") for output in outputs]
    return "\n".join([cell.source, said(cell) if outputs else "", *tables])


@of_each_row
def test_a_row_answers_no_guess_that_the_path_did_not_ask(
    title, what, first, last, how, predictions
) -> None:
    """A cell that prints a guess beside its result stops where nobody was asked for one."""
    (lesson,) = re.findall(r"notebooks/(\S+\.ipynb)\)", what)
    rows = [row[2:4] for row in ROWS if row[:2] == (title, what)]
    run = [source for row in rows for source in sources(lesson, *row)]
    asked = re.findall(r"^(guess_\w+) *=", "\n".join(run), re.MULTILINE)
    shown = re.findall(r"\bguess_\w+", "\n".join(sources(lesson, first, last)))
    assert set(shown) <= set(asked)
