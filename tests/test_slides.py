"""A deck says what its lesson says, and asks before it answers."""

from __future__ import annotations

import nbformat
import pytest

import slides
from notebook_tools import lessons


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_a_deck_asks_shows_and_sums_up(lesson) -> None:
    nb = nbformat.read(lesson, as_version=4)
    deck = slides.slides_of(nb)
    assert deck[0].title == nb.cells[0].source.splitlines()[0].removeprefix("# ")
    assert deck[1].title == "The question" and any("Your guess" in line for line in deck[1].bullets)
    assert not deck[1].printed and not deck[1].picture, "the answer comes after the question"
    assert any(slide.picture for slide in deck)
    assert any(slide.printed for slide in deck[2:]), "a prediction that no slide answers"
    exercises, summary = deck[-2:]
    assert len(exercises.bullets) == sum(cell.id.startswith("check-") for cell in nb.cells)
    assert len(summary.bullets) >= 2
    for slide in deck:
        assert slide.title and "**" not in slide.title
        assert not any(mark in line for line in slide.bullets for mark in ("**", "](", "`"))
