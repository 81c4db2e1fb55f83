"""Predictions: a blank one prints nothing, so that a committed lesson shows its result alone."""

from course_lib.exercises.prediction import beside


def test_a_blank_guess_adds_nothing() -> None:
    assert beside(None) == beside(None, "ms") == ""


def test_a_guess_stands_beside_the_result_with_its_unit() -> None:
    assert beside(3.5) == " (your guess: 3.5)"
    assert beside(0, "ms") == " (your guess: 0 ms)"
    assert beside("GPU 2") == " (your guess: GPU 2)"
