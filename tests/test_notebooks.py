"""Every lesson has the canonical form, its exercises work, and its prose talks down to nobody."""

import re
from pathlib import Path

import nbformat
import pytest

from notebook_tools import (
    execute,
    exercises,
    file_problems,
    lessons,
    said,
    with_solutions,
    without_measurements,
)

each_lesson = pytest.mark.parametrize("path", lessons(), ids=[path.stem for path in lessons()])

# What is obvious to the author is not to the reader, and the sentence is as true without them.
BELITTLING = re.compile(r"\b(simply|just|obviously|trivially)\b", re.IGNORECASE)
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)


@each_lesson
def test_is_canonical(path: Path):
    assert file_problems(path) == [], "make notebooks mends most of these"


@each_lesson
def test_exercises_have_their_form_and_are_not_attempted(path: Path):
    nb = nbformat.read(path, as_version=4)
    for exercise in exercises(nb):
        verdict = said(nb.cells[exercise.check_index])
        assert verdict.lower().startswith("not attempted"), (exercise.name, verdict)


@each_lesson
def test_exercises_are_right_with_their_solutions(path: Path):
    nb = nbformat.read(path, as_version=4)
    if not exercises(nb):
        pytest.skip("no exercises: nbval runs this lesson as it is")
    nb = execute(with_solutions(without_measurements(nb)))
    for exercise in exercises(nbformat.read(path, as_version=4)):
        verdict = said(nb.cells[exercise.check_index])
        assert verdict.lower().startswith("right"), (exercise.name, verdict)


@each_lesson
def test_prose_does_not_belittle(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            words = BELITTLING.findall(FENCE.sub("", cell.source))
            assert not words, (cell.id, words)
