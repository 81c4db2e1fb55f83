"""Gauss-Newton's method for a few positive constants, with outliers that count less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from course_lib.planner.constants import Constants

Errors = Callable[[Constants], np.ndarray]  # logarithms of predicted over measured

HUBER = 0.08  # an error above 8 % counts in proportion, and not squared
HOLD = 0.05  # how firmly a constant is held: e times its start costs as much as ...
_NUDGE = 0.02
_LONGEST_STEP = 0.5


@dataclass(frozen=True)
class Problem:
    """What to fit.

    Attributes:
        errors: of each row, for given constants.
        weights: of each row.
        names: the constants to fit; the others stay.
        parts: those among them that are parts of something, at most 1.
    """

    errors: Errors
    weights: np.ndarray
    names: Sequence[str]
    parts: frozenset[str]

    def cost(self, errors: np.ndarray, away: np.ndarray) -> float:
        """What is made smallest; ``away`` is how far each logarithm is from its start."""
        size = np.abs(errors)
        rows = np.where(size < HUBER, size**2, 2 * HUBER * size - HUBER**2)
        return float(self.weights @ rows + HOLD * (away**2).sum())


def minimize(problem: Problem, start: Constants, rounds: int = 15) -> Constants:
    """The constants that make the cost smallest.

    Works on logarithms, so that a constant stays positive and a doubling weighs as much as a
    halving. Each round takes slopes by small steps and solves one linear least-squares problem; a
    step that makes things worse is halved.
    """
    held = _logs(start, problem.names)
    logs = held.copy()
    constants = start
    errors = problem.errors(constants)
    cost = problem.cost(errors, logs - held)
    for _ in range(rounds):
        step = _step(problem, constants, errors, logs - held)
        for _ in range(8):
            trial = _at(start, problem, logs + step)
            trial_logs = _logs(trial, problem.names)
            trial_errors = problem.errors(trial)
            trial_cost = problem.cost(trial_errors, trial_logs - held)
            if trial_cost < cost:
                break
            step = step / 2
        else:
            return constants
        gain = cost - trial_cost
        constants, logs, errors, cost = trial, trial_logs, trial_errors, trial_cost
        if gain < 1e-3 * cost:
            return constants
    return constants


def _step(
    problem: Problem, constants: Constants, errors: np.ndarray, away: np.ndarray
) -> np.ndarray:
    """Where one linear problem says that the smallest cost is, from here."""
    slopes = np.empty((len(errors), len(problem.names)))
    for column, name in enumerate(problem.names):
        nudged = replace(constants, **{name: getattr(constants, name) * np.exp(-_NUDGE)})
        slopes[:, column] = (errors - problem.errors(nudged)) / _NUDGE
    # A row beyond HUBER pulls with the same force however far it is off.
    root = np.sqrt(problem.weights * np.minimum(1, HUBER / np.maximum(np.abs(errors), 1e-12)))
    matrix = np.vstack([slopes * root[:, None], np.sqrt(HOLD) * np.eye(len(away))])
    target = np.concatenate([-errors * root, -np.sqrt(HOLD) * away])
    step = np.linalg.lstsq(matrix, target, rcond=None)[0]
    return np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)


def _logs(constants: Constants, names: Sequence[str]) -> np.ndarray:
    return np.log([getattr(constants, name) for name in names])


def _at(start: Constants, problem: Problem, logs: np.ndarray) -> Constants:
    values = dict(zip(problem.names, np.exp(logs).tolist(), strict=True))
    limited = {name: min(value, 1.0) for name, value in values.items() if name in problem.parts}
    return replace(start, **(values | limited))
