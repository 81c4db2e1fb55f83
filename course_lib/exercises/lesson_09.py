"""Checks of lesson 09: groups of a mesh, what is exposed, the choice of a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from numbers import Real
from typing import Any

from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right

Stretches = list[tuple[float, float]]

NAMES = ("tensor", "pipeline", "data")


@check
def check_mesh(groups: Callable[[int, int, int], Sequence]) -> Verdict:
    """Graded on the groups of several meshes, in any order of the groups."""
    for shape in ((2, 2, 2), (1, 2, 4), (3, 1, 2), (2, 4, 1)):
        answer = groups(*shape)
        where = f"for data {shape[0]} x pipeline {shape[1]} x tensor {shape[2]}: "
        if answer is None:
            raise Wrong("your function returned None: is a return statement missing?")
        if not isinstance(answer, (list, tuple)) or len(answer) != 3:
            raise Wrong(f"{where}return three lists of groups.")
        expected = _groups(*shape)
        for name, ours, wanted in zip(NAMES, answer, expected, strict=True):
            ours = _sorted_groups(ours, f"{where}the {name} groups")
            if ours == wanted:
                continue
            hint = _mesh_hint(ours, expected)
            raise Wrong(f"{where}the {name} groups are {wanted}, and yours are {ours}.{hint}")
    return right("every GPU is in one group of each kind.")


def _groups(data: int, pipeline: int, tensor: int) -> tuple[list, list, list]:
    def rank(d: int, p: int, t: int) -> int:
        return (d * pipeline + p) * tensor + t

    ds, ps, ts = range(data), range(pipeline), range(tensor)
    return (
        sorted([rank(d, p, t) for t in ts] for d, p in product(ds, ps)),
        sorted([rank(d, p, t) for p in ps] for d, t in product(ds, ts)),
        sorted([rank(d, p, t) for d in ds] for p, t in product(ps, ts)),
    )


def _sorted_groups(groups: Any, which: str) -> list[list[int]]:
    try:
        return sorted([int(rank) for rank in group] for group in groups)
    except (TypeError, ValueError):
        raise Wrong(
            f"{which} should be a list of lists of ranks, such as [[0, 1], [2, 3]]."
        ) from None


def _mesh_hint(ours: list[list[int]], expected: tuple[list, list, list]) -> str:
    others = [name for name, its in zip(NAMES, expected, strict=True) if its == ours]
    if others:
        return f" These are the {others[0]} groups."
    ranks = sorted(rank for group in ours for rank in group)
    all_ranks = sorted(rank for group in expected[0] for rank in group)
    if missing := [rank for rank in all_ranks if rank not in ranks]:
        return f" Missing: {missing}."
    if ranks != all_ranks:
        return " Every rank is in one group of a kind, and there are no others."
    return ""


# Computing and copying, in seconds, and what of the copying is exposed.
STRETCHES: list[tuple[Stretches, Stretches, float]] = [
    ([(0, 4)], [(3, 6)], 2),
    ([(0, 4)], [(1, 3)], 0),
    ([(0, 1)], [(1, 3), (2, 4)], 3),
    ([(0, 2), (5, 7)], [(1, 6)], 3),
    ([(2, 3)], [(0, 5)], 4),
    ([(1, 4), (0, 3)], [(2, 6)], 2),
    ([(4, 6), (0, 2)], [(5, 9), (1, 3), (0, 1)], 4),
    ([(0, 2), (2, 4)], [(1, 3), (8, 9)], 1),
    ([], [(1, 2), (1, 2)], 1),
    ([(0, 3)], [], 0),
    ([(0, 0.25)], [(0.125, 0.5)], 0.25),
    ([(0, 8), (1, 2)], [(3, 9), (4, 5)], 1),
]


@check
def check_exposed(exposed_seconds: Callable[[Stretches, Stretches], float]) -> Verdict:
    """Graded on stretches that overlap, contain each other, touch, and come in any order."""
    answers = []
    for computing, copying, _ in STRETCHES:
        given = list(computing), list(copying)
        answers.append(require_number(exposed_seconds(*given)))
        if given != (computing, copying):
            raise Wrong("your function changed the lists that it was given: leave them alone.")
    for (computing, copying, wanted), ours in zip(STRETCHES, answers, strict=True):
        if not math.isclose(ours, wanted, abs_tol=1e-9):
            seconds = "1 second is" if wanted == 1 else f"{wanted:g} seconds are"
            raise Wrong(
                f"with computing = {computing} and copying = {copying}, {seconds} "
                f"exposed, and yours is {ours:g}.{_exposed_hint(answers)}"
            )
    return right("what hides behind computing does not count, and no second counts twice.")


def _exposed_hint(answers: list[float]) -> str:
    """The mistake that gives all of these answers, if there is one that does."""
    mistakes = [_mistakes(computing, copying) for computing, copying, _ in STRETCHES]
    for words in mistakes[0]:
        pairs = zip(answers, mistakes, strict=True)
        if all(math.isclose(ours, theirs[words], abs_tol=1e-9) for ours, theirs in pairs):
            return f" {words}"
    return ""


def _mistakes(computing: Stretches, copying: Stretches) -> dict[str, float]:
    """What each known mistake comes to, by the sentence that names it."""
    exposed = _beyond(computing, copying)
    sums = _sum(copying) - _sum(computing)
    last_copy, last_computing = (
        max((end for _, end in stretches), default=0) for stretches in (copying, computing)
    )
    same_time = "a copy hides only behind what is computed at the same time."
    return {
        "That is all of the copying, with what hides behind computing.": _covered(copying),
        "Those are all copies added up, hidden or not.": _sum(copying),
        "That is what is hidden: copied while the GPU computes.": _covered(copying) - exposed,
        "That is the other way round: computed while nothing is copied.": _beyond(
            copying, computing
        ),
        "Copies that overlap count once: add up time, and not copies.": sum(
            _beyond(computing, [each]) for each in copying
        ),
        f"That is copying less computing, as sums: {same_time}": sums,
        f"That is copying less computing, and not below 0: {same_time}": max(0, sums),
        "Where two stretches of computing overlap, time counts once.": (
            _covered([*computing, *copying]) - _sum(computing)
        ),
        "Where two stretches of computing overlap, what both of them hide counts once.": (
            _covered(copying) - sum(_hidden([each], copying) for each in computing)
        ),
        "Stretches that overlap are counted pair by pair, and so twice: join them first, those of "
        "computing and those of copying.": (
            _sum(copying) - sum(_hidden([c], [k]) for c, k in product(computing, copying))
        ),
        "A stretch may lie inside another, which goes on after it: joined, they end where the "
        "longer one does.": _beyond(
            _ending_like_the_last(computing), _ending_like_the_last(copying)
        ),
        "That is when the last copy ends after the last computing: copies in a gap are exposed "
        "too.": max(0, last_copy - last_computing),
    }


def _sum(stretches: Stretches) -> float:
    return sum(end - start for start, end in stretches)


def _covered(stretches: Stretches) -> float:
    """Seconds in at least one of the stretches."""
    total, done = 0.0, -math.inf
    for start, end in sorted(stretches):
        total += max(0.0, end - max(start, done))
        done = max(done, end)
    return total


def _beyond(computing: Stretches, copying: Stretches) -> float:
    """Seconds of copying in which nothing is computed."""
    return _covered([*computing, *copying]) - _covered(computing)


def _hidden(computing: Stretches, copying: Stretches) -> float:
    """Seconds of copying in which something is computed."""
    return _covered(copying) - _beyond(computing, copying)


def _ending_like_the_last(stretches: Stretches) -> Stretches:
    """Stretches that overlap, joined by a mistake: each ends like the one that begins last."""
    joined: Stretches = []
    for start, end in sorted(stretches):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


@check
def check_choose(choose_mesh: Callable[..., tuple[int, int, int] | None]) -> Verdict:
    """Graded on models that fit easily, barely and not at all."""
    for N, P, memory, node, layers in (
        (48, 100e9, 80e9, 8, 80),  # three different sizes, so that a wrong order shows
        (16, 70e9, 80e9, 8, 80),
        (8, 1e9, 80e9, 8, 24),
        (8, 7e9, 80e9, 8, 32),
        (8, 10e9, 80e9, 8, 24),  # to the last byte
        (16, 70e9, 80e9, 4, 80),
        (16, 70e9, 80e9, 8, 1),
        (12, 12e9, 80e9, 4, 6),
        (10, 12e9, 80e9, 4, 10),  # where 3 x 1 x 3 and 2 x 1 x 4 would leave GPUs out
        (8, 70e9, 80e9, 8, 80),
    ):
        fitting = [
            (N // (t * p), t, p)
            for t, p in product(range(1, min(N, node) + 1), range(1, min(N, layers) + 1))
            if N % (t * p) == 0 and 16 * P / (t * p) <= memory
        ]
        best = max(fitting, default=None)
        expected = best and (best[0], best[2], best[1])
        answer = _mesh_or_none(choose_mesh(N, P, memory, node, layers))
        if answer != expected:
            raise Wrong(
                f"for {N} GPUs of {memory / 1e9:g} GB, {P / 1e9:g} billion parameters, nodes of "
                f"{node} and {layers} layers: {expected} is right, and yours is {answer}."
                f"{_choose_hint(answer, expected, N, P / memory, node, layers)}"
            )
    return right("the least model parallelism that fits.")


def _mesh_or_none(answer: Any) -> tuple | None:
    if answer is None:
        return None
    is_mesh = isinstance(answer, (list, tuple)) and len(answer) == 3
    if not is_mesh or not all(isinstance(size, Real) for size in answer):
        raise Wrong("return three numbers, (data, pipeline, tensor), or None if nothing fits.")
    return tuple(answer)


def _choose_hint(
    answer: tuple | None, expected: tuple | None, N: int, load: float, node: int, layers: int
) -> str:
    """``load`` is parameters for each byte of memory."""
    if answer is None:
        return " This one fits."
    data, pipeline, tensor = answer
    # Where one is 1, or two are alike, another order can be another mistake.
    if expected and len({1, *expected}) == 4 and sorted(answer) == sorted(expected):
        return " The sizes are right, and their order is (data, pipeline, tensor)."
    if data * pipeline * tensor != N:
        return f" It must use all {N} GPUs."
    if tensor > node:
        return " A tensor group must stay inside a node."
    if pipeline > layers:
        return " There are not so many layers."
    if 16 * load > pipeline * tensor or expected is None:
        return " It does not fit."
    if data < expected[0]:
        return " A mesh with more data parallelism fits."
    return " With as much data parallelism, more tensor parallelism fits."
