"""Checks of lesson 09: groups of a mesh, bytes by formula, the choice of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from course_lib.exercises.verdict import Verdict, Wrong, check, right

NAMES = ("tensor", "pipeline", "data")


@check
def check_mesh(groups: Callable[[int, int, int], Sequence]) -> Verdict:
    """Graded on the groups of several meshes, in any order of the groups."""
    for shape in ((2, 2, 2), (1, 2, 4), (3, 1, 2), (2, 4, 1)):
        answer = groups(*shape)
        where = f"for data {shape[0]} x pipeline {shape[1]} x tensor {shape[2]}: "
        if not isinstance(answer, (list, tuple)) or len(answer) != 3:
            raise Wrong(f"{where}return three lists of groups.")
        expected = _groups(*shape)
        for name, ours, wanted in zip(NAMES, answer, expected, strict=True):
            ours = sorted([int(rank) for rank in group] for group in ours)
            if ours == wanted:
                continue
            others = [other for other, its in zip(NAMES, expected, strict=True) if its == ours]
            hint = f" These are the {others[0]} groups." if others else ""
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


@check
def check_bytes(bytes_sent: Callable[..., dict[str, float]]) -> Verdict:
    """Graded on several sizes."""
    for N, P, L, B, T, D in (
        (4, 1_000_000, 4, 8, 64, 128),
        (8, 500, 2, 1, 3, 5),
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
        for name, wanted in expected.items():
            if name not in answer:
                raise Wrong(f"there is no {name!r} in what you return.")
            ours = answer[name]
            if abs(ours - wanted) <= 1e-9 * max(1.0, wanted):
                continue
            factor = f", {ours / wanted:.3g} times too much" if wanted and ours > wanted else ""
            raise Wrong(
                f"{where}{name} sends {wanted:.10g} bytes, and yours is {ours:.10g}{factor}."
            )
    return right("gradients, shards and activations, by formula.")


@check
def check_choose(choose_mesh: Callable[..., tuple[int, int, int] | None]) -> Verdict:
    """Graded on models that fit easily, barely and not at all."""
    for N, P, memory, node, layers in (
        (8, 1e9, 80e9, 8, 24),
        (8, 7e9, 80e9, 8, 32),
        (16, 70e9, 80e9, 8, 80),
        (16, 70e9, 80e9, 4, 80),
        (16, 70e9, 80e9, 8, 1),
        (12, 10e9, 80e9, 4, 6),
        (8, 70e9, 80e9, 8, 80),
    ):
        fitting = [
            (N // (t * p), t, p)
            for t, p in product(range(1, min(N, node) + 1), range(1, min(N, layers) + 1))
            if N % (t * p) == 0 and 16 * P / (t * p) <= memory
        ]
        best = max(fitting, default=None)
        expected = best and (best[0], best[2], best[1])
        answer = choose_mesh(N, P, memory, node, layers)
        if answer is not None:
            answer = tuple(int(size) for size in answer)
        if answer != expected:
            raise Wrong(
                f"for {N} GPUs of {memory / 1e9:g} GB, {P / 1e9:g} billion parameters, nodes of "
                f"{node} and {layers} layers: {expected} is right, and yours is {answer}."
                f"{_reason(answer, N, P, memory, node, layers)}"
            )
    return right("the least model parallelism that fits.")


def _reason(answer: tuple | None, N: int, P: float, memory: float, node: int, layers: int) -> str:
    if answer is None or len(answer) != 3:
        return ""
    data, pipeline, tensor = answer
    if data * pipeline * tensor != N:
        return " It must use all GPUs."
    if tensor > node:
        return " A tensor group must stay inside a node."
    if pipeline > layers:
        return " There are not so many layers."
    if 16 * P / (pipeline * tensor) > memory:
        return " It does not fit."
    return " There is a mesh that fits with more data parallelism, or with more of it by neurons."
