"""Checks of lesson 04: backward over boundaries, balance, overlap."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import (
    Unchanged,
    gradient_of,
    require_finite,
    require_not_over_host,
)
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.models import MLP
from course_lib.parallel.layer_parallel import LayerParallel, balanced_cuts


@check
def check_backward(backward_by_hand: Callable) -> Verdict:
    """Graded on graphs that end at the boundaries, on gradients, and on the bytes moved."""
    with hardware.fresh_devices(3) as gpus:
        model = MLP(64, 48, 32, 24, 10)
        x, y = torch.randn(32, 64), torch.randint(10, (32,))
        F.cross_entropy(model(x), y).backward()
        expected = [gradient_of(parameter) for parameter in model.parameters()]
        placed = LayerParallel(copy.deepcopy(model), gpus, [2, 4])
        placed.zero_grad()
        stages = [_Watched(stage) for stage in placed.stages]
        x, y = x.to(gpus[0]), y.to(gpus[2])
        unchanged = Unchanged({"the parameters": placed, "x": x})
        with timeline.trace() as t:
            backward_by_hand(list(stages), list(gpus), x, y, F.cross_entropy)
        unchanged.require()
        _require_cut(stages)
        facts = [_bytes_fact(t, stages)]
        require_not_over_host(t, "activations or gradients", facts)
        gradients = []
        for index, stage in enumerate(placed.stages):
            without = (
                f"stages[{index}] has no gradients: hand the gradient that came over its boundary "
                "to its output, out.backward(gradient)."
            )
            gradients += [gradient_of(each, without, facts).cpu() for each in stage.parameters()]
        require_finite(gradients, "the gradients")
        for index, (ours, theirs) in enumerate(zip(gradients, expected, strict=True)):
            if not torch.allclose(ours, theirs, atol=1e-6):
                raise Wrong(
                    f"the gradients of stages[{index // 2 if index < 4 else 2}] are not those of "
                    "one GPU. Is each stage run once, and does each gradient go to the output of "
                    "the stage before?",
                    facts,
                )
        if t.bytes_between_devices > _boundary_bytes(stages):
            raise Wrong("more crossed the boundaries than one tensor each way.", facts)
        return right("no graph crosses a boundary, and the gradients are those of one GPU.", facts)


class _Watched(nn.Module):
    """A stage that remembers what it was given and what it returned."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.given: list[Tensor] = []
        self.returned: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        self.returned.append(self.stage(x))
        return self.returned[-1]


def _require_cut(stages: list[_Watched]) -> None:
    for index, stage in enumerate(stages):
        if not stage.given:
            raise Wrong(f"stages[{index}] was never run.")
        if not stage.returned[-1].requires_grad:
            raise Wrong(f"stages[{index}] ran under no_grad: it cannot go backward.")
        if index and any(_leads_to_parameters(x, stages) for x in stage.given):
            raise Wrong(
                f"what stages[{index}] received still has a graph behind it: detach it, so that "
                "its backward stops there."
            )
        if index and any(x.grad_fn is not None for x in stage.given):
            raise Wrong(
                f"what stages[{index}] received is detached, and has the graph of its copy: "
                "requires_grad_() comes after .to(...). Autograd would carry the gradient back "
                "for you, and here you carry it yourself."
            )
        if index and not all(x.requires_grad for x in stage.given):
            raise Wrong(
                f"what stages[{index}] received asks for no gradient: without requires_grad_() "
                "nothing comes back over its boundary."
            )


def _leads_to_parameters(x: Tensor, stages: list[_Watched]) -> bool:
    """Whether a backward pass from ``x`` would reach a parameter of a stage."""
    parameters = {id(parameter) for stage in stages for parameter in stage.parameters()}
    nodes, seen = [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in parameters:
            return True
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
    return False


def _boundary_bytes(stages: list[_Watched]) -> int:
    return 2 * sum(stage.returned[0].nbytes for stage in stages[:-1])


def _bytes_fact(t: timeline.Trace, stages: list[_Watched]) -> tuple[str, str, str]:
    moved, target = t.bytes_between_devices, _boundary_bytes(stages)
    return "bytes between GPUs", format_bytes(moved), f"at most {format_bytes(target)}"


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
def check_balance(balance: Callable[[list[float], int], list[int]]) -> Verdict:
    """Graded on the cost of the costliest stage, beside the best there is."""
    cases: list[tuple[list[float], int]] = [
        ([1, 1, 1, 1], 2),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 3),
        ([9, 1, 1, 1, 1, 1, 9], 3),
        ([5, 5, 1, 1, 1, 1, 1, 1, 8], 4),
        ([0, 10, 10, 10, 10, 10, 10, 55], 3),
        ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], 5),
        ([5, 3, 9, 1], 3),
        ([1, 7, 2, 2, 3], 3),
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
    """Which way of cutting made the stages, if it is a known one."""
    lengths, costs = [len(stage) for stage in stages], [sum(stage) for stage in stages]
    # In a short row every way of cutting makes nearly equal lengths.
    if max(lengths) - min(lengths) <= 1 and min(lengths) > 1:
        return "Equally many layers are not equally costly layers."
    average = sum(costs) / len(costs)
    were_filled = all(
        cost <= average < cost + after[0] for cost, after in zip(costs, stages[1:], strict=False)
    )
    if were_filled and costs[-1] == max(costs):
        return "The last stage costs most: each was filled before the next one began."
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
            raise Wrong("activations or outputs went over the host, which waits for them.", facts)
        if ratio > 0.85 and _seconds_together(t) < 0.01 * t.seconds:
            raise Wrong(
                "the output is right, but the GPUs still work one after the other. "
                + _why_not_together(t),
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


def _why_not_together(t: timeline.Trace) -> str:
    """What keeps the second GPU waiting."""
    copies = [span for span in t.spans if span.route == (0, 1)]
    products = [span.start for span in t.spans if span.kind == "matmul" and span.device == 1]
    if len(copies) > 1 and products and max(span.end for span in copies) <= min(products):
        return (
            "All parts are copied before the second GPU starts its first: its queue has the "
            "copies before the work. Enqueue the second stage for each part as soon as it is sent."
        )
    return (
        "Cut the batch, send each part on before the first GPU starts the next, and read nothing "
        "between."
    )


def _seconds_together(t: timeline.Trace) -> float:
    """Seconds in which both GPUs computed."""
    first, second = (
        [(span.start, span.end) for span in t.spans if span.kind == "matmul" and span.device == gpu]
        for gpu in (0, 1)
    )
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in first for c, d in second)
