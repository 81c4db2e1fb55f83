"""One training step of a GPT by each method of the course, for comparison.

What lesson 09 compares. Each function prepares one method on some devices and returns a step: a
function without arguments that trains on one batch. The model stays as it is.

What differs is the method, and nothing else: all of a batch is on the devices before the step, in
microbatches of the same number of examples; gradients go round rings, as soon as they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from course_lib import hardware, timeline
from course_lib.models import GPT, next_token_loss
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.counting import count_targets
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.kinds import Devices, Step
from course_lib.parallel.pipeline import Pipeline, microbatches_of
from course_lib.parallel.schedules import one_f_one_b
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.split_parameter import all_reduce_partial_gradients
from course_lib.parallel.tensor_parallel import ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy

BUCKET_BYTES = 200_000

# Makes a step of (model, devices, tokens, targets, examples in a microbatch).
Method = Callable[[GPT, Devices, Tensor, Tensor, int], Step]


def data_parallel_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, microbatch: int
) -> Step:
    """Lessons 02 and 03: a replica on each device, gradients in overlapped buckets."""
    replicas = replicate(gpt, devices)
    buckets = GradientBuckets(replicas, BUCKET_BYTES)
    optimizer = torch.optim.AdamW(nn.ModuleList(replicas).parameters())
    pieces, total = _sharded_pieces(devices, tokens, targets, microbatch)

    def step() -> None:
        optimizer.zero_grad()
        for number, (xs, ys) in enumerate(pieces, start=1):
            with buckets.accumulate() if number < len(pieces) else nullcontext():
                backward_on_shards(replicas, xs, ys, next_token_loss, total)
        buckets.finish()
        optimizer.step()

    return step


def sharded_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, microbatch: int, stage: int = 3
) -> Step:
    """Lesson 08: ZeRO, in float32 like all others here."""
    model = Sharded(gpt, devices, stage, dtype=torch.float32)
    pieces, total = _sharded_pieces(devices, tokens, targets, microbatch)

    def step() -> None:
        model.zero_grad()
        for number, (xs, ys) in enumerate(pieces, start=1):
            with model.accumulate() if number < len(pieces) else nullcontext():
                model.backward(xs, ys, next_token_loss, total)
        model.step()

    return step


def pipeline_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, microbatch: int
) -> Step:
    """Lesson 05: 1F1B."""
    depth, stages = len(gpt) - 2, len(devices)
    cuts = [1 + depth * stage // stages for stage in range(1, stages)]
    model = Pipeline(deepcopy(gpt), devices, cuts)
    optimizer = torch.optim.AdamW(model.parameters())
    count = _microbatch_count(len(tokens), microbatch)
    schedule = one_f_one_b(stages, count)
    x, ys = tokens.to(devices[0]), microbatches_of(targets, count, devices[-1])

    def step() -> None:
        optimizer.zero_grad()
        model.forward_backward(schedule, x, ys, next_token_loss)
        optimizer.step()

    return step


def tensor_parallel_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, microbatch: int
) -> Step:
    """Lessons 06 and 07: layers split by neurons and heads, the rest by sequence."""
    model = ParallelGPT(gpt, devices, sequence_parallel=True)
    optimizer = torch.optim.AdamW(model.parameters())
    total = count_targets(targets)
    pieces = [
        (x.to(devices[0]), y.to(devices[0]), count_targets(y) / total)
        for x, y in _pieces(tokens, targets, microbatch)
    ]

    def step() -> None:
        optimizer.zero_grad()
        for x, y, share in pieces:
            losses = vocabulary_cross_entropy(model(x), y)
            torch.autograd.backward([loss * share for loss in losses])
        all_reduce_partial_gradients(model)
        optimizer.step()

    return step


def context_parallel_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, microbatch: int
) -> Step:
    """Lesson 07: each device has a part of every sequence, and ring attention."""
    model = ContextParallelGPT(gpt, devices)
    buckets = GradientBuckets(list(model.replicas), BUCKET_BYTES)
    optimizer = torch.optim.AdamW(model.parameters())
    total = count_targets(targets)
    split = partial(split_sequence, devices=devices, dimension=1)
    pieces = [
        (split(x), split(y), count_targets(y) / total)
        for x, y in _pieces(tokens, targets, microbatch)
    ]

    def step() -> None:
        optimizer.zero_grad()
        for number, (xs, ys, share) in enumerate(pieces, start=1):
            with buckets.accumulate() if number < len(pieces) else nullcontext():
                losses = next_token_losses(model(xs), ys)
                torch.autograd.backward([loss * share for loss in losses])
        buckets.finish()
        optimizer.step()

    return step


METHODS: dict[str, Method] = {
    "data": data_parallel_step,
    "ZeRO 1": partial(sharded_step, stage=1),
    "ZeRO 3": partial(sharded_step, stage=3),
    "pipeline": pipeline_step,
    "tensor": tensor_parallel_step,
    "context": context_parallel_step,
}


def _microbatch_count(examples: int, microbatch: int) -> int:
    return -(-examples // microbatch)


def _pieces(tokens: Tensor, targets: Tensor, microbatch: int) -> Iterable[tuple[Tensor, Tensor]]:
    count = _microbatch_count(len(tokens), microbatch)
    return zip(tokens.tensor_split(count), targets.tensor_split(count), strict=True)


def _sharded_pieces(
    devices: Devices, tokens: Tensor, targets: Tensor, microbatch: int
) -> tuple[list[tuple], int]:
    """Pieces with a microbatch for each device, and what the mean over all of them counts."""
    pieces = [
        (split_batch(x, devices), split_batch(y, devices))
        for x, y in _pieces(tokens, targets, microbatch * len(devices))
    ]
    return pieces, count_targets(targets)


@dataclass(frozen=True)
class Measurement:
    """What one step took.

    Attributes:
        seconds: simulated.
        peak: the most bytes in use on any device.
        between_steps: the most bytes in use on any device before the step: parameters and
            optimizer state, and the gradients where they stay.
        sent: the most bytes that any device sent to others.
        exposed: of the step, the part in which a device sends or receives and computes nothing,
            from 0 to 1: the mean over the devices.
        idle: likewise, the part in which it does neither.
    """

    seconds: float
    peak: int
    between_steps: int
    sent: int
    exposed: float
    idle: float


def measure(step: Step, devices: Devices) -> Measurement:
    """Run ``step`` twice, and measure the second time: the first one makes optimizer state."""
    step()
    with timeline.trace() as t:
        step()
    sent = max(t.bytes_sent(device) for device in devices)
    starts = [history[0][1] for history in t.memory]
    shares = [_exposed_and_idle(t, device.index) for device in devices]
    exposed, idle = (sum(values) / len(devices) for values in zip(*shares, strict=True))
    return Measurement(t.seconds, max(t.peak_memory), max(starts), sent, exposed, idle)


def _exposed_and_idle(t: timeline.Trace, index: int) -> tuple[float, float]:
    """Parts of a recording: a device copies alone, and a device does nothing."""
    own = [span for span in t.spans if index in span.devices]
    busy = _covered([(span.start, span.end) for span in own])
    computing = _covered([(span.start, span.end) for span in own if span.route is None])
    return (busy - computing) / t.seconds, 1 - busy / t.seconds


def _covered(stretches: list[tuple[float, float]]) -> float:
    """How many seconds are in at least one of some stretches of time."""
    seconds = done = 0.0
    for start, end in sorted(stretches):
        seconds += max(0.0, end - max(start, done))
        done = max(done, end)
    return seconds


def compare(
    gpt: GPT,
    batch: int,
    length: int,
    count: int,
    spec: hardware.Spec,
    names: Iterable[str],
    microbatch: int | None = None,
) -> dict[str, Measurement | None]:
    """Measure some methods on ``count`` virtual devices of their own each.

    Args:
        batch, length: sequences in a step, and tokens in each.
        names: of :data:`METHODS`.
        microbatch: sequences that a device, or a group that shares a layer, works on at once; if
            not given, one device's share of the batch.

    Returns:
        A measurement for each name; ``None`` if the model did not fit.

    Raises:
        ValueError: there is no such method.
    """
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}: there are {list(METHODS)}")
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    size = microbatch or max(1, batch // count)
    results: dict[str, Measurement | None] = {}
    for name in names:
        with hardware.fresh_devices(count, spec) as devices:
            try:
                results[name] = measure(METHODS[name](gpt, devices, tokens, tokens, size), devices)
            except torch.OutOfMemoryError:
                results[name] = None
    return results


def largest(fits: Callable[[int], bool], sizes: Sequence[int]) -> int | None:
    """The largest of some rising sizes that fits, found by halving; ``None`` if none does.

    Args:
        fits: whether a size does; if one does, so do all that are smaller.
    """
    fitting, too_large = -1, len(sizes)
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if fits(sizes[middle]):
            fitting = middle
        else:
            too_large = middle
    return sizes[fitting] if fitting >= 0 else None
