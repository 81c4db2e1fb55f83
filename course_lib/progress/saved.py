"""What the notebooks of a class say of their learners' exercises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.exercises.verdict import NOT_ATTEMPTED, RIGHT, WRONG
from course_lib.progress.lessons import Exercise, Lesson, cells_of, text_of

NOT_RUN, MISSING = "not run", "missing"
STATES = [MISSING, NOT_RUN, NOT_ATTEMPTED, WRONG, RIGHT]  # from least to most


@dataclass
class Work:
    """One learner's copy of one lesson.

    Attributes:
        learner: their name, from the folder's or the file's.
        lesson: which one.
        path: the file.
        states: one of :data:`STATES` for each exercise, by its name.
        cells: the notebook's.
    """

    learner: str
    lesson: Lesson
    path: Path
    cells: list[dict[str, Any]]
    states: dict[str, str] = field(default_factory=dict)

    @property
    def solved(self) -> int:
        """How many exercises are right."""
        return list(self.states.values()).count(RIGHT)


@dataclass
class Class:
    """What was found in a folder.

    Attributes:
        works: the copies of lessons, by learner and lesson's stem.
        learners: all names, also of those who have no notebook.
        notes: a line for each file that could not be counted as it is.
    """

    works: dict[tuple[str, str], Work] = field(default_factory=dict)
    learners: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_class(folder: Path, lessons: list[Lesson]) -> Class:
    """Read all notebooks below ``folder``, which stay as they are.

    Raises:
        ValueError: there is no such folder, or nobody is in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found = Class()
    names = {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
    for path, lesson in _copies(folder, lessons):
        learner = _learner(path, folder, lesson)
        names.add(learner)
        where = path.relative_to(folder)
        try:
            work = Work(learner, lesson, path, cells_of(path))
        except ValueError as error:
            found.notes.append(f"{where} {error}")
            continue
        work.states = {exercise.name: state_of(work, exercise) for exercise in lesson.exercises}
        found.notes += [f"{where}: {note}" for note in _doubts(work)]
        other = found.works.get((learner, lesson.stem))
        if other is not None:
            better = max(other, work, key=lambda each: each.solved)
            found.notes.append(
                f"{learner} has lesson {lesson.number} twice: {better.path.relative_to(folder)} "
                "counts, which has more right"
            )
            work = better
        found.works[learner, lesson.stem] = work
    found.learners = sorted(names, key=str.casefold)
    if not found.learners:
        raise ValueError(f"{folder} holds neither a learner's folder nor a lesson's notebook")
    return found


def _copies(folder: Path, lessons: list[Lesson]) -> Iterator[tuple[Path, Lesson]]:
    """The notebooks of lessons; not Jupyter's checkpoints, nor what ``make fresh`` put aside."""
    for path in sorted(folder.rglob("*.ipynb")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or re.search(r"\.old\d+$", path.stem):
            continue
        for lesson in lessons:
            if lesson.stem in path.stem:
                yield path, lesson


def _learner(path: Path, folder: Path, lesson: Lesson) -> str:
    """Whose it is: the folder below the class's, or what stands before the lesson's name."""
    parts = path.relative_to(folder).parts
    if len(parts) > 1:
        return parts[0]
    before = path.stem.partition(lesson.stem)[0].rstrip("_- ")
    return before or folder.resolve().name


def state_of(work: Work, exercise: Exercise) -> str:
    """What the saved notebook says of one exercise."""
    check = _cell(work, f"check-{exercise.name}")
    if check is None or _cell(work, f"ex-{exercise.name}") is None:
        return MISSING
    said = [
        text_in(output["data"].get("text/plain", ""))
        for output in check.get("outputs", [])
        if "data" in output
    ]
    for state in (RIGHT, WRONG, NOT_ATTEMPTED):
        if any(text.startswith(f"{state}:") for text in said):
            return state
    return NOT_RUN


def text_in(value: str | list[str]) -> str:
    """A text of a notebook's file, which may stand there in lines."""
    return value if isinstance(value, str) else "".join(value)


def answer_of(work: Work, exercise: Exercise) -> str | None:
    """What the learner wrote, or ``None`` where the cell is gone or as it was."""
    cell = _cell(work, f"ex-{exercise.name}")
    if cell is None or text_of(cell).strip() == exercise.stub.strip():
        return None
    return text_of(cell)


def own_cells(work: Work) -> list[str]:
    """The code cells that the learner added to the lesson."""
    return [
        text_of(cell)
        for cell in work.cells
        if cell["cell_type"] == "code" and cell["id"] not in work.lesson.cell_ids
    ]


def _cell(work: Work, cell_id: str) -> dict[str, Any] | None:
    return next((cell for cell in work.cells if cell["id"] == cell_id), None)


def _doubts(work: Work) -> Iterator[str]:
    """Verdicts that may be of another answer than the one that stands there."""
    for name, state in work.states.items():
        answer, check = _cell(work, f"ex-{name}"), _cell(work, f"check-{name}")
        if answer is None or check is None or state in (NOT_RUN, NOT_ATTEMPTED):
            continue
        ran, checked = answer.get("execution_count"), check.get("execution_count")
        if ran is None or checked is None or ran > checked:
            yield f"{name} was run again after its check, which said {state}"
