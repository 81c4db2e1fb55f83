"""Checks: whose error it is, in which line, and what is never left running or changed."""

import threading

import pytest
import torch
from torch import nn

from course_lib.exercises import diagnosis, verdict
from course_lib.exercises.verdict import Verdict, Wrong, check, right


@check
def check_length(answer) -> Verdict:
    if len(answer()) != 2:
        raise Wrong("it should have two.")
    return right("two.")


def divides_by_zero() -> list:
    return [1 // 0]


def helper() -> list:
    raise KeyError("lost")


def test_an_error_in_the_answer_is_told_with_its_line() -> None:
    said = check_length(divides_by_zero).message
    assert said.startswith("your code stopped with ZeroDivisionError: ")
    assert said.endswith(": return [1 // 0])")


def test_the_line_is_the_innermost_one_that_the_learner_wrote() -> None:
    assert 'raise KeyError("lost")' in check_length(lambda: helper()).message


def test_an_error_in_the_check_is_not_laid_to_the_answer() -> None:
    notebook: dict = {}  # the answer's own, as a kernel has it
    exec("def three(): return 3", notebook)
    said = check_length(notebook["three"]).message
    assert said.startswith("your code ran")
    assert "The check stopped with TypeError" in said


@pytest.mark.parametrize("parameters", ["count", "*, count"])
def test_parameters_that_differ_from_the_exercises_are_named(parameters: str) -> None:
    names: dict = {}
    exec(f"def answer({parameters}): return [count]", names)
    message = check_length(names["answer"]).message
    assert message.startswith("your function could not be called: leave its parameters")
    assert "argument" in message and "looked at" not in message


def test_a_stub_is_not_attempted_and_a_sentence_in_it_is_an_answer() -> None:
    def stub():
        raise NotImplementedError

    def refuses():
        raise NotImplementedError("not for two")

    assert check_length(stub).status == "not attempted"
    assert check_length(refuses).status == "wrong"


def test_a_loop_that_never_ends_is_stopped_and_the_next_check_works(monkeypatch) -> None:
    monkeypatch.setattr(verdict, "PATIENCE", 0.2)
    x = torch.ones(3)

    def endless():
        while True:
            x.add(1)

    said = check_length(endless)
    assert said.status == "wrong"
    assert "still at work after 0.2 seconds" in said.message
    monkeypatch.setattr(verdict, "PATIENCE", 60.0)
    assert check_length(lambda: [1, 2]).status == "right"
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_an_interrupt_by_the_learner_is_not_swallowed() -> None:
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_length(interrupted)


def test_changed_parameters_are_noticed() -> None:
    model = nn.Linear(2, 2)
    unchanged = diagnosis.Unchanged({"the parameters": model})
    unchanged.require()
    with torch.no_grad():
        model.bias.zero_()
    with pytest.raises(Wrong, match="the parameters changed"):
        unchanged.require()


def test_nan_is_named_and_nothing_else_is_said_of_it() -> None:
    diagnosis.require_finite([torch.ones(2)], "the gradients")
    with pytest.raises(Wrong, match="NaN or infinite in the gradients"):
        diagnosis.require_finite([torch.tensor([1.0, float("nan")])], "the gradients")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "returned None"),
        ([torch.ones(2)], "a list of 2 tensors"),
        ([torch.ones(2), 3], "for GPU 1 there is a int"),
        ([torch.ones(2), torch.ones(3)], "GPU 1's tensor has shape"),
    ],
)
def test_parts_that_are_none_are_refused_in_one_sentence(values, words: str) -> None:
    with pytest.raises(Wrong, match=words):
        diagnosis.require_tensors(values, [(2,), (2,)])
