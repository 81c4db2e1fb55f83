"""Editions of the lessons for a class, made from the one source.

    python tools/editions.py FOLDER

``FOLDER/student`` gets each lesson without outputs and without solutions, ``FOLDER/answers.md`` the
answers: what each prediction came to, and the hint and the solution of each exercise.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from lab import without_outputs
from notebook_tools import dumps, exercises, lessons, said

GUESS = re.compile(r"^(guess_\w+) = None(?:  # (.*))?$", re.MULTILINE)


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
        parts += _predictions(nb)
        for exercise in exercises(nb):
            parts += [
                f"### Exercise: {_heading(nb, exercise.stub_index)}",
                f"Hint: {exercise.hint}",
                f"```python\n{exercise.solution}\n```",
            ]
    return "\n\n".join(parts) + "\n"


def _predictions(nb: NotebookNode) -> Iterator[str]:
    """Each guess with the lines that answer it, as the committed lesson prints them."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for cell in code:
        for name, asked in GUESS.findall(cell.source):
            uses = [other for other in code if other is not cell and name in other.source]
            lines = "\n".join(map(said, uses)).splitlines()
            text = "\n".join(line for line in lines if not line.startswith("<Figure"))
            yield f"### Prediction: {asked or name}\n\n```text\n{text}\n```"


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
    if len(arguments) != 1:
        raise SystemExit("say where the editions go: python tools/editions.py FOLDER")
    folder = Path(arguments[0])
    (folder / "student").mkdir(parents=True, exist_ok=True)
    for lesson in lessons():
        text = dumps(student_edition(lesson))
        (folder / "student" / lesson.name).write_text(text, encoding="utf-8", newline="\n")
    key = folder / "answers.md"
    key.write_text(answer_key(lessons()), encoding="utf-8", newline="\n")
    print(f"{len(lessons())} lessons without solutions in {folder / 'student'}, answers in {key}")


if __name__ == "__main__":
    main(sys.argv[1:])
