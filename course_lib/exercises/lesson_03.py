"""Checks of lesson 03: a pipelined broadcast, bucket order, accumulation, rings over nodes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import CLASSROOM, format_bytes, hardware, timeline
from course_lib.exercises.diagnosis import (
    Facts,
    Unchanged,
    gradient_of,
    require_finite,
    require_not_over_host,
)
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.models import MLP
from course_lib.parallel.all_reduce_costs import ring_seconds
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.data_parallel import replicate
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.transfers import SideStreams


@check
def check_broadcast(broadcast: Callable[[list[Tensor]], None]) -> Verdict:
    """Graded on the values, on missing waits, on the bytes each GPU sends and on the time."""
    for count, numel in ((1, 12), (4, 1000), (3, 10)):
        _require_copies(broadcast, count, numel)
    _require_waits(broadcast)
    for count in (4, 8):
        facts = _require_speed(broadcast, count)
    return right("all have the tensor, in little more than the time of one copy.", facts)


def _require_copies(broadcast: Callable[[list[Tensor]], None], count: int, numel: int) -> None:
    # The trace keeps warnings about missing waits from the learner: the verdict speaks of them.
    with hardware.fresh_devices(count) as gpus, timeline.trace():
        originals = [torch.randn(numel) for _ in gpus]
        tensors = [original.to(gpu) for original, gpu in zip(originals, gpus, strict=True)]
        broadcast(list(tensors))
        results = [tensor.cpu() for tensor in tensors]
    where = f"on {count} GPUs, with tensors of {numel} numbers,"
    if not torch.equal(results[0], originals[0]):
        raise Wrong(f"{where} the first tensor changed.")
    for rank, (result, original) in enumerate(zip(results, originals, strict=True)):
        if torch.equal(result, originals[0]):
            continue
        if torch.equal(result, original):
            raise Wrong(f"{where} the tensor on GPU {rank} is what it was: write into it.")
        raise Wrong(f"{where} the tensor on GPU {rank} is not that of the first GPU.")


def _require_waits(broadcast: Callable[[list[Tensor]], None]) -> None:
    """The tensors are written right before and right after, on the main streams."""
    with hardware.fresh_devices(3) as gpus, timeline.trace() as t:
        tensors = [torch.ones(1000, device=gpu) for gpu in gpus]
        broadcast(list(tensors))
        for tensor in tensors:
            tensor.zero_()
    if t.hazards:
        raise Wrong(f"a wait is missing: {t.hazards[0]}")


def _require_speed(broadcast: Callable[[list[Tensor]], None], count: int) -> Facts:
    """Check bytes and seconds; returns what it took."""
    numel = 1_000_000
    spec = CLASSROOM.with_(launch_overhead=0.0)
    with hardware.fresh_devices(count, spec) as gpus:
        tensors = [torch.ones(numel, device=gpu) for gpu in gpus]
        with timeline.trace() as t:
            broadcast(list(tensors))
    sent, most, one = max(t.bytes_sent(gpu) for gpu in gpus), 4 * numel, 4 * numel
    limit = 1.3 * one / spec.link_bandwidth
    facts = [
        ("GPUs", f"{count}", f"{count}"),
        ("most bytes sent by one GPU", format_bytes(sent), f"at most {format_bytes(most)}"),
        ("time", f"{t.seconds * 1e3:.1f} ms", f"at most {limit * 1e3:.1f} ms"),
    ]
    require_not_over_host(t, "numbers", facts)
    if sent > most:
        raise Wrong(
            f"on {count} GPUs one sends more than one tensor: let each pass on what it received.",
            facts,
        )
    if t.seconds > limit:
        raise Wrong(
            f"the values are right, and on {count} GPUs it takes {t.seconds * 1e3:.1f} ms, more "
            f"than {limit * 1e3:.1f}: does each GPU send one chunk while it receives the next, "
            "from a side stream to a side stream, and are the chunks small enough?",
            facts,
        )
    return facts


@check
def check_launch(on_full: Callable[[_Process, int], None]) -> Verdict:
    """Graded on which buckets are started when, over two steps and in many orders."""
    for count in (1, 2, 5):
        orders = list(itertools.islice(itertools.permutations(range(count)), 120))
        processes = [_Process(count) for _ in orders]  # all at once: their notes are their own
        for step in (1, 2):
            for place in range(count):
                for process, order in zip(processes, orders, strict=True):
                    on_full(process, order[place])
                    _require_started(process, order[: place + 1], step)
            for process in processes:
                process.started = []
    return right("in one order on every process, each as early as it allows, step after step.")


class _Process(SimpleNamespace):
    """What ``on_full`` sees of a process; keeps which buckets were started in this step."""

    count: int
    started: list[int]

    def __init__(self, count: int) -> None:
        super().__init__(count=count, notes={}, started=[])

    def start(self, number: int) -> None:
        self.started = [*self.started, number]


def _require_started(process: _Process, full: tuple[int, ...], step: int) -> None:
    ready = next(n for n in range(process.count + 1) if n not in full)
    if process.started == list(range(ready)):
        return
    buckets = f"{process.count} bucket{'s' if process.count > 1 else ''}"
    case = f"in step {step} of a process with {buckets}, full so far {list(full)}:"
    started = f"it has started {process.started}, and should have started {list(range(ready))}."
    if step == 2 and not process.started:
        started += " Does it begin at bucket 0 again?"
    raise Wrong(f"{case} {started}")


@check
def check_accumulate(accumulate: Callable[..., None]) -> Verdict:
    """Graded on the gradients, the bytes that crossed the links and the peak memory."""
    with hardware.fresh_devices(3) as gpus:
        model = MLP(16, 32, 4)
        examples = 200  # whose activations outweigh the parameters
        batches = [
            [(torch.randn(examples, 16), torch.randint(0, 4, (examples,))) for _ in gpus]
            for _ in "1234"
        ]
        replicas = replicate(model, gpus)
        unchanged = Unchanged({f"the parameters of replica {r}": m for r, m in enumerate(replicas)})
        buckets = GradientBuckets(replicas, bucket_bytes=1000)
        microbatches = [_on(gpus, shards) for shards in batches]
        with timeline.trace() as t:
            accumulate(replicas, buckets, microbatches, F.cross_entropy)
            gradients = []
            for rank, replica in enumerate(replicas):
                without = f"the replica on GPU {rank} has no gradients."
                ours = [gradient_of(parameter, without) for parameter in replica.parameters()]
                gradients.append(torch.cat([gradient.flatten() for gradient in ours]))
        unchanged.require()
        nbytes = sum(p.nbytes for p in model.parameters())
        moved, target = t.bytes_between_devices, 2 * (len(gpus) - 1) * nbytes
        facts = [("bytes moved", format_bytes(moved), f"at most {format_bytes(target)}")]
        require_not_over_host(t, "gradients", facts, least=nbytes)
        if moved > target:
            raise Wrong(
                "more bytes crossed the links than the gradients have, sent once: only the last "
                "microbatch may set the buckets off, and nothing else need cross a link.",
                facts,
            )
        if not moved:
            raise Wrong("nothing was exchanged: each GPU has the gradient of its own shards.")
        expected = _gradients(model, batches)
        for rank, gradient in enumerate(gradients):
            gradient = gradient.cpu()
            require_finite([gradient], f"the gradients on GPU {rank}")
            if not torch.allclose(gradient, expected, atol=1e-6):
                raise Wrong(f"on GPU {rank}: {_likely(gradient, expected, batches, model)}", facts)
        if t.hazards:
            raise Wrong(
                f"a wait is missing: {t.hazards[0]} Is finish() called after the last backward?",
                facts,
            )
        facts.append(_require_one_microbatch(t, examples, facts))
        return right("the mean's gradient, exchanged once, one microbatch in memory.", facts)


def _require_one_microbatch(t: timeline.Trace, examples: int, facts: Facts) -> tuple:
    """Check that activations of one microbatch at most were held on a GPU; a row of facts."""
    starts = [history[0][1] for history in t.memory]
    grown = max(peak - start for peak, start in zip(t.peak_memory, starts, strict=True))
    # Of each example the check's model keeps 32 + 32 numbers for backward, and some more in it.
    limit = 2 * examples * (32 + 32) * 4
    row = ("memory during it", format_bytes(grown), f"at most {format_bytes(limit)}")
    if grown > limit:
        raise Wrong(
            "the gradients are right, and a GPU held the activations of several microbatches at "
            "once: call backward for each before the next one's forward pass.",
            [*facts, row],
        )
    return row


def _on(gpus: list[torch.device], shards: list) -> tuple[list[Tensor], list[Tensor]]:
    xs = [x.to(gpu) for (x, _), gpu in zip(shards, gpus, strict=True)]
    ys = [y.to(gpu) for (_, y), gpu in zip(shards, gpus, strict=True)]
    return xs, ys


def _gradients(model: nn.Module, batches: list) -> Tensor:
    """Those of the mean loss over all examples, in one row."""
    single = copy.deepcopy(model)
    xs, ys = zip(*[shard for shards in batches for shard in shards], strict=True)
    F.cross_entropy(single(torch.cat(xs)), torch.cat(ys)).backward()
    return torch.cat([gradient_of(parameter).flatten() for parameter in single.parameters()])


def _likely(ours: Tensor, expected: Tensor, batches: list, model: nn.Module) -> str:
    """Which mistake the gradients look like."""
    parts, gpus = len(batches), len(batches[0])
    for factor, cause in (
        (parts * gpus, "the sum of all losses' gradients: divide each by microbatches times GPUs"),
        (parts, f"{parts} times too large: divide each loss by the number of microbatches as well"),
        (gpus, f"{gpus} times too large: divide each loss by the number of GPUs as well"),
    ):
        if torch.allclose(ours, expected * factor, atol=1e-5):
            return f"{cause}."
    for number, shards in enumerate(batches):
        mean = _gradients(model, [shards])
        if any(torch.allclose(ours * factor, mean, atol=1e-6) for factor in (1, parts)):
            return f"only microbatch {number} is in the gradients: the others' were lost."
    return "not the gradient of the mean over all examples."


@check
def check_orders(ring_orders: Callable[[int, int], Sequence[Sequence[int]]]) -> Verdict:
    """Graded on how often the rings leave a node, and on the seconds of all of them at once."""
    facts: Facts = []
    for nodes, size in ((1, 3), (3, 2), (2, 4)):
        orders = ring_orders(nodes, size)
        where = f"for {nodes} node{'s' if nodes > 1 else ''} of {size},"
        _require_orders(orders, nodes, size, where)
        if nodes > 1:
            facts = _require_all_cards(orders, nodes, size, where)
    return right("every card sends in one ring.", facts)


def _require_orders(orders: Any, nodes: int, size: int, where: str) -> None:
    if not isinstance(orders, (list, tuple)) or len(orders) != size:
        raise Wrong(f"{where} return a list of {size} rings.")
    for number, order in enumerate(orders):
        ranks = set(range(nodes * size))
        if not isinstance(order, (list, tuple)) or len(order) != len(ranks) or {*order} != ranks:
            raise Wrong(
                f"{where} each of the {nodes * size} ranks stands once in a ring, and ring "
                f"{number} is {order}."
            )
        crossings = len(_crossings(order, size))
        if crossings > nodes > 1:
            raise Wrong(
                f"{where} ring {number} leaves a node {crossings} times, and {nodes} times are "
                f"enough: {list(order)}."
            )


def _crossings(order: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Who sends to whom over the network."""
    following = [*order[1:], order[0]]
    return [(a, b) for a, b in zip(order, following, strict=True) if a // size != b // size]


def _require_all_cards(orders: Sequence[Sequence[int]], nodes: int, size: int, where: str) -> Facts:
    """Run the rings at once, and check the seconds; returns what it took."""
    numel = 240_000  # of which every number of GPUs here is a divisor
    spec = CLASSROOM.with_(launch_overhead=0.0)
    with hardware.fresh_devices(nodes * size, spec, "meta", nodes) as gpus:
        tensors = [torch.empty(numel, device=gpu) for gpu in gpus]
        parts = [tensor.tensor_split(size) for tensor in tensors]
        with timeline.trace() as t:
            sides = [SideStreams(gpus) for _ in orders]
            for number, (order, side) in enumerate(zip(orders, sides, strict=True)):
                with side.beside(tensors):
                    ring_all_reduce([parts[rank][number] for rank in order])
    target = ring_seconds(spec, nodes, size, 4 * numel / size)
    facts = [
        (f"{size} rings at once, {nodes} nodes of {size}", f"{t.seconds * 1e3:.1f} ms",
         f"about {target * 1e3:.1f} ms"),
    ]  # fmt: skip
    if t.seconds > 1.15 * target:
        pairs = [pair for order in orders for pair in _crossings(order, size)]
        ends = {"sends": [a for a, _ in pairs], "receives": [b for _, b in pairs]}
        how = max(ends, key=lambda each: max(map(ends[each].count, ends[each])))
        most = max(ends[how], key=ends[how].count)
        raise Wrong(
            f"{where} the rings take {t.seconds * 1e3:.1f} ms: GPU {most} {how} over the network "
            f"in {ends[how].count(most)} of them, and its card takes one after the other.",
            facts,
        )
    return facts
