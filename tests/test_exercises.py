"""The checks tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import pytest
import torch

import answers_00
import answers_01
import answers_02
import answers_04
from course_lib import devices, trace
from course_lib.models import Block
from exercise_answers import each_exercise, each_right_answer, each_wrong_answer

EXERCISES = [
    *answers_00.EXERCISES,
    *answers_01.EXERCISES,
    *answers_02.EXERCISES,
    *answers_04.EXERCISES,
]


@pytest.fixture(autouse=True)
def _virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEVICES", "virtual")


@each_exercise(EXERCISES)
def test_the_untouched_stub_is_not_attempted(exercise):
    assert exercise.judge(exercise.stub).status == "not attempted"


@each_exercise(EXERCISES)
def test_the_solution_is_right(exercise):
    verdict = exercise.judge(exercise.solution)
    assert verdict.status == "right", verdict


@each_exercise(EXERCISES)
def test_an_error_in_the_answer_is_told_in_one_line(exercise):
    def two_lines(*arguments):
        raise ZeroDivisionError("division by zero\nand more")

    verdict = exercise.judge(two_lines)
    assert verdict.status == "wrong"
    assert verdict.message == "your code stopped with ZeroDivisionError: division by zero"


@each_exercise(EXERCISES)
def test_an_answer_that_is_no_function_is_told_in_one_line(exercise):
    assert "not callable" in exercise.judge(4).message


@each_right_answer(EXERCISES)
def test_accepts(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.status == "right", verdict


@each_wrong_answer(EXERCISES)
def test_refuses(exercise, answer, words):
    verdict = exercise.judge(answer)
    assert verdict.status == "wrong", verdict
    for word in words:
        assert word in verdict.message


@pytest.mark.parametrize(("B", "T", "D"), [(3, 32, 64), (4, 16, 32), (1, 128, 64)])
def test_the_formula_that_flops_are_graded_by_is_what_the_meter_counts(B, T, D):
    (gpu,) = devices(1)
    block = Block(D, heads=4, dropout=0.0).to(gpu)
    with trace() as t:
        block(torch.zeros(B, T, D, device=gpu))
    assert t.flops == 24 * B * T * D * D + 4 * B * T * T * D
