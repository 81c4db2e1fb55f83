"""The checks tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import logging
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.distributed.tensor.parallel import ColwiseParallel

from answers import all_exercises
from course_lib import devices
from course_lib.exercises import lesson_05, lesson_11
from exercise_answers import each_exercise, each_right_answer, each_wrong_answer

EXERCISES = all_exercises()


@pytest.fixture(autouse=True)
def _virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEVICES", "virtual")


@each_exercise(EXERCISES)
def test_a_check_is_tried_with_four_wrong_answers_and_two_right_ones_at_least(exercise):
    assert len(exercise.wrong_answers) >= 4
    assert len(exercise.right_answers) >= 2


@each_exercise(EXERCISES)
def test_the_untouched_stub_is_not_attempted(exercise):
    assert exercise.judge(exercise.stub).status == "not attempted"


@each_exercise(EXERCISES)
def test_the_solution_is_right(exercise):
    verdict = exercise.judge(exercise.solution)
    assert verdict.status == "right", verdict


ONE_LINE = "your code stopped with ZeroDivisionError: division by zero (line"


@each_exercise(EXERCISES)
def test_an_error_in_the_answer_is_told_in_one_line(exercise):
    def two_lines(*arguments):
        raise ZeroDivisionError("division by zero\nand more")

    verdict = exercise.judge(two_lines)
    assert verdict.status == "wrong"
    assert verdict.message.startswith(ONE_LINE)
    assert "raise ZeroDivisionError" in verdict.message


@each_exercise(EXERCISES)
def test_an_answer_that_is_no_function_is_told_in_one_line(exercise):
    assert "not callable" in exercise.judge(4).message


@each_exercise(EXERCISES)
@pytest.mark.parametrize("right", [True, False])
def test_a_check_leaves_the_dice_as_they_were(exercise, right: bool, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    devices(2)

    def throws_dice(*arguments):
        random.seed(3), np.random.seed(3)
        random.random(), np.random.rand(), torch.rand(1)
        raise ZeroDivisionError

    before = next_numbers()
    exercise.judge(exercise.solution if right else throws_dice)
    assert next_numbers() == before
    assert seeded == [], "a check seeds no real GPU"


def next_numbers() -> list[float]:
    """What the generators would give next; they are set back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        numbers = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    random.setstate(states[0])
    np.random.set_state(states[1])
    for index in range(2):
        state = torch.vgpu.get_rng_state(index)
        numbers.append(float(torch.rand(1, device=f"vgpu:{index}")))
        torch.vgpu.set_rng_state(state, index)
    return numbers


@each_right_answer(EXERCISES)
def test_accepts(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.status == "right", verdict


@each_wrong_answer(EXERCISES)
def test_refuses(exercise, answer, words, unsaid):
    verdict = exercise.judge(answer)
    assert verdict.status == "wrong", verdict
    for word in words:
        assert word in verdict.message
    assert not unsaid or unsaid not in verdict.message, "a mistake that was not made"


def unwritten() -> list[list[str]]:
    raise NotImplementedError


def test_a_plan_that_does_not_fit_is_told_without_pytorch_s_log(capfd, caplog) -> None:
    names = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    before = logging.root.manager.disable
    verdict = lesson_11.check_plan(lambda: {name: ColwiseParallel() for name in names})
    assert "the block stops with" in verdict.message
    assert (capfd.readouterr().err, caplog.text) == ("", "")
    assert logging.root.manager.disable == before


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (unwritten, "nothing to show yet"),
        (lambda: [["F0"], ["B0"]], "cannot be drawn: B of stage 0"),
        (lambda: ["F0"], "cannot be drawn: return 2 lists"),
    ],
)
def test_a_schedule_that_cannot_run_is_not_shown(answer, words: str, capsys) -> None:
    lesson_05.show(answer)
    assert words in capsys.readouterr().out
    assert plt.get_fignums() == []


def test_a_schedule_is_shown_on_paper_and_as_it_runs() -> None:
    before = torch.get_rng_state()
    one_by_one = [f"{kind}{i}" for i in range(4) for kind in "FB"]
    lesson_05.show(lambda: [one_by_one, one_by_one])
    paper, run = plt.gcf().axes
    assert "bubble 50.0%" in paper.get_title(loc="left")
    assert "simulated" in run.get_title(loc="left")
    assert torch.equal(torch.get_rng_state(), before)
    plt.close()
