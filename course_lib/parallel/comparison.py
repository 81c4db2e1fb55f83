"""One training step of a GPT by each method of the course, for comparison.

What lesson 09 compares. Each function prepares one method on some devices and returns a step: a
function without arguments that trains on one batch. The model stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib import hardware, timeline
from course_lib.models import GPT, next_token_loss
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.data_parallel import (
    all_reduce_gradients,
    backward_on_shards,
    replicate,
    split_batch,
)
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.kinds import Devices, Step
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.schedules import one_f_one_b
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.split_parameter import all_reduce_partial_gradients
from course_lib.parallel.tensor_parallel import ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy

BUCKET_BYTES = 200_000


def data_parallel_step(gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor) -> Step:
    """Lessons 02 and 03: a replica on each device, gradients in overlapped buckets."""
    replicas = replicate(gpt, devices)
    buckets = GradientBuckets(replicas, BUCKET_BYTES)
    optimizers = [torch.optim.AdamW(replica.parameters()) for replica in replicas]
    xs, ys = split_batch(tokens, devices), split_batch(targets, devices)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward_on_shards(replicas, xs, ys, next_token_loss)
        buckets.finish()
        for optimizer in optimizers:
            optimizer.step()

    return step


def sharded_step(gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor) -> Step:
    """Lesson 08: ZeRO, stage 3, in float32 like all others here."""
    model = Sharded(gpt, devices, stage=3, dtype=torch.float32)
    xs, ys = split_batch(tokens, devices), split_batch(targets, devices)
    return lambda: model.train_step(xs, ys, next_token_loss)


def pipeline_step(gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor) -> Step:
    """Lesson 05: 1F1B, with four microbatches for each device."""
    depth, count = len(gpt) - 2, len(devices)
    cuts = [1 + depth * stage // count for stage in range(1, count)]
    model = Pipeline(deepcopy(gpt), devices, cuts)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = one_f_one_b(count, min(4 * count, len(tokens)))
    x, y = tokens.to(devices[0]), targets.to(devices[-1])

    def step() -> None:
        optimizer.zero_grad()
        model.forward_backward(schedule, x, y, next_token_loss)
        optimizer.step()

    return step


def tensor_parallel_step(gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor) -> Step:
    """Lessons 06 and 07: layers split by neurons and heads, the rest by sequence."""
    model = ParallelGPT(gpt, devices, sequence_parallel=True)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = tokens.to(devices[0]), targets.to(devices[0])

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(vocabulary_cross_entropy(model(x), y))
        all_reduce_partial_gradients(model)
        optimizer.step()

    return step


def context_parallel_step(gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor) -> Step:
    """Lesson 07: each device has a part of every sequence, and ring attention."""
    model = ContextParallelGPT(gpt, devices)
    optimizer = torch.optim.AdamW(model.parameters())
    xs, ys = (split_sequence(each, devices, dimension=1) for each in (tokens, targets))

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(next_token_losses(model(xs), ys))
        all_reduce_gradients(model.replicas)
        optimizer.step()

    return step


METHODS = {
    "data": data_parallel_step,
    "sharded": sharded_step,
    "pipeline": pipeline_step,
    "tensor": tensor_parallel_step,
    "sequence": context_parallel_step,
}


@dataclass(frozen=True)
class Measurement:
    """What one step took.

    Attributes:
        seconds: simulated.
        peak: the most bytes in use on any device.
        between_steps: the most bytes in use on any device before the step: parameters and
            optimizer state, and the gradients where they stay.
        sent: the most bytes that any device sent to others.
    """

    seconds: float
    peak: int
    between_steps: int
    sent: int


def measure(step: Step, devices: Devices) -> Measurement:
    """Run ``step`` twice, and measure the second time: the first one makes optimizer state."""
    step()
    with timeline.trace() as t:
        step()
    sent = max(t.bytes_sent(device) for device in devices)
    starts = [history[0][1] for history in t.memory]
    return Measurement(t.seconds, max(t.peak_memory), max(starts), sent)


def compare(
    gpt: GPT, batch: int, length: int, count: int, spec: hardware.Spec, names: Sequence[str]
) -> dict[str, Measurement | None]:
    """Measure some methods on ``count`` virtual devices of their own each.

    Returns:
        A measurement for each name; ``None`` if the model did not fit.
    """
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    results: dict[str, Measurement | None] = {}
    for name in names:
        with hardware.fresh_devices(count, spec) as devices:
            try:
                results[name] = measure(METHODS[name](gpt, devices, tokens, tokens), devices)
            except torch.OutOfMemoryError:
                results[name] = None
    return results
