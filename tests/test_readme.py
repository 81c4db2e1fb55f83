"""The README says what is there: each lesson with its minutes, and links that lead somewhere."""

import re
import runpy
import shlex
import sys

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


# Those that need nothing but a clone: of the others, the script is the reader's own.
COMMANDS = [
    line
    for line in README.splitlines()
    if line.startswith("python -m course_lib") and "train.py --epochs" not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_package_runs(command: str, tmp_path, monkeypatch, capsys) -> None:
    """In this process, which has imported PyTorch already."""
    _, is_module, module, *words = shlex.split(command)
    assert is_module == "-m"
    if "examples/train_gpt.py" in words:  # two steps are enough to see that it starts
        words += ["--steps", "2", "--checkpoints", str(tmp_path)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *words])
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out


def test_no_command_stands_before_a_comment() -> None:
    """A shell may take it for an argument."""
    fences = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    commands = [line for fence in fences for line in fence.splitlines()]
    assert [line for line in commands if " #" in line] == []


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
