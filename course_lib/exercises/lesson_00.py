"""Checks of lesson 00: sums across devices, queues that overlap, memory to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from course_lib import CLASSROOM, format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import bytes_over_host, require_not_over_host
from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right


@check
def check_sum(sum_on_first: Callable[[list[Tensor]], Tensor]) -> Verdict:
    """Graded on the sum, its device, untouched inputs, and the bytes that crossed each link."""
    with hardware.fresh_devices(4) as (first, *others):
        gpus = [*others, first]  # the first tensor's is not the first one
        originals = [torch.randn(100, 100) for _ in gpus]
        tensors = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
        with timeline.trace() as t:
            total = sum_on_first(list(tensors))
        if not isinstance(total, Tensor):
            raise Wrong(f"your function should return a tensor, and returned {total!r:.60}.")
        if total.device != gpus[0]:
            raise Wrong(f"the sum should be on {gpus[0]}, and is on {total.device}.")
        changed = [not torch.equal(a.cpu(), b) for a, b in zip(tensors, originals, strict=True)]
        if any(changed):
            raise Wrong(
                f"tensors[{changed.index(True)}] is not what it was: += changes a tensor in "
                "place. Start from a clone."
            )
        expected = torch.stack(originals).sum(dim=0)
        if total.shape != expected.shape:
            raise Wrong(
                f"the sum has shape {tuple(total.shape)}, and should have the shape of each "
                f"tensor, {tuple(expected.shape)}."
            )
        if not torch.allclose(total.cpu().to(expected.dtype), expected, atol=1e-5):
            raise Wrong("the result is on the right device, but it is not the sum of the four.")
        moved, target = sum(t.bytes_moved.values()), 3 * originals[0].nbytes
        facts = [("bytes moved", format_bytes(moved), format_bytes(target))]
        require_not_over_host(t, "tensors", facts)
        if moved > target:
            raise Wrong("more crossed the links than each of the three others once.", facts)
        return right("the sum is there, and each tensor crossed one link once.", facts)


@check
def check_together(sums_of_powers: Callable[[list[Tensor], int], list[float]]) -> Verdict:
    """Graded on the sums, and on the time: four GPUs may take hardly longer than one."""
    times = 4
    with hardware.fresh_devices(4) as gpus:
        originals = [torch.randn(256, 256) / 16 for _ in gpus]
        matrices = [matrix.to(gpu) for matrix, gpu in zip(originals, gpus, strict=True)]
        with timeline.trace() as alone:
            _square(matrices[0], times).sum().item()
        with timeline.trace() as t:
            answers = sums_of_powers(list(matrices), times)
        if not isinstance(answers, list | tuple) or len(answers) != len(gpus):
            raise Wrong(f"your function should return a list of four floats, not {answers!r:.60}.")
        for answer in answers:
            if isinstance(answer, Tensor):
                raise Wrong("these are tensors; a float is what .item() returns.")
            if not isinstance(answer, Real):
                raise Wrong(
                    f"a list of four floats is asked for: one is a {type(answer).__name__}."
                )
        expected = [_square(matrix, times).sum().item() for matrix in originals]
        if not torch.allclose(torch.tensor(answers), torch.tensor(expected), rtol=1e-3, atol=1e-3):
            raise Wrong(
                "the numbers are off: compute m = m @ m `times` times, then add up all numbers."
            )
        busy = {span.device for span in t.spans if span.kind == "matmul"}
        for index, gpu in enumerate(gpus):
            if index not in busy:
                raise Wrong(
                    f"the sums are right, but {gpu} multiplied nothing: multiply each matrix where "
                    "it is, and move none."
                )
        ratio = t.seconds / alone.seconds
        facts = [("time, beside one GPU's", f"{ratio:.2f} times", "at most 1.25 times")]
        if bytes_over_host(t) >= matrices[0].nbytes:
            raise Wrong(
                "a matrix was copied to the host, which waits for it: add up its numbers where "
                "they are, and read one number of each.",
                facts,
            )
        if ratio > 1.25:
            raise Wrong(
                "the sums are right, but the GPUs took turns. Which line of your loop waits?", facts
            )
        return right("four GPUs, all at work at the same time.", facts)


def _square(matrix: Tensor, times: int) -> Tensor:
    for _ in range(times):
        matrix = matrix @ matrix
    return matrix


@check
def check_fits(largest_side: Callable[[int], int]) -> Verdict:
    """Graded by making the matrix: it must fit, and one row and column more must not."""
    for free in (80_000_000, 1_000_000, 12_345_678):
        answer = largest_side(free)
        number = answer if isinstance(answer, Integral) else require_number(answer)
        if number % 1:
            raise Wrong(f"{number} is no whole number: round down, a matrix has whole rows only.")
        side = int(number)
        if side < 1:
            raise Wrong(f"{side} is no side of a matrix.")
        if not _fits(side, free):
            rounded_up = " Round down." if _fits(side - 1, free) else ""
            raise Wrong(
                f"with {free:,} bytes free you say {side}, and {side} x {side} numbers of 4 bytes "
                f"are {side * side * 4:,} bytes: it does not fit.{rounded_up}"
            )
        if _fits(side + 1, free):
            raise Wrong(
                f"with {free:,} bytes free you say {side}, and there is room for a larger one. "
                "A float32 number has 4 bytes, and the last byte may be used."
            )
        if not isinstance(answer, Integral):
            raise Wrong(f"{side} is right, and {number} is a float: return an int.")
    return right("it fits, and nothing larger would.", [("for 80 MB", "4472", "4472")])


def _fits(side: int, free: int) -> bool:
    """Whether ``free`` bytes hold the matrix; a virtual GPU with so much memory makes it."""
    nbytes = 4 * side * side
    with hardware.fresh_devices(1, CLASSROOM.with_(memory=free)) as (gpu,):
        if nbytes > 2 * free:
            return False  # far too large to try
        try:
            torch.empty(side, side, device=gpu)
        except torch.OutOfMemoryError:
            return False
    return True
