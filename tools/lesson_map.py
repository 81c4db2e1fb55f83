"""The map of the lessons, from their first cells: which needs which, and how many minutes."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Points of the drawing.
_WIDTH, _BOX, _HEIGHT, _GAP = 760, 216, 50, 34
_ABREAST = 3  # boxes in a row


@dataclass(frozen=True)
class Lesson:
    """What a lesson's first cell says.

    Attributes:
        name: of its file, without the end.
        needs: numbers of the lessons that it builds on, in order.
        minutes, exercises: of the lesson, and of its exercises on top.
    """

    name: str
    title: str
    builds: str
    needs: tuple[str, ...]
    minutes: int
    exercises: int

    @property
    def number(self) -> str:
        return self.name[:2]


def lesson_of(name: str, first_cell: str) -> Lesson:
    """Read the first cell of the lesson ``name``.

    Raises:
        ValueError: it has not the form that all lessons have.
    """
    title = re.match(r"# \d\d · (.*)", first_cell)
    builds = re.search(r"\*\*You will (?:build|learn):?\*\*:? ?(.*)", first_cell)
    needs = re.search(r"\*\*You need:\*\* (.*)", first_cell)
    minutes = re.search(r"\*\*Time:\*\* (\d+) minutes, and (\d+) more", first_cell)
    if not (title and builds and needs and minutes):
        raise ValueError(f"the first cell of {name} lacks its title, aim, needs or minutes")
    return Lesson(
        name,
        title[1],
        builds[1],
        _numbers(needs[1]),
        int(minutes[1]),
        int(minutes[2]),
    )


def _numbers(needs: str) -> tuple[str, ...]:
    found = set(re.findall(r"\]\((\d\d)_\w+\.ipynb\)", needs))
    for first, last in re.findall(r"lessons (\d\d) to (\d\d)", needs):
        found |= {f"{number:02d}" for number in range(int(first), int(last) + 1)}
    return tuple(sorted(found))


def direct_needs(lessons: Sequence[Lesson]) -> dict[str, set[str]]:
    """Of each lesson's needs, those that no other one of them needs already."""
    needs = {lesson.number: set(lesson.needs) for lesson in lessons}

    def all_needs(number: str) -> set[str]:
        below = needs.get(number, set())
        return below.union(*map(all_needs, below))

    return {
        number: own - set().union(*map(all_needs, own)) if own else own
        for number, own in needs.items()
    }


def rows_of(lessons: Sequence[Lesson]) -> list[list[Lesson]]:
    """The lessons in rows, each below all that it needs."""
    row: dict[str, int] = {}
    for lesson in lessons:  # in order: what a lesson needs comes before it
        row[lesson.number] = 1 + max(
            (row[need] for need in lesson.needs if need in row), default=-1
        )
    return [
        [lesson for lesson in lessons if row[lesson.number] == place]
        for place in range(max(row.values()) + 1)
    ]


def as_svg(lessons: Sequence[Lesson]) -> str:
    """A drawing of boxes that are links, and arrows; no line of it is blank."""
    places: dict[str, tuple[float, float]] = {}
    rows = [
        row[start : start + _ABREAST]
        for row in rows_of(lessons)
        for start in range(0, len(row), _ABREAST)
    ]
    for depth, row in enumerate(rows):
        for place, lesson in enumerate(row):
            x = _WIDTH * (place + 0.5) / len(row) - _BOX / 2
            places[lesson.number] = x, depth * (_HEIGHT + _GAP) + 4
    arrows = [
        _arrow(places[need], places[number])
        for number, needs in direct_needs(lessons).items()
        for need in sorted(needs)
        if need in places
    ]
    boxes = [_box(lesson, *places[lesson.number]) for lesson in lessons]
    height = len(rows) * (_HEIGHT + _GAP)
    lines = [
        '<div class="map" tabindex="0" role="group" aria-label="Map of the lessons">',
        f'<svg viewBox="0 0 {_WIDTH} {height}" xmlns="http://www.w3.org/2000/svg">',
        *arrows,
        *boxes,
        "</svg>",
        "</div>",
    ]
    return "\n".join(lines)


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Straight down to the gap above the lower box, so as to pass beside others, then into it."""
    x, y = start[0] + _BOX / 2, start[1] + _HEIGHT
    to_x, to_y = end[0] + _BOX / 2, end[1]
    bend, middle = to_y - _GAP, to_y - _GAP / 2
    curve = f"M{x:g} {y:g}V{bend:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"
    return f'<path class="arrow" d="{curve}"/>'


def _box(lesson: Lesson, x: float, y: float) -> str:
    title = lesson.title.removesuffix(" by hand").removeprefix("The ")
    title = title[0].upper() + title[1:]
    return (
        f'<a href="notebooks/{lesson.name}.html"><title>{html.escape(lesson.title)}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{_BOX}" height="{_HEIGHT}" rx="6"/>'
        f'<text x="{x + _BOX / 2:g}" y="{y + 21:g}">{lesson.number} {html.escape(title)}</text>'
        f'<text class="minutes" x="{x + _BOX / 2:g}" y="{y + 39:g}">'
        f"{lesson.minutes} + {lesson.exercises} minutes</text></a>"
    )


def as_table(lessons: Sequence[Lesson]) -> str:
    """The same in words."""
    names = {lesson.number: lesson.name for lesson in lessons}
    lines = ["| | lesson | needs | minutes, and for its exercises |", "|---|---|---|---|"]
    for lesson in lessons:
        direct = sorted(direct_needs(lessons)[lesson.number])
        needs = ", ".join(f"[{need}](notebooks/{names[need]}.ipynb)" for need in direct)
        lines.append(
            f"| {lesson.number} | [{lesson.title}](notebooks/{lesson.name}.ipynb) | "
            f"{needs or 'a little PyTorch'} | {lesson.minutes} + {lesson.exercises} |"
        )
    total, more = sum(each.minutes for each in lessons), sum(each.exercises for each in lessons)
    lines.append(f"| | **all** | | **{total / 60:.0f} + {more / 60:.0f} hours** |")
    return "\n".join(lines)
