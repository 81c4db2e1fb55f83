"""Checks of lesson 09: groups of a mesh, bytes by formula, the choice of a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from numbers import Real
from typing import Any

from course_lib.exercises.verdict import Verdict, Wrong, check, right

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


@check
def check_bytes(bytes_sent: Callable[..., dict[str, float]]) -> Verdict:
    """Graded on several sizes."""
    for N, P, L, B, T, D in (
        (8, 1_000_000, 6, 16, 64, 128),
        (4, 500, 2, 1, 3, 5),
        (1, 10, 1, 1, 1, 1),
    ):
        half = (N - 1) / N
        expected = {
            "data": 2 * half * 4 * P,
            "sharded": 3 * half * 4 * P,
            "tensor": 4 * L * 2 * half * 4 * B * T * D,
        }
        answer = bytes_sent(N, P, L, B, T, D)
        where = f"for N = {N}, P = {P}, L = {L}, B = {B}, T = {T}, D = {D}: "
        if answer is None:
            raise Wrong("your function returned None: is a return statement missing?")
        if not isinstance(answer, dict):
            raise Wrong(f"return a dictionary, and not a {type(answer).__name__}.")
        for name, wanted in expected.items():
            if name not in answer:
                raise Wrong(f"there is no {name!r} in what you return.")
            ours = answer[name]
            if not isinstance(ours, Real):
                raise Wrong(f"{name!r} should be a number, and is a {type(ours).__name__}.")
            if math.isclose(ours, wanted, rel_tol=1e-9):
                continue
            raise Wrong(
                f"{where}{name} sends {wanted:.10g} bytes, and yours is {ours:.10g}."
                f"{_bytes_hint(name, ours, wanted, N, L)}"
            )
    return right("gradients, shards and activations, by formula.")


def _bytes_hint(name: str, ours: float, wanted: float, N: int, L: int) -> str:
    """What the factor between the two says of the mistake."""
    if N == 1:
        return " A GPU alone sends nothing."
    own = {
        "data": [(1 / 2, "An all-reduce is a scatter and a gather, and so twice (N - 1)/N.")],
        "sharded": [
            (2 / 3, "Stage 3 gathers parameters twice, forward and backward."),
            (1 / 3, "Stage 3 gathers parameters twice, and scatters gradients once."),
            (4 / 3, "Stage 3 scatters gradients, and need not gather them: three, not four."),
        ],
        "tensor": [
            (1 / 2, "A block has four all-reduces, and each sends twice (N - 1)/N."),
            (1 / 4, "A block has four all-reduces, and a number 4 bytes."),
            (1 / L, "There are L blocks."),
        ],
    }
    factors = [
        *own[name],
        (N / (N - 1), "A GPU sends (N - 1)/N of the whole: one part is there already."),
        (N, "This is what all GPUs send together."),
        (1 / 4, "A number in float32 takes 4 bytes."),
    ]
    fitting = [words for factor, words in factors if math.isclose(ours, factor * wanted)]
    return f" {fitting[0]}" if fitting else ""


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
