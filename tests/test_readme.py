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
    rows = [line for line in README.splitlines() if line.startswith("|")]
    (row,) = [line for line in rows if f"](notebooks/{lesson.name})" in line]
    assert row.endswith(f"| {minutes[1]} + {minutes[2]} |")


def test_each_local_link_leads_to_a_file() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


GLOSSARY = ROOT / "docs" / "glossary.md"
WORDS = re.findall(
    r"^\| ([^|]+) \| [^|]+ \| \[\d\d\]\(([^)]+)\) \|$", GLOSSARY.read_text("utf-8"), re.MULTILINE
)


def test_the_glossary_is_in_the_order_of_the_alphabet() -> None:
    words = [word.lower() for word, _ in WORDS]
    assert len(words) >= 30 and words == sorted(words)


@pytest.mark.parametrize("word, lesson", WORDS, ids=[word for word, _ in WORDS])
def test_each_word_of_the_glossary_stands_in_its_lesson(word: str, lesson: str) -> None:
    cells = nbformat.read(GLOSSARY.parent / lesson, as_version=4).cells
    assert any(word.lower() in cell.source.lower() for cell in cells)
