"""Checks of lesson 08: which stage fits, a step between two halves, gather, scatter in a hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import gradient_of
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.parallel.data_parallel import replicate


@check
def check_fit(lowest_stage: Callable[[float, int, float], int | None]) -> Verdict:
    """Graded on models, counts and memories at both sides of each stage's limit."""
    for parameters, count, memory, expected in (
        (1e9, 4, 80e9, 0),
        (5e9, 4, 80e9, 0),  # to the last byte, as the others below without a remainder
        (5.1e9, 4, 80e9, 1),
        (5e9, 4, 40e9, 1),
        (8e9, 2, 80e9, 1),
        (8.1e9, 2, 80e9, 2),
        (11e9, 8, 80e9, 1),
        (15e9, 8, 80e9, 2),
        (20e9, 7, 80e9, 2),
        (21e9, 7, 80e9, 3),
        (40e9, 8, 80e9, 3),
        (41e9, 8, 80e9, None),
        (70e9, 16, 80e9, 3),
        (6e9, 1, 80e9, None),
    ):
        ours = lowest_stage(parameters, count, memory)
        if ours != expected or isinstance(ours, bool):
            case = (
                f"{parameters / 1e9:g} billion parameters on {_gpus(count)} of {memory / 1e9:g} GB"
            )
            raise Wrong(
                f"{case}: {expected} is right, and yours is {ours!r}."
                f"{_fit_mistake(ours, parameters, count, memory)}"
            )
    return right("the lowest stage that fits, on both sides of each limit.")


def _fit_mistake(ours: object, parameters: float, count: int, memory: float) -> str:
    """What the stage takes that was returned, "" if none was."""
    if isinstance(ours, bool) or ours not in (0, 1, 2, 3):
        return ""
    needed = parameters * (16, 4 + 12 / count, 2 + 14 / count, 16 / count)[int(ours)]
    fits = " and fits, and a lower one fits as well" if needed <= memory else " and does not fit"
    return f" Stage {ours} takes {needed / 1e9:g} GB{fits}."


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


@check
def check_step(sgd_step: Callable[[list[Tensor], list[Tensor], float], None]) -> Verdict:
    """Graded on the values, on who updates what, and on the bytes that each GPU sends."""
    for count in (1, 2, 4):
        with hardware.fresh_devices(count) as gpus:
            parameters = torch.randn(120)
            gradients = [torch.randn(120) for _ in gpus]
            rows = [parameters.to(gpu) for gpu in gpus]
            parts = [each.to(gpu) for each, gpu in zip(gradients, gpus, strict=True)]
            with timeline.trace() as t:
                sgd_step(list(rows), parts, 0.1)
            total = sum(gradients)
            expected = parameters - 0.1 * total
            results = [row.cpu() for row in rows]
            sent = max(t.bytes_sent(gpu) for gpu in gpus)
            most = 2 * (count - 1) * parameters.nbytes // count
            facts = [("most bytes sent by one GPU", str(sent), f"at most {most}")]
            for rank, result in enumerate(results):
                if not torch.allclose(result, expected, atol=1e-5):
                    mistake = _step_mistake(result, parameters, gradients, rank)
                    raise Wrong(f"on {_gpus(count)}, GPU {rank}: {mistake}", facts)
            if any("host" in route for route in t.bytes_moved):
                raise Wrong("numbers went over the host: use the collectives.", facts)
            if any(not torch.equal(results[0], result) for result in results):
                raise Wrong(
                    "the rows agree, but not to the last bit: send what one computed.", facts
                )
            if sent > most:
                raise Wrong(f"on {count} GPUs, one sends more than 2 (N - 1)/N rows.", facts)
            if count > 1 and _adds_whole_rows(t, parameters.nbytes):
                raise Wrong(
                    f"on {count} GPUs, one adds to a whole row: it may update its shard only.",
                    facts,
                )
    return right("each GPU has updated its shard, and all have all.", facts)


def _adds_whole_rows(t: timeline.Trace, nbytes: int) -> bool:
    """Whether some sum or difference has the length of a row: it reads two and writes one."""
    sums = [span for span in t.spans if span.name.startswith(("add", "sub"))]
    return any(span.bytes >= 3 * nbytes for span in sums)


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
        "this is a step without lr.": before - total,
    }
    for words, value in causes.items():
        if torch.allclose(result, value, atol=1e-5):
            return words
    return "these are not the parameters after one step."


@check
def check_gather(sharded_forward: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the output, on the bytes gathered, and on the memory at the peak."""
    width, depth, count = 256, 6, 4
    with hardware.fresh_devices(count) as gpus:
        weights = [torch.randn(width, width) / width**0.5 for _ in range(depth)]
        layers = [
            [part.to(gpu) for part, gpu in zip(weight.chunk(count), gpus, strict=True)]
            for weight in weights
        ]
        inputs = [torch.randn(2, width) for _ in gpus]
        xs = [x.to(gpu) for x, gpu in zip(inputs, gpus, strict=True)]
        before = [hardware.memory_in_use(gpu) for gpu in gpus]
        with timeline.trace() as t:
            outs = sharded_forward([list(shards) for shards in layers], list(xs))
        if not isinstance(outs, (list, tuple)) or len(outs) != count:
            raise Wrong(f"return a list of {count} outputs, one for each GPU.")
        whole = weights[0].nbytes
        peaks = [peak - held for peak, held in zip(t.peak_memory, before, strict=True)]
        peak = max(peaks)
        sent = max(t.bytes_sent(gpu) for gpu in gpus)
        least = depth * (count - 1) * whole // count
        facts = [
            ("at the peak, in whole weights", f"{peak / whole:.2f}", "at most 1.2"),
            ("most bytes sent by one GPU", format_bytes(sent), f"at most {format_bytes(least)}"),
        ]
        for gpu, out, x in zip(gpus, outs, inputs, strict=True):
            _judge_output(out, x, weights, gpu, facts)
        if any("host" in route for route in t.bytes_moved):
            raise Wrong("numbers went over the host: use all_gather.", facts)
        if sent > least:
            raise Wrong("weights are gathered more than once.", facts)
        if sent < least:
            raise Wrong("the inputs travel and not the weights: that is lesson 06's way.", facts)
        if peak > 1.2 * whole:
            raise Wrong(
                f"GPU {peaks.index(peak)} held {peak / whole:.1f} whole weights at once: "
                f"{_memory_mistake(peak / whole)}",
                facts,
            )
        return right("at most one whole weight at a time, each gathered once.", facts)


def _judge_output(
    out: Tensor, x: Tensor, weights: list[Tensor], gpu: torch.device, facts: list
) -> None:
    expected = linear = x
    for weight in weights:
        expected, linear = F.relu(F.linear(expected, weight)), F.linear(linear, weight)
    if not isinstance(out, Tensor) or out.device != gpu or out.shape != x.shape:
        raise Wrong(f"return on {gpu} its output, of the shape {tuple(x.shape)}.", facts)
    if torch.allclose(out.cpu(), linear, atol=1e-4):
        raise Wrong(f"the output on {gpu} lacks the relu after each layer.", facts)
    if not torch.allclose(out.cpu(), expected, atol=1e-4):
        raise Wrong(f"the output on {gpu} is not relu(x Wᵀ) through all layers.", facts)


def _memory_mistake(wholes: float) -> str:
    if wholes < 1.9:
        return "shards that arrive must not lie beside the whole weight that they become."
    return "forget one before you gather the next."


@check
def check_hook(scatter_in_hooks: Callable[[list[nn.Module], list[dict]], None]) -> Verdict:
    """Graded on the shards, on what is left in memory and at the peak, and on the bytes."""
    width, depth, count = 128, 10, 4
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    with hardware.fresh_devices(count) as gpus:
        replicas, inputs = replicate(model, gpus), torch.randn(count, 2, width)
        values = [x.to(gpu) for x, gpu in zip(inputs, gpus, strict=True)]
        for layers in zip(*replicas, strict=True):  # so that backward comes layer by layer, too
            values = [layer(x) for layer, x in zip(layers, values, strict=True)]
        losses = [value.square().sum() for value in values]
        shards: list[dict] = [{} for _ in gpus]
        scatter_in_hooks(list(replicas), shards)
        before = hardware.memory_in_use(gpus[0])
        with timeline.trace() as t:
            torch.autograd.backward(losses)
        del losses, values
        whole = width * width * 4
        sent, least = max(t.bytes_sent(gpu) for gpu in gpus), depth * (count - 1) * whole // count
        peak = max(t.peak_memory) - before
        facts = [
            ("most bytes sent by one GPU", format_bytes(sent), f"at most {format_bytes(least)}"),
            ("more at the peak, in whole gradients", f"{peak / whole:.1f}", "at most 6"),
        ]
        _judge_shards(shards, model, inputs, gpus, facts)
        if any(each.grad is not None for replica in replicas for each in replica.parameters()):
            raise Wrong("the shards are right, and whole gradients are still in .grad.", facts)
        if any("host" in route for route in t.bytes_moved):
            raise Wrong("numbers went over the host: use reduce_scatter.", facts)
        if sent > least:
            raise Wrong("one GPU sends more than a reduce-scatter of each gradient does.", facts)
        if peak > 6 * whole:
            raise Wrong(
                f"at the peak there are {peak / whole:.1f} whole gradients more than before: a "
                "part of a tensor keeps all of it in memory, and a copy of the part does not.",
                facts,
            )
        return right("scattered as they came, and nothing whole is left.", facts)


def _judge_shards(
    shards: list[dict], model: nn.Module, inputs: Tensor, gpus: list[torch.device], facts: list
) -> None:
    model.zero_grad()
    model(inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        total = gradient_of(parameter).chunk(len(gpus))
        for rank, (ours, wanted, gpu) in enumerate(zip(shards, total, gpus, strict=True)):
            if name not in ours:
                raise Wrong(f"shards[{rank}] has no {name!r} after backward.", facts)
            shard = ours[name]
            if not isinstance(shard, Tensor) or shard.device != gpu or shard.shape != wanted.shape:
                raise Wrong(
                    f"shards[{rank}][{name!r}] should be on {gpu}, of shape {tuple(wanted.shape)}.",
                    facts,
                )
            if torch.allclose(shard.cpu() * len(gpus), wanted, rtol=1e-3, atol=1e-4):
                raise Wrong("these are means over the GPUs: the sum is asked for.", facts)
            if not torch.allclose(shard.cpu(), wanted, rtol=1e-3, atol=1e-4):
                raise Wrong(
                    f"shards[{rank}][{name!r}] is not chunk {rank} of the sum of all gradients.",
                    facts,
                )
