"""The editions for a class: nothing of a solution in one, all of it in the other."""

from __future__ import annotations

import nbformat
import pytest

import editions
from notebook_tools import exercises, lessons


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_a_student_has_the_hints_and_neither_solutions_nor_outputs(lesson) -> None:
    nb = editions.student_edition(lesson)
    text = nbformat.writes(nb)
    for exercise in exercises(nbformat.read(lesson, as_version=4)):
        (answer,) = [cell for cell in nb.cells if cell.id == f"sol-{exercise.name}"]
        assert exercise.hint in answer.source
        assert exercise.solution not in text
        assert "```python" not in answer.source.replace(exercise.hint, "")
    assert all(not cell.get("outputs") for cell in nb.cells)


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_the_key_answers_each_prediction_and_each_exercise(lesson) -> None:
    nb = nbformat.read(lesson, as_version=4)
    key = editions.answer_key([lesson])
    assert key.count("### Prediction ") == len(editions.guesses(nb)) > 0
    for answer in editions.answers_of(lesson):
        assert f"**{answer.outcome}**" in key
    assert "<IPython" not in key and "<Figure" not in key
    for exercise in exercises(nb):
        assert exercise.solution in key


def test_the_editions_are_written_as_notebooks_that_open(tmp_path, capsys) -> None:
    editions.main([str(tmp_path)])
    written = sorted((tmp_path / "student").glob("*.ipynb"))
    assert [path.name for path in written] == [path.name for path in lessons()]
    for path in written:
        nbformat.validate(nbformat.read(path, as_version=4))
    assert (tmp_path / "answers.md").read_text("utf-8").startswith("# Answers")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["one", "two"]])
def test_no_folder_is_one_clear_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="say where the editions go"):
        editions.main(arguments)
