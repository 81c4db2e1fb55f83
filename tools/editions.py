"""Editions of the lessons for a class, made from the one source.

    python tools/editions.py FOLDER

``FOLDER/student`` gets each lesson without outputs and without solutions, ``FOLDER/answers.md`` the
answers: what each prediction came to, and the hint and the solution of each exercise. In words a
prediction is answered by the notes for teachers, docs/teaching/lessons/.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from lab import without_outputs
from notebook_tools import ROOT, dumps, exercises, folder_of, lessons, said

GUESS = re.compile(r"^(guess_\w+) = None(?:  # (.*))?$", re.MULTILINE)
_ROW = re.compile(r"^\| \d+ \| (.+?) \| (.+?) \| (.*?) ?\|$", re.MULTILINE)
_OBJECT = re.compile(r"<(Figure|IPython)")  # what stands for a picture or a table


@dataclass(frozen=True)
class Answer:
    """A prediction in the notes for teachers: what is asked, what comes out, and what tempts."""

    asked: str
    outcome: str
    tempting: str


def answers_of(lesson: Path) -> list[Answer]:
    """One for each guess of the lesson, in their order."""
    notes = ROOT / "docs" / "teaching" / "lessons" / f"{lesson.name[:2]}.md"
    return [Answer(*row) for row in _ROW.findall(notes.read_text(encoding="utf-8"))]


def guesses(nb: NotebookNode) -> list[tuple[str, str]]:
    """The name and the question of each guess of a lesson, in their order."""
    code = (cell.source for cell in nb.cells if cell.cell_type == "code")
    return [guess for source in code for guess in GUESS.findall(source)]


def student_edition(lesson: Path) -> NotebookNode:
    """The lesson without outputs, with the hints and without the solutions."""
    nb = without_outputs(lesson)
    for exercise in exercises(nb):
        (answer,) = [cell for cell in nb.cells if cell.id == f"sol-{exercise.name}"]
        answer.source = (
            f"<details><summary>Hint</summary>\n\n{exercise.hint}\n\n</details>\n\n"
            "The solution is in the answer key."
        )
    return nb


def answer_key(paths: list[Path]) -> str:
    """What the predictions of the lessons come to, and the solutions of their exercises."""
    parts = ["# Answers\n\nWhat each prediction comes to, and a solution of each exercise."]
    for path in paths:
        nb = nbformat.read(path, as_version=4)
        parts.append(f"## {_title(nb)}")
        parts += _predictions(nb, answers_of(path))
        for exercise in exercises(nb):
            parts += [
                f"### Exercise: {_heading(nb, exercise.stub_index)}",
                f"Hint: {exercise.hint}",
                f"```python\n{exercise.solution}\n```",
            ]
    return "\n\n".join(parts) + "\n"


def _predictions(nb: NotebookNode, answers: list[Answer]) -> Iterator[str]:
    """Each guess, its answer in words, and the lines that the committed lesson prints."""
    for number, ((name, asked), answer) in enumerate(zip(guesses(nb), answers, strict=True), 1):
        tempting = f" (Tempting: {answer.tempting}.)" if answer.tempting else ""
        yield f"### Prediction {number}: {asked or answer.asked}\n\n**{answer.outcome}**{tempting}"
        uses = [cell for cell in nb.cells if cell.cell_type == "code" and name in cell.source]
        lines = "\n".join(said(cell) for cell in uses).splitlines()
        text = "\n".join(line for line in lines if not _OBJECT.match(line)).strip("\n")
        if text:
            yield f"```text\n{text}\n```"


def _title(nb: NotebookNode) -> str:
    return nb.cells[0].source.splitlines()[0].removeprefix("# ")


def _heading(nb: NotebookNode, before: int) -> str:
    """The last heading above a cell."""
    lines = [
        line
        for cell in nb.cells[:before]
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("### ")
    ]
    return lines[-1].removeprefix("### ")


def main(arguments: list[str]) -> None:
    folder = folder_of(arguments, "say where the editions go: python tools/editions.py FOLDER")
    (folder / "student").mkdir(parents=True, exist_ok=True)
    for lesson in lessons():
        text = dumps(student_edition(lesson))
        (folder / "student" / lesson.name).write_text(text, encoding="utf-8", newline="\n")
    key = folder / "answers.md"
    key.write_text(answer_key(lessons()), encoding="utf-8", newline="\n")
    print(f"{len(lessons())} lessons without solutions in {folder / 'student'}, answers in {key}")


if __name__ == "__main__":
    main(sys.argv[1:])
