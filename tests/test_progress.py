"""A class at a glance: who solved what, and nothing of a learner's is lost or believed too much."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nbformat
import pytest

from course_lib.progress.__main__ import main
from course_lib.progress.again import Limits, judge_again
from course_lib.progress.lessons import Lesson, lessons_in
from course_lib.progress.saved import read_class
from notebook_tools import NOTEBOOKS, exercises

STEM = "00_meet_your_gpus"
STATEMENTS = {
    "right": "right: yes.",
    "wrong": "wrong: no.",
    "not attempted": "not attempted: go on.",
}


@pytest.fixture(scope="module")
def lessons() -> list[Lesson]:
    return lessons_in(NOTEBOOKS)


def solutions() -> dict[str, str]:
    lesson = nbformat.read(NOTEBOOKS / f"{STEM}.ipynb", as_version=4)
    return {each.name: each.solution for each in exercises(lesson)}


def hand_in(path: Path, answers: dict[str, str], says: dict[str, str], more: str = "") -> None:
    """Write a learner's copy of lesson 00, with answers, saved verdicts and a cell of their own."""
    nb = nbformat.read(NOTEBOOKS / f"{STEM}.ipynb", as_version=4)
    for number, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        name = cell.id.partition("-")[2]
        if cell.id.startswith("ex-") and name in answers:
            cell.source = answers[name]
        cell.outputs, cell.execution_count = [], number
        if cell.id.startswith("check-") and name in says:
            text = STATEMENTS[says[name]]
            cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": text})]
    if more:
        nb.cells.insert(1, nbformat.v4.new_code_cell(more))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


def test_a_class_is_read_from_the_verdicts_that_its_notebooks_hold(tmp_path, capsys) -> None:
    hand_in(tmp_path / "bea" / f"{STEM}.ipynb", {}, {"sum": "right", "together": "wrong"})
    hand_in(tmp_path / f"carl_{STEM}.ipynb", {}, {"fits": "not attempted"})
    (tmp_path / "dora").mkdir()
    main([str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["learner", "00", "solved"]
    assert rows[1].split() == ["bea", "✓✗·", "1", "of", "3"]
    assert rows[2].split() == ["carl", "··○", "0", "of", "3"]
    assert rows[3].split() == ["dora", "---", "0", "of", "3"]


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b'{"cells": [{"cell_ty', "half of one: line 1"),
        (b"", "half of one"),
        (b"\xff\xfe\x00", "is no text"),
        (b"[]", "has no cells"),
        (b'{"cells": [{"source": 3}]}', "has no cells"),
        (b'{"cells": {"id": "x"}}', "has no cells"),
    ],
)
def test_a_file_that_is_no_notebook_gets_a_line_and_the_others_count(
    contents: bytes, words: str, tmp_path, lessons
) -> None:
    hand_in(tmp_path / "bea" / f"{STEM}.ipynb", {}, {"sum": "right"})
    broken = tmp_path / "carl" / f"{STEM}.ipynb"
    broken.parent.mkdir()
    broken.write_bytes(contents)
    found = read_class(tmp_path, lessons)
    assert found.learners == ["bea", "carl"]
    assert len(found.works) == 1
    (note,) = found.notes
    assert note.startswith(f"carl/{STEM}.ipynb") and words in note
    assert broken.read_bytes() == contents


def test_of_two_copies_the_better_one_counts_and_a_note_says_so(tmp_path, lessons) -> None:
    hand_in(tmp_path / "bea" / f"{STEM}.ipynb", {}, {"sum": "right", "fits": "right"})
    hand_in(tmp_path / "bea" / "again" / f"{STEM} (1).ipynb", {}, {"sum": "right"})
    found = read_class(tmp_path, lessons)
    assert found.works["bea", STEM].solved == 2
    assert any("twice" in note for note in found.notes)


def test_checkpoints_and_copies_put_aside_do_not_count(tmp_path, lessons) -> None:
    hand_in(tmp_path / "bea" / ".ipynb_checkpoints" / f"{STEM}.ipynb", {}, {"sum": "right"})
    hand_in(tmp_path / "bea" / f"{STEM}.old1.ipynb", {}, {"sum": "right"})
    assert read_class(tmp_path, lessons).works == {}


def test_an_answer_that_ran_after_its_check_is_named(tmp_path, lessons) -> None:
    path = tmp_path / "bea" / f"{STEM}.ipynb"
    hand_in(path, {}, {"sum": "right"})
    nb = nbformat.read(path, as_version=4)
    (answer,) = [cell for cell in nb.cells if cell.id == "ex-sum"]
    answer.execution_count = 999
    nbformat.write(nb, path)
    assert any("run again after its check" in note for note in read_class(tmp_path, lessons).notes)


def test_a_gradebook_has_a_column_for_each_exercise_of_what_came_and_no_formula(tmp_path) -> None:
    hand_in(tmp_path / "class" / "=bea" / f"{STEM}.ipynb", {}, {"sum": "right"})
    main([str(tmp_path / "class"), "--csv", str(tmp_path / "class.csv")])
    with (tmp_path / "class.csv").open(encoding="utf-8", newline="") as file:
        header, row = csv.reader(file)
    assert header == ["learner", "00 sum", "00 together", "00 fits", "solved", "of"]
    assert row == ["'=bea", "right", "not run", "not run", "1", "3"]


def test_judged_again_only_what_is_right_counts_whatever_the_notebook_says(
    tmp_path, lessons
) -> None:
    right = solutions()
    wrong = right["together"].replace("return", "return None and")
    assert wrong != right["together"]
    hand_in(
        tmp_path / "bea" / f"{STEM}.ipynb",
        {"sum": right["sum"], "together": wrong},
        {"sum": "wrong", "together": "right", "fits": "right"},
    )
    (work,) = read_class(tmp_path, lessons).works.values()
    assert judge_again(work, Limits()) == []
    assert work.states == {"sum": "right", "together": "wrong", "fits": "not attempted"}


def test_judged_again_an_answer_may_use_functions_of_cells_that_were_added(
    tmp_path, lessons
) -> None:
    name, body = "sum", solutions()["sum"]
    (definition,) = [line for line in body.splitlines() if line.startswith("def ")]
    function = definition.removeprefix("def ").partition("(")[0]
    hand_in(
        tmp_path / "bea" / f"{STEM}.ipynb",
        {name: f"{function} = mine"},
        {},
        more=body.replace(f"def {function}(", "def mine(") + "\nraise ValueError('only defined')",
    )
    (work,) = read_class(tmp_path, lessons).works.values()
    assert judge_again(work, Limits()) == []
    assert work.states["sum"] == "right"


def test_an_answer_that_ends_its_process_or_wants_too_much_memory_is_wrong_alone(
    tmp_path, lessons
) -> None:
    hand_in(
        tmp_path / "bea" / f"{STEM}.ipynb",
        {
            "sum": "import os\nos._exit(3)",
            "together": "hoard = bytearray(10**10)",
            "fits": solutions()["fits"],
        },
        {},
    )
    (work,) = read_class(tmp_path, lessons).works.values()
    (note,) = judge_again(work, Limits())
    assert note == "bea, lesson 00, sum: the process ended: exit status 3"
    assert work.states == {"sum": "wrong", "together": "wrong", "fits": "right"}


def test_a_process_that_takes_too_long_is_stopped_and_the_saved_verdict_stays(
    tmp_path, lessons
) -> None:
    hand_in(tmp_path / "bea" / f"{STEM}.ipynb", {"sum": "while True: pass"}, {"sum": "wrong"})
    (work,) = read_class(tmp_path, lessons).works.values()
    (note,) = judge_again(work, Limits(seconds=0.01))
    assert "not judged again, the process was still at work after 0.01 seconds" in note
    assert work.states["sum"] == "wrong"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "holds neither a learner's folder nor a lesson's notebook"),
        ([".", "--lessons", "nowhere"], "nowhere holds no lessons"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], words: str, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_nothing_in_the_class_is_changed(tmp_path) -> None:
    path = tmp_path / "bea" / f"{STEM}.ipynb"
    hand_in(path, {"sum": "x ="}, {"sum": "right"})
    before = path.read_bytes()
    main([str(tmp_path), "--again"])
    assert path.read_bytes() == before
    assert json.loads(before)["cells"]
    assert [each.name for each in tmp_path.iterdir()] == ["bea"]
