"""Checks of lesson 08: which stage fits, a step between two halves, gather and forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.verdict import Verdict, Wrong, check, right


@check
def check_fit(lowest_stage: Callable[[float, int, float], int | None]) -> Verdict:
    """Graded on models, counts and memories at both sides of each stage's limit."""
    for parameters, count, memory, expected in (
        (1e9, 4, 80e9, 0),
        (5e9, 4, 80e9, 0),
        (7e9, 2, 80e9, 1),
        (11e9, 8, 80e9, 1),
        (15e9, 8, 80e9, 2),
        (20e9, 8, 80e9, 2),
        (30e9, 8, 80e9, 3),
        (70e9, 16, 80e9, 3),
        (70e9, 8, 80e9, None),
        (6e9, 1, 80e9, None),
    ):
        ours = lowest_stage(parameters, count, memory)
        if ours != expected or (ours is False):
            raise Wrong(
                f"{parameters / 1e9:g} billion parameters on {count} GPUs of "
                f"{format_bytes(memory)}: {expected} is right, and yours is {ours}."
            )
    return right("the lowest stage that fits, on both sides of each limit.")


@check
def check_step(sgd_step: Callable[[list[Tensor], list[Tensor], float], None]) -> Verdict:
    """Graded on the values, on who updates what, and on the bytes that each GPU sends."""
    for count in (1, 2, 4):
        with hardware.other_devices(count) as gpus:
            parameters = torch.randn(120)
            gradients = [torch.randn(120) for _ in gpus]
            rows = [parameters.to(gpu) for gpu in gpus]
            parts = [each.to(gpu) for each, gpu in zip(gradients, gpus, strict=True)]
            with timeline.trace() as t:
                sgd_step(list(rows), parts, 0.1)
            total = sum(gradients)
            expected = parameters - 0.1 * total
            results = [row.cpu() for row in rows]
            sent = _most_sent(t)
            most = 2 * (count - 1) * parameters.nbytes // count
            facts = [("most bytes sent by one GPU", str(sent), f"at most {most}")]
            for rank, result in enumerate(results):
                if not torch.allclose(result, expected, atol=1e-5):
                    mistake = _step_mistake(result, parameters, gradients, rank)
                    raise Wrong(f"on {count} GPUs, GPU {rank}: {mistake}", facts)
            if any(not torch.equal(results[0], result) for result in results):
                raise Wrong(
                    "the rows agree, but not to the last bit: send what one computed.", facts
                )
            if any("host" in route for route in t.bytes_moved):
                raise Wrong("numbers went over the host: use the collectives.", facts)
            if sent > most:
                raise Wrong("a GPU sends more than 2 (N - 1)/N rows.", facts)
    return right("each GPU has updated its shard, and all have all.", facts)


def _most_sent(t: timeline.Trace) -> int:
    sent: dict[str, int] = {}
    for (source, _), nbytes in t.bytes_moved.items():
        sent[source] = sent.get(source, 0) + nbytes
    return max(sent.values(), default=0)


def _step_mistake(result: Tensor, before: Tensor, gradients: list[Tensor], rank: int) -> str:
    count, total = len(gradients), sum(gradients)
    own = slice(rank * len(before) // count, (rank + 1) * len(before) // count)
    expected = before - 0.1 * total
    if torch.equal(result, before):
        return "the row is what it was: change it in place, with copy_."
    if torch.allclose(result[own], expected[own], atol=1e-5):
        return "its own shard is right, and those of the others are not: gather them."
    causes = {
        "this is a step with its own gradients alone.": before - 0.1 * gradients[rank],
        "this is a step with the mean of the gradients: the sum is asked for.": (
            before - 0.1 * total / count
        ),
        "this is a step in the wrong direction.": before + 0.1 * total,
    }
    for words, value in causes.items():
        if torch.allclose(result, value, atol=1e-5):
            return words
    return "these are not the parameters after one step."


@check
def check_gather(sharded_forward: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the output, on the bytes gathered, and on the memory at the peak."""
    width, depth, count = 256, 6, 4
    with hardware.other_devices(count) as gpus:
        weights = [torch.randn(width, width) / width**0.5 for _ in range(depth)]
        layers = [
            [part.to(gpu) for part, gpu in zip(weight.chunk(count), gpus, strict=True)]
            for weight in weights
        ]
        inputs = [torch.randn(2, width) for _ in gpus]
        xs = [x.to(gpu) for x, gpu in zip(inputs, gpus, strict=True)]
        before = hardware.memory_in_use(gpus[1])
        with timeline.trace() as t:
            outs = sharded_forward([list(shards) for shards in layers], list(xs))
        if not isinstance(outs, (list, tuple)) or len(outs) != count:
            raise Wrong(f"return a list of {count} outputs, one for each GPU.")
        whole = weights[0].nbytes
        peak = t.peak_memory[1] - before
        sent = _most_sent(t)
        least = depth * (count - 1) * whole // count
        facts = [
            ("at the peak, in whole weights", f"{peak / whole:.2f}", "at most 1.2"),
            ("most bytes sent by one GPU", format_bytes(sent), f"at most {format_bytes(least)}"),
        ]
        for gpu, out, x in zip(gpus, outs, inputs, strict=True):
            for weight in weights:
                x = F.relu(F.linear(x, weight))
            if out.device != gpu or not torch.allclose(out.cpu(), x, atol=1e-4):
                raise Wrong(f"the output on {gpu} is not relu(x W) through all layers.", facts)
        if any("host" in route for route in t.bytes_moved):
            raise Wrong("weights went over the host: use all_gather.", facts)
        if sent > least:
            raise Wrong("weights are gathered more than once.", facts)
        if peak > 1.2 * whole:
            raise Wrong(
                f"a GPU held {peak / whole:.1f} whole weights at once: forget one before you "
                "gather the next.",
                facts,
            )
        return right("one whole weight at a time, each gathered once.", facts)
