"""Checks of lesson 10: a common end, a shift in a circle, unused layers, 1F1B on one rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib import CLASSROOM, format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import Facts, require_finite, require_tensors
from course_lib.exercises.rank_runs import on_ranks, without
from course_lib.exercises.rank_stage import Stage, judge_turns
from course_lib.exercises.verdict import Verdict, Wrong, check, right

# -------------------------------------------------------------------------- 1. who stops when?

# The loss of each rank after each step, and after how many the mean no longer falls. In the first
# case other rules, which a learner might write first, stop elsewhere; the second one takes another
# number of steps, so that none can be written into an answer.
_LOSSES = [
    [9.5, 7.5, 11.5, 8.5, 7.5, 10.0, 12.0, 4.5, 4.5],
    [11.5, 11.5, 5.0, 4.5, 6.0, 3.0, 11.5, 10.0, 11.5],
    [12.0, 11.0, 10.5, 11.0, 7.5, 8.0, 3.5, 7.0, 6.5],
]
_OTHER_LOSSES = [[5.0, 3.0, 4.0, 4.0, 5.0, 6.0, 7.0], [5.0, 5.0, 4.0, 4.0, 5.0, 6.0, 7.0]]
_STOP_CASES = [(_LOSSES, 6), (_OTHER_LOSSES, 3)]
# What stops after so many steps of the first case.
_STOP_MISTAKES = {
    2: "That is when the first rank's own loss no longer falls. ",
    3: "That is when the loss of rank 0 alone no longer falls, or the largest of all. ",
    4: "That is when most ranks' own losses no longer fall. ",
    5: "That is when the smallest of all losses no longer falls. ",
    7: "A mean that equals the best is not below it. ",
    9: "That is when no rank's own loss falls any longer. ",
}
_GRADIENT = 30  # numbers that the ranks exchange in a step


@check
def check_stop(train: Callable[[Callable[[], None], Callable[[], Tensor]], None]) -> Verdict:
    """Graded on the step after which each rank stops, and on the numbers exchanged for it."""
    facts = [_judge_stop(train, losses, wanted) for losses, wanted in _STOP_CASES]
    return right("all ranks stop together, after the step that they agree on.", facts[0])


def _judge_stop(
    train: Callable[[Callable[[], None], Callable[[], Tensor]], None],
    losses: list[list[float]],
    wanted: int,
) -> Facts:
    count = len(losses)
    with hardware.fresh_devices(count) as gpus:

        def count_steps() -> int:
            mine, steps = losses[dist.get_rank()], 0
            gradient = torch.ones(_GRADIENT, device="vgpu")

            def step() -> None:
                nonlocal steps
                steps += 1
                if steps > len(mine):
                    raise Wrong(
                        f"it trains on and on: no rank has stopped after {len(mine)} steps."
                    )
                dist.all_reduce(gradient)

            def loss() -> Tensor:
                return torch.tensor([mine[steps - 1]], device="vgpu")

            train(step, loss)
            return steps

        with timeline.trace() as t:
            steps = on_ranks(count_steps, gpus)
        a_step = 2 * (count - 1) * 4 * _GRADIENT // count
        sent = [t.bytes_sent(gpu) - taken * a_step for gpu, taken in zip(gpus, steps, strict=True)]
    if not any(steps):
        raise Wrong("no rank has called step().")
    facts = [
        ("steps of each rank", ", ".join(map(str, steps)), f"{wanted} each"),
        ("most bytes sent for it, a step", f"{max(sent) / max(steps):g}", "at most 8"),
    ]
    if len(set(steps)) > 1:
        raise Wrong("the ranks stop after different steps.", facts)
    if steps[0] != wanted:
        means = [f"{sum(each) / count:g}" for each in zip(*losses, strict=True)][: wanted + 1]
        mistake = _STOP_MISTAKES.get(steps[0], "") if losses is _LOSSES else ""
        raise Wrong(
            f"all stop together, after step {steps[0]}. {mistake}The means are {', '.join(means)}: "
            f"it should be after step {wanted}.",
            facts,
        )
    if max(sent) > 8 * max(steps):
        raise Wrong("more is exchanged than one number from each rank in a step.", facts)
    return facts


# ---------------------------------------------------------------------- 2. pass on by k places


# Ranks and places, the plain cases first.
_SHIFTS = (
    *((4, 1), (5, 1), (6, 2), (4, 2), (1, 0), (1, 3), (4, 0), (4, 4)),
    *((7, 3), (8, 6), (5, -1), (6, -4), (5, 13)),
)
_NUMBERS = 100_000  # in a message
# What does not wait, or does it all.
_OTHERS = (
    *("isend", "irecv", "P2POp", "broadcast", "scatter", "gather", "reduce", "all_reduce"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all"),
    *("all_to_all_single", "reduce_scatter", "reduce_scatter_tensor"),
)


@check
def check_shift(shift: Callable[[Tensor, int], Tensor]) -> Verdict:
    """Graded on what arrives, on the rounds it takes, on one to eight ranks."""
    slowest = 0
    for count, places in _SHIFTS:
        try:
            rounds = _messages_time(shift, count, places)
        except Wrong as wrong:
            case = f"shift(x, {places}) {_with_ranks(count)}"
            raise Wrong(f"{case}: {wrong}", wrong.facts) from None
        slowest = max(slowest, rounds)
    facts = [("messages' time, at the most", f"{slowest}", "at most 3")]
    return right("every tensor at its place, and no rank waits for ever.", facts)


def _messages_time(shift: Callable[[Tensor, int], Tensor], count: int, places: int) -> int:
    """How long a right ``shift`` takes, in messages' time, without what else takes a little.

    Raises:
        Wrong: it is wrong, or takes too long.
    """

    given = torch.randn(count, _NUMBERS)

    def once() -> tuple[Tensor, bool]:
        x = xs[dist.get_rank()]
        found = shift(x, places)
        return found, isinstance(found, Tensor) and found.data_ptr() == x.data_ptr()

    only = "use dist.send and dist.recv alone: these wait, which is what it is about."
    with hardware.fresh_devices(count) as gpus:
        xs = [own.to(gpu) for own, gpu in zip(given, gpus, strict=True)]
        with timeline.trace() as t, without(_OTHERS, only):
            found, same = zip(*on_ranks(once, gpus), strict=True)
        if any(each is None for each in found):
            raise Wrong("a rank gets None: is a return statement missing?")
        require_tensors(list(found), [(_NUMBERS,)] * count)
        arrived, kept = [each.cpu() for each in found], [x.cpu() for x in xs]
    if not torch.equal(torch.stack(kept), given):
        raise Wrong("x changed, and should stay as it is.")
    if any(same):
        raise Wrong("what you return is x itself: return a tensor of its own.")
    wanted = [(rank - places) % count for rank in range(count)]
    if not all(torch.equal(a, given[source]) for a, source in zip(arrived, wanted, strict=True)):
        raise Wrong(_shift_mistake(arrived, given, places))
    rounds = round(t.seconds / (_NUMBERS * 4 / CLASSROOM.link_bandwidth))
    if rounds > 3:
        messages = max(t.bytes_sent(gpu) for gpu in gpus) // (_NUMBERS * 4)
        why = (
            f"a rank sends {messages} messages, and one is enough: to the rank that wants it."
            if messages > 1
            else "most ranks wait for their neighbour, which waits for its own, and so on."
        )
        raise Wrong(
            f"it takes {rounds} messages' time: {why}",
            [("messages' time", f"{rounds}", "at most 3")],
        )
    return rounds


def _shift_mistake(arrived: list[Tensor], given: Tensor, places: int) -> str:
    count = len(arrived)
    sources = [
        next((rank for rank in range(count) if torch.equal(each, given[rank])), None)
        for each in arrived
    ]
    if sources == [(rank + places) % count for rank in range(count)]:
        return "the tensors travel the other way round."
    wanted = [(rank - places) % count for rank in range(count)]
    rank = next(rank for rank in range(count) if sources[rank] != wanted[rank])
    found = "something else" if sources[rank] is None else f"that of rank {sources[rank]}"
    return f"rank {rank} should end up with the tensor of rank {wanted[rank]}, and has {found}."


# ----------------------------------------------------------- 3. a layer that one rank did not use

_SHAPES = [(6, 4), (6, 4), (8,), (6, 4), (5,)]  # of the parameters
_USED = [[1, 0, 1, 0, 1], [1, 1, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 1]]  # by each rank


@check
def check_unused(average_gradients: Callable[[list[nn.Parameter]], None]) -> Verdict:
    """Graded on the gradients, on those that must stay ``None``, and on the bytes."""
    count = len(_USED)
    values = [torch.randn(count, *shape) for shape in _SHAPES]
    with hardware.fresh_devices(count) as gpus:

        def once() -> list[tuple[Tensor, Tensor | None]]:
            rank = dist.get_rank()
            parameters = [nn.Parameter(torch.ones(shape, device="vgpu")) for shape in _SHAPES]
            for parameter, value, is_used in zip(parameters, values, _USED[rank], strict=True):
                parameter.grad = value[rank].to("vgpu") if is_used else None
            average_gradients(list(parameters))
            return [
                (p.detach().cpu(), None if p.grad is None else p.grad.detach().cpu())
                for p in parameters
            ]

        with timeline.trace() as t:
            found = on_ranks(once, gpus)
        sent = max(t.bytes_sent(gpu) for gpu in gpus)
    travels = sum(4 * value[0].numel() for i, value in enumerate(values) if _is_used(i))
    ring = 2 * (count - 1) / count
    most = int(ring * (travels + 8 * len(_SHAPES))) + 4 * len(_SHAPES)  # chunks are not all equal
    facts = [("most bytes sent by one rank", format_bytes(sent), f"at most {format_bytes(most)}")]
    for rank, own in enumerate(found):
        _judge_gradients(rank, own, values, facts)
    if sent < int(ring * travels):
        raise Wrong("the gradients are right, and do not travel from GPU to GPU.", facts)
    if sent > most:
        raise Wrong("more travels than the gradients in use and a few numbers.", facts)
    return right("all ranks made the same calls, though they did not use the same layers.", facts)


def _is_used(i: int) -> bool:
    return any(used[i] for used in _USED)


def _judge_gradients(
    rank: int, own: list[tuple[Tensor, Tensor | None]], values: list[Tensor], facts: Facts
) -> None:
    for i, ((parameter, gradient), value) in enumerate(zip(own, values, strict=True)):
        where = f"parameter {i} on rank {rank}"
        if not torch.equal(parameter, torch.ones_like(parameter)):
            raise Wrong(f"{where} changed: only gradients are to be averaged.", facts)
        if not _is_used(i):
            if gradient is not None:
                raise Wrong(f"no rank used parameter {i}, and rank {rank} has a gradient.", facts)
            continue
        if gradient is None:
            raise Wrong(f"{where} has no gradient, and another rank used it.", facts)
        if gradient.shape != parameter.shape:
            shapes = f"{tuple(gradient.shape)}, and should have {tuple(parameter.shape)}"
            raise Wrong(f"the gradient of {where} has the shape {shapes}.", facts)
        require_finite([gradient], f"the gradient of {where}")
        used = torch.tensor([float(each[i]) for each in _USED])
        total = torch.tensordot(used, value, 1)
        if torch.allclose(gradient, total / len(_USED), atol=1e-6):
            continue
        raise Wrong(f"the gradient of {where} {_gradient_mistake(gradient, total, used)}", facts)


def _gradient_mistake(gradient: Tensor, total: Tensor, used: Tensor) -> str:
    if torch.allclose(gradient, total, atol=1e-6):
        return "is the sum over the ranks, and should be the mean."
    if torch.allclose(gradient, total / used.sum(), atol=1e-6):
        return "is the mean over the ranks that used it, and should be that over all."
    return "is not the mean over all ranks."


# -------------------------------------------------------------- 4. 1F1B, as one rank sees it


@check
def check_turns(by_turns: Callable[[Stage, int], None]) -> Verdict:
    """Graded on the gradients, on what each rank holds, and on the time, for several N and m."""
    facts = []
    for count, m in ((4, 8), (2, 3), (4, 2), (1, 2)):
        try:
            facts.append(judge_turns(by_turns, count, m))
        except Wrong as wrong:
            case = f"{_with_ranks(count)} and {m} microbatches"
            raise Wrong(f"{case}: {wrong}", wrong.facts) from None
    return right("one forward and one backward by turns, and nobody waits for ever.", facts[0])


def _with_ranks(count: int) -> str:
    return "with one rank" if count == 1 else f"with {count} ranks"
