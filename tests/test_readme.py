"""The README says what is there: each lesson with its minutes, and links that lead somewhere."""

import re

import nbformat
import pytest

from notebook_tools import ROOT, lessons

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_each_lesson_is_in_the_table_with_its_minutes(lesson) -> None:
    title = nbformat.read(lesson, as_version=4).cells[0].source
    minutes = re.search(r"\*\*Time:\*\* (\d+) minutes, and (\d+) more", title)
    assert minutes, "the first cell says: **Time:** 45 minutes, and 20 more for the exercises."
    (row,) = [line for line in README.splitlines() if f"](notebooks/{lesson.name})" in line]
    assert row.endswith(f"| {minutes[1]} + {minutes[2]} |")


def test_each_local_link_leads_to_a_file() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
