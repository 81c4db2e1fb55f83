"""Checks of lesson 04: forward across stages, boundary bytes, balance, overlap."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right
from course_lib.models import GPT, MLP
from course_lib.parallel.layer_parallel import LayerParallel, balanced_cuts


@check
def check_forward(forward_across: Callable) -> Verdict:
    """Graded on the output, its device, the first stage's gradients, and the bytes moved."""
    with hardware.fresh_devices(4) as gpus:
        model = MLP(64, 64, 64, 64, 10)
        x = torch.randn(32, 64)
        with torch.no_grad():
            expected = model(x)
        placed = LayerParallel(model, gpus, [2, 4, 6])
        x = x.to(gpus[0])
        with timeline.trace() as t:
            output = forward_across(list(placed.stages), list(gpus), x)
        for index, (stage, gpu) in enumerate(zip(placed.stages, gpus, strict=True)):
            if any(parameter.device != gpu for parameter in stage.parameters()):
                raise Wrong(
                    f"stages[{index}] is no longer on {gpu}: move the activations to the layers, "
                    "not the layers to the activations."
                )
        _require_output(output, expected, gpus[-1])
        moved, target = sum(t.bytes_moved.values()), 3 * x.nbytes
        facts = [("bytes moved", format_bytes(moved), format_bytes(target))]
        if any("host" in route for route in t.bytes_moved):
            raise Wrong("activations went over the host: move them from GPU to GPU.", facts)
        if moved > target:
            raise Wrong(
                "more crossed the links than each activation its one boundary: send it from its "
                "stage's GPU to the next stage's, and nowhere else.",
                facts,
            )
        if not output.requires_grad:
            raise Wrong("the output knows no way back: leave out detach, .data and no_grad.", facts)
        output.sum().backward()
        if any(parameter.grad is None for parameter in placed.parameters()):
            raise Wrong(
                "gradients do not reach the first stage: the graph is cut at a boundary. "
                "Leave out detach and .data.",
                facts,
            )
        return right("each activation crossed each boundary once, and gradients find back.", facts)


def _require_output(output: object, expected: Tensor, gpu: torch.device) -> None:
    if not isinstance(output, Tensor):
        raise Wrong(f"your function should return a tensor, and returned {output!r:.60}.")
    if output.device != gpu:
        raise Wrong(f"the output should be on {gpu}, and is on {output.device}.")
    if output.shape != expected.shape:
        raise Wrong(
            f"the output has shape {tuple(output.shape)}, and should have {tuple(expected.shape)}."
        )
    if not torch.allclose(output.detach().cpu(), expected, atol=1e-5):
        raise Wrong("the shape is right, and the numbers are not: does every stage run, in order?")


@check
def check_bytes(bytes_of_step: Callable[..., float]) -> Verdict:
    """Graded against the formula, which for float32 is compared with the meter first."""
    cases = [(2, 8, 16, 2, 4), (2, 8, 16, 3, 4), (4, 32, 64, 4, 2), (8, 16, 32, 1, 4)]
    for B, T, D, stages, size in cases:
        answer = require_number(bytes_of_step(B, T, D, stages, size))
        one_way = B * T * D * size * (stages - 1)
        expected = 2 * one_way
        if answer == expected:
            continue
        kinds = {
            one_way: "That is forward only: the gradients come back.",
            2 * B * T * D * size * stages: "There is one boundary fewer than there are stages.",
            B * T * D * size * stages: "That is forward only, and there is one boundary fewer than "
            "there are stages.",
            3 * one_way: "Backward sends one gradient over a boundary, as large as the activation.",
            expected / size: "That is numbers, not bytes.",
            expected * 4 / size: "A bfloat16 number has 2 bytes, not 4.",
        }
        raise Wrong(
            f"B={B}, T={T}, D={D} in {stages} stages, {size} bytes a number: {expected:,} bytes "
            f"cross, and you say {answer:,.0f}. {kinds.get(answer, '')}".strip()
        )
    measured = _measured_bytes(*cases[1][:4])
    facts = [("bytes, in 3 stages", f"{bytes_of_step(*cases[1]):,}", f"{measured:,} by the meter")]
    return right("the formula agrees with the meter.", facts)


def _measured_bytes(B: int, T: int, D: int, stages: int) -> int:
    with hardware.fresh_devices(stages) as gpus:
        model = GPT(20, context=T, width=D, heads=2, depth=stages, tied=False)
        placed = LayerParallel(model, gpus, list(range(2, stages + 1)))
        with timeline.trace() as t:
            placed(torch.zeros(B, T, dtype=torch.int64)).sum().backward()
    return t.bytes_between_devices


@check
def check_balance(balance: Callable[[list[float], int], list[int]]) -> Verdict:
    """Graded on the cost of the costliest stage, beside the best there is."""
    cases = [
        ([1, 1, 1, 1], 2),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 3),
        ([9, 1, 1, 1, 1, 1, 9], 3),
        ([5, 5, 1, 1, 1, 1, 1, 1, 8], 4),
        ([0, 10, 10, 10, 10, 10, 10, 55], 3),
        ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], 5),
        ([7], 1),
    ]
    for costs, count in cases:
        cuts = balance(list(costs), count)
        _require_cuts(cuts, costs, count)
        cost, best = _costliest(costs, cuts), _costliest(costs, balanced_cuts(costs, count))
        if cost > best:
            stages = [costs[a:b] for a, b in pairwise([0, *cuts, len(costs)])]
            facts = [("costliest stage", f"{cost:g}", f"{best:g}")]
            raise Wrong(
                f"{costs} in {count} stages: you make {stages}, and it can be done with a cheaper "
                f"costliest stage. {_why_unbalanced(stages)}".strip(),
                facts,
            )
    return right(f"as balanced as can be, for {len(cases)} rows of layers.")


def _why_unbalanced(stages: list[list[float]]) -> str:
    """Which way of cutting the stages look like, if it is a known one."""
    lengths, costs = [len(stage) for stage in stages], [sum(stage) for stage in stages]
    if max(lengths) - min(lengths) <= 1:
        return "Equally many layers are not equally costly layers."
    if costs[-1] == max(costs):
        return "The last stage costs most, as when each is filled before the next one begins."
    return ""


def _require_cuts(cuts: object, costs: list[float], count: int) -> None:
    if not isinstance(cuts, list | tuple) or not all(isinstance(cut, Integral) for cut in cuts):
        raise Wrong(f"your function should return a list of positions, and returned {cuts!r:.60}.")
    if len(cuts) != count - 1:
        raise Wrong(f"{count} stages need {count - 1} cuts, and you return {len(cuts)}.")
    if any(b <= a for a, b in pairwise([0, *cuts, len(costs)])):
        raise Wrong(f"{costs} cut at {list(cuts)}: a stage is empty, or the cuts do not rise.")


def _costliest(costs: list[float], cuts: list[int]) -> float:
    return max(sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)]))


@check
def check_halves(forward_overlapped: Callable) -> Verdict:
    """Graded on the output, and on the time beside the plain forward pass."""
    with hardware.fresh_devices(2) as gpus:
        model = MLP(64, 512, 512, 512, 512, 10)
        x = torch.randn(512, 64)
        with torch.no_grad():
            expected = model(x)
            placed = LayerParallel(model, gpus, [4])
            x = x.to(gpus[0])
            with timeline.trace() as plain:
                placed(x)
            with timeline.trace() as t:
                output = forward_overlapped(list(placed.stages), list(gpus), x)
        _require_output(output, expected, gpus[1])
        ratio = t.seconds / plain.seconds
        facts = [("time, beside the plain forward pass", f"{ratio:.0%}", "at most 85%")]
        over_host = sum(nbytes for route, nbytes in t.bytes_moved.items() if "host" in route)
        if over_host >= expected.nbytes:
            raise Wrong("activations went over the host, which waits for each of them.", facts)
        if ratio > 0.85 and _seconds_together(t) < 0.01 * t.seconds:
            raise Wrong(
                "the output is right, but the GPUs still work one after the other. Cut the batch, "
                "send each part on before the first GPU starts the next, and read nothing between.",
                facts,
            )
        if ratio > 1.05:
            raise Wrong(
                "they overlap, but so many small parts take longer than the whole batch does: "
                "make fewer.",
                facts,
            )
        if ratio > 0.85:
            raise Wrong(
                "they overlap, but not for long enough: make the parts equal, or a little smaller.",
                facts,
            )
        return right("both GPUs work at the same time.", facts)


def _seconds_together(t: timeline.Trace) -> float:
    """Seconds in which both GPUs computed."""
    first, second = (
        [(span.start, span.end) for span in t.spans if span.kind == "matmul" and span.device == gpu]
        for gpu in (0, 1)
    )
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in first for c, d in second)
