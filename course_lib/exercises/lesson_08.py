"""Checks of lesson 08: which stage fits; gather and forget, and again; scatter in a hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import (
    Facts,
    Unchanged,
    gradient_of,
    require_finite,
    require_not_over_host,
    require_tensors,
)
from course_lib.exercises.sharded_layer import (
    judge_gradients,
    judge_outputs,
    require_own_memory,
    weights_in_shards,
)
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
                f"{_fit_mistake(ours, expected, parameters, count, memory)}"
            )
    return right("the lowest stage that fits, on both sides of each limit.")


def _fit_mistake(
    ours: object, expected: int | None, parameters: float, count: int, memory: float
) -> str:
    """What the stage takes that was returned, and a lower one that fits; "" if none was."""
    if isinstance(ours, bool) or ours not in (0, 1, 2, 3):
        return ""
    laws = (16, 4 + 12 / count, 2 + 14 / count, 16 / count)
    needed = [parameters * law for law in laws]
    said = f" Stage {ours} takes {needed[int(ours)] / 1e9:g} GB"
    if needed[int(ours)] > memory or expected is None:
        return f"{said} and does not fit."
    exactly = "exactly " if needed[expected] == memory else ""
    lower = f"stage {expected} takes {exactly}{needed[expected] / 1e9:g} GB"
    return f"{said} and fits, and a lower one fits as well: {lower}."


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


@check
def check_gather(sharded_forward: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on the output, on the bytes gathered, and on the memory at the peak."""
    width, depth, count = 256, 6, 4
    with hardware.fresh_devices(count) as gpus:
        weights, layers = weights_in_shards(gpus, width, depth)
        inputs = [torch.randn(2, width) for _ in gpus]
        xs = [x.to(gpu) for x, gpu in zip(inputs, gpus, strict=True)]
        unchanged = Unchanged(
            {f"the input on {gpu}": x for gpu, x in zip(gpus, xs, strict=True)}
            | _shards_by_name(layers)
        )
        before = [hardware.memory_in_use(gpu) for gpu in gpus]
        with timeline.trace() as t:
            outs = sharded_forward([list(shards) for shards in layers], list(xs))
        require_tensors(outs, [(2, width)] * count)
        whole = weights[0].nbytes
        peaks = [(peak - held) / whole for peak, held in zip(t.peak_memory, before, strict=True)]
        least = depth * (count - 1) * whole // count
        sent = max(t.bytes_sent(gpu) for gpu in gpus)
        facts = [
            ("at the peak, in whole weights", f"{max(peaks):.2f}", "at most 1.2"),
            ("most bytes sent by one GPU", format_bytes(sent), f"at most {format_bytes(least)}"),
        ]
        for gpu, out, x in zip(gpus, outs, inputs, strict=True):
            _judge_output(out, x, weights, gpu, facts)
        unchanged.require()
        require_not_over_host(t, "numbers", facts)
        _judge_travel(t, gpus, least, facts)
        if max(peaks) > 1.2:
            raise Wrong(_memory_mistake(peaks), facts)
        return right("at most one whole weight at a time, each gathered once.", facts)


def _shards_by_name(layers: list[list[Tensor]]) -> dict[str, Tensor]:
    return {
        f"layer {i}'s shard on GPU {rank}": shard
        for i, shards in enumerate(layers)
        for rank, shard in enumerate(shards)
    }


def _judge_output(
    out: Tensor, x: Tensor, weights: list[Tensor], gpu: torch.device, facts: Facts
) -> None:
    expected = linear = x
    for weight in weights:
        expected, linear = F.relu(F.linear(expected, weight)), F.linear(linear, weight)
    if out.device != gpu:
        raise Wrong(f"an output is on {out.device}, and should be on {gpu}.", facts)
    require_finite([out], f"the output on {gpu}")
    if torch.allclose(out.cpu(), linear, atol=1e-4):
        raise Wrong(f"the output on {gpu} lacks the relu after each layer.", facts)
    if not torch.allclose(out.cpu(), expected, atol=1e-4):
        raise Wrong(f"the output on {gpu} is not relu(x Wᵀ) through all layers.", facts)


def _judge_travel(t: timeline.Trace, gpus: list[torch.device], least: int, facts: Facts) -> None:
    """Raise unless every GPU sends, and so gets, each missing shard of each weight once."""
    sent = [t.bytes_sent(gpu) for gpu in gpus]
    got = [sum(n for (_, to), n in t.bytes_moved.items() if to == str(gpu)) for gpu in gpus]
    most = sent.index(max(sent))
    if min(got) >= 2 * least:
        raise Wrong(
            f"each GPU gets {min(got) / least:g} times the bytes of the shards that it lacks: "
            "gather each weight once.",
            facts,
        )
    if min(got) < least:
        raise Wrong(
            f"GPU {got.index(min(got))} gets less than the shards that it lacks: something else "
            "than weights travels. Here each GPU has its input, and the weights come to it.",
            facts,
        )
    if sent[most] > least:
        raise Wrong(
            f"GPU {most} sends {sent[most] / least:.2g} times what each GPU would send if all sent "
            "what only they have.",
            facts,
        )


def _memory_mistake(peaks: list[float]) -> str:
    """What is said of ``peaks``, the most whole weights that were on each GPU at once."""
    too_much = [rank for rank, peak in enumerate(peaks) if peak > 1.2]
    said = f"GPU {too_much[0]} held {peaks[too_much[0]]:.1f} whole weights at once: "
    if peaks[too_much[0]] < 1.9:
        return said + "there was one, and beside it something else, such as shards that arrived."
    if len(too_much) == 1 and len(peaks) > 1:
        return (
            f"{said}on the other GPUs there was one. Does a name still hold its last weight, as "
            "the variable of a loop does when the loop has ended?"
        )
    return f"{said}a name or a list still holds one weight when the next one comes."


@check
def check_back(sharded_linear: Callable[..., Sequence[Tensor]]) -> Verdict:
    """Graded on outputs and gradients, on what is in memory between, at the peak, and on bytes."""
    width, depth, count = 256, 5, 4
    with hardware.fresh_devices(count) as gpus:
        weights, layers = weights_in_shards(gpus, width, depth)
        for shard in [shard for shards in layers for shard in shards]:
            shard.requires_grad_()
        inputs = [torch.randn(2, width) for _ in gpus]
        xs = [x.to(gpu).requires_grad_() for x, gpu in zip(inputs, gpus, strict=True)]
        unchanged = Unchanged(_shards_by_name(layers))
        before = hardware.memory_in_use(gpus[0])
        with timeline.trace() as forward:
            values: Sequence[Tensor] = xs
            for shards in layers:
                values = sharded_linear(list(values), list(shards))
                require_tensors(values, [(2, width)] * count)
        whole = weights[0].nbytes
        kept = (hardware.memory_in_use(gpus[0]) - before) / whole
        judge_outputs(values, inputs, weights, gpus)
        with timeline.trace() as backward:
            torch.autograd.backward([value.square().sum() for value in values])
        del values
        peak = (max(backward.peak_memory) - before) / whole
        bytes_sent = [max(t.bytes_sent(g) for g in gpus) for t in (forward, backward)]
        one = depth * (count - 1) * whole // count
        facts = [
            ("whole weights kept for backward", f"{kept:.2f}", "at most 0.2"),
            ("more at backward's peak, in whole weights", f"{peak:.2f}", "at most 4"),
            ("sent by one GPU, forward", format_bytes(bytes_sent[0]), format_bytes(one)),
            ("sent by one GPU, backward", format_bytes(bytes_sent[1]), format_bytes(2 * one)),
        ]
        judge_gradients(xs, layers, inputs, weights, facts)
        unchanged.require()
        for t in (forward, backward):
            require_not_over_host(t, "numbers", facts)
        if kept > 0.2:
            raise Wrong(
                f"between forward and backward GPU 0 still holds {kept:.1f} whole weights of "
                f"{depth}: keep shards for backward, and not what was gathered.",
                facts,
            )
        if bytes_sent[0] > one:
            raise Wrong("forward sends more than one gather of each weight.", facts)
        if bytes_sent[1] > 2 * one:
            raise Wrong(
                "backward sends more than one gather and one reduce-scatter of each weight.", facts
            )
        for shard in (each for shards in layers for each in shards):
            require_own_memory(gradient_of(shard), facts)
        if peak > 4:
            raise Wrong(
                f"at backward's peak there are {peak:.1f} whole weights or gradients more than "
                "before: does something hold them from one layer to the next?",
                facts,
            )
        return right("gone after forward, back for backward, and only shards of gradients.", facts)


@check
def check_hook(scatter_in_hooks: Callable[[list[nn.Module], list[dict]], None]) -> Verdict:
    """Graded on the shards, on what is left in memory and at the peak, and on the bytes."""
    width, depth, count = 128, 10, 4
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    with hardware.fresh_devices(count) as gpus:
        replicas, inputs = replicate(model, gpus), torch.randn(count, 2, width)
        losses = _losses_layer_by_layer(replicas, inputs, gpus)
        shards: list[dict] = [{} for _ in gpus]
        unchanged = Unchanged({f"a parameter on {r[0].weight.device}": r for r in replicas})
        waiting = _count_gradients_at_the_end(replicas[0])
        scatter_in_hooks(list(replicas), shards)
        before = hardware.memory_in_use(gpus[0])
        with timeline.trace() as t:
            torch.autograd.backward(losses)
        del losses
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
        unchanged.require()
        require_not_over_host(t, "numbers", facts)
        if sent > least:
            raise Wrong("one GPU sends more than a reduce-scatter of each gradient does.", facts)
        for shard in (each for own in shards for each in own.values()):
            require_own_memory(shard, facts)
        if peak > 6 * whole:
            raise Wrong(_hook_memory_mistake(peak / whole, waiting, depth), facts)
        for own in shards:
            own.clear()
        torch.autograd.backward(_losses_layer_by_layer(replicas, inputs, gpus))
        if any(len(own) < depth for own in shards):
            raise Wrong(
                "the first backward leaves the right shards, and a second one does not: does "
                "something still count the gradients of the first?",
                facts,
            )
        return right("scattered as they came, and nothing whole is left.", facts)


def _losses_layer_by_layer(
    replicas: Sequence[nn.Module], inputs: Tensor, gpus: list[torch.device]
) -> list[Tensor]:
    """Each replica's loss; all compute a layer before the next, so that backward does so, too."""
    values = [x.to(gpu) for x, gpu in zip(inputs, gpus, strict=True)]
    for layers in zip(*(replica.children() for replica in replicas), strict=True):
        values = [layer(x) for layer, x in zip(layers, values, strict=True)]
    return [value.square().sum() for value in values]


def _count_gradients_at_the_end(replica: nn.Module) -> list[int]:
    """A list that gets how many gradients are in .grad when that of the first layer comes, last."""
    counts: list[int] = []

    def count(_: Tensor) -> None:
        counts.append(sum(each.grad is not None for each in replica.parameters()))

    next(replica.parameters()).register_post_accumulate_grad_hook(count)
    return counts


def _hook_memory_mistake(peak: float, waiting: list[int], depth: int) -> str:
    """What is said of ``peak`` whole gradients, if ``waiting[0]`` were in .grad at the end."""
    said = f"at the peak there are {peak:.1f} whole gradients more than before: "
    if waiting[0] > depth // 2:
        return (
            f"{said}when the last one came, {waiting[0]} of {depth} were still whole in .grad. "
            "Scatter each as soon as all replicas have it."
        )
    return f"{said}something, such as a list, holds them when they have been scattered."


def _judge_shards(
    shards: list[dict], model: nn.Module, inputs: Tensor, gpus: list[torch.device], facts: Facts
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
                is_tensor = isinstance(shard, Tensor)
                kind = f"on {shard.device}, of shape {tuple(shard.shape)}" if is_tensor else "none"
                raise Wrong(
                    f"shards[{rank}][{name!r}] should be a tensor on {gpu}, of shape "
                    f"{tuple(wanted.shape)}, and is {kind}.",
                    facts,
                )
            require_finite([shard], f"shards[{rank}][{name!r}]")
            if torch.allclose(shard.cpu() * len(gpus), wanted, rtol=1e-3, atol=1e-4):
                raise Wrong("these are means over the GPUs: the sum is asked for.", facts)
            if not torch.allclose(shard.cpu(), wanted, rtol=1e-3, atol=1e-4):
                raise Wrong(
                    f"shards[{rank}][{name!r}] is not chunk {rank} of the sum of all gradients.",
                    facts,
                )
