"""What was found, as a table to read and as a file for a gradebook."""

from __future__ import annotations

import csv
from pathlib import Path

from course_lib.exercises.verdict import NOT_ATTEMPTED, RIGHT, WRONG
from course_lib.progress.lessons import Lesson
from course_lib.progress.saved import MISSING, NOT_RUN, Class

SYMBOLS = {RIGHT: "✓", WRONG: "✗", NOT_ATTEMPTED: "○", NOT_RUN: "·", MISSING: "-"}
LEGEND = "  ".join(f"{symbol} {state}" for state, symbol in SYMBOLS.items())


def states_of(found: Class, learner: str, lesson: Lesson) -> dict[str, str]:
    """The state of each exercise of a lesson; all are missing where there is no notebook."""
    work = found.works.get((learner, lesson.stem))
    return work.states if work else {each.name: MISSING for each in lesson.exercises}


def _begun(found: Class, lessons: list[Lesson]) -> list[Lesson]:
    """Those that somebody has handed in: of a workshop's two, not fourteen that say nothing."""
    return [each for each in lessons if any(stem == each.stem for _, stem in found.works)]


def as_text(found: Class, lessons: list[Lesson]) -> str:
    """A line for each learner, a column for each lesson that somebody has begun."""
    begun = _begun(found, lessons)
    rows = [["learner", *(lesson.number for lesson in begun), "solved"]]
    for learner in found.learners:
        states = [states_of(found, learner, lesson) for lesson in begun]
        marks = ["".join(SYMBOLS[state] for state in each.values()) for each in states]
        solved = sum(list(each.values()).count(RIGHT) for each in states)
        rows.append([learner, *marks, f"{solved} of {sum(map(len, states))}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", LEGEND])


def write_csv(found: Class, lessons: list[Lesson], path: Path) -> None:
    """A row for each learner: the state of each exercise that came, and how many are right."""
    lessons = _begun(found, lessons)
    exercises = [f"{lesson.number} {each.name}" for lesson in lessons for each in lesson.exercises]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["learner", *exercises, "solved", "of"])
        for learner in found.learners:
            states = [s for lesson in lessons for s in states_of(found, learner, lesson).values()]
            writer.writerow([_inert(learner), *states, states.count(RIGHT), len(states)])


def _inert(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[0] in "=+-@" else name
