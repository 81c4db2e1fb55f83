"""One training step of a GPT by each method of the course.

What lesson 09 compares, and :mod:`course_lib.parallel.comparison` measures. Each function prepares
one method on some devices and returns a step: a function without arguments that trains on one
batch, and returns parts of its mean loss, which add up to it. The model stays as it is.

What differs is the method, and nothing else: all of a batch is on the devices before the step;
gradients go round rings, as soon as they are there; a device works on equally many tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from course_lib.models import GPT, next_token_loss
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    next_token_losses,
    split_sequence,
)
from course_lib.parallel.counting import count_targets
from course_lib.parallel.data_parallel import backward_on_shards, replicate, split_batch
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.pipeline import Pipeline, microbatches_of
from course_lib.parallel.schedules import one_f_one_b
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.split_parameter import all_reduce_partial_gradients
from course_lib.parallel.tensor_parallel import ParallelGPT
from course_lib.parallel.vocabulary import vocabulary_cross_entropy

BUCKET_BYTES = 200_000

# Trains on one batch; a read of what it returns makes the host wait.
TrainingStep = Callable[[], list[Tensor]]

# Makes a step of (model, devices, tokens, targets, pieces that the batch is computed in).
Method = Callable[[GPT, Devices, Tensor, Tensor, int], TrainingStep]


def adamw(parameters: ParamsT) -> torch.optim.Optimizer:
    """AdamW that has its moments at once, and not after its first step only."""
    optimizer = torch.optim.AdamW(parameters)
    for parameter in chain(*(group["params"] for group in optimizer.param_groups)):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def data_parallel_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, accumulations: int
) -> TrainingStep:
    """Lessons 02 and 03: a replica on each device, gradients in overlapped buckets."""
    replicas, total = replicate(gpt, devices), count_targets(targets)

    def backward(xs: Tensors, ys: Tensors) -> list[Tensor]:
        return backward_on_shards(replicas, xs, ys, next_token_loss, total)

    return replicated_step(replicas, _shards(devices, tokens, targets, accumulations), backward)


def context_parallel_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, accumulations: int
) -> TrainingStep:
    """Lesson 07: each device has a part of every sequence, and ring attention."""
    model = ContextParallelGPT(gpt, devices)
    model.positions_of(tokens.shape[1], zigzag=True)  # on the devices, as all else, before the step

    def backward(xs: Tensors, ys: Tensors, share: float) -> list[Tensor]:
        losses = [loss * share for loss in next_token_losses(model(xs), ys)]
        torch.autograd.backward(losses)
        return losses

    pieces = [
        (*(split_sequence(each, devices, dimension=1) for each in (x, y)), share)
        for x, y, share in _weighted_pieces(tokens, targets, accumulations)
    ]
    return replicated_step(list(model.replicas), pieces, backward)


def replicated_step(
    replicas: Sequence[nn.Module], pieces: list[tuple], backward: Callable[..., list[Tensor]]
) -> TrainingStep:
    """Accumulate over the pieces; gradients go round while the last one is computed."""
    buckets = GradientBuckets(list(replicas), BUCKET_BYTES)
    optimizer = adamw(nn.ModuleList(replicas).parameters())

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        losses = []
        for number, piece in enumerate(pieces, start=1):
            with buckets.accumulate() if number < len(pieces) else nullcontext():
                losses += backward(*piece)
        buckets.finish()
        optimizer.step()
        return losses

    return step


def sharded_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, accumulations: int, stage: int = 3
) -> TrainingStep:
    """Lesson 08: ZeRO, in float32 like all others here."""
    model, total = Sharded(gpt, devices, stage, torch.float32, adamw), count_targets(targets)
    pieces = _shards(devices, tokens, targets, accumulations)

    def step() -> list[Tensor]:
        model.zero_grad()
        losses = []
        for number, (xs, ys) in enumerate(pieces, start=1):
            with model.accumulate() if number < len(pieces) else nullcontext():
                losses += model.backward(xs, ys, next_token_loss, total)
        model.step()
        return losses

    return step


def pipeline_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, accumulations: int
) -> TrainingStep:
    """Lesson 05: 1F1B. Each piece is cut again, into two microbatches a stage."""
    depth, stages = len(gpt) - 2, len(devices)
    cuts = [1 + depth * stage // stages for stage in range(1, stages)]
    model = Pipeline(deepcopy(gpt), devices, cuts)
    optimizer = adamw(model.parameters())
    count = min(len(tokens), 2 * stages * accumulations)
    schedule = one_f_one_b(stages, count)
    x, ys = tokens.to(devices[0]), microbatches_of(targets, count, devices[-1])

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        losses = model.forward_backward(schedule, x, ys, next_token_loss)
        optimizer.step()
        return losses

    return step


def tensor_parallel_step(
    gpt: GPT, devices: Devices, tokens: Tensor, targets: Tensor, accumulations: int
) -> TrainingStep:
    """Lessons 06 and 07: layers split by neurons and heads, the rest by sequence."""
    model = ParallelGPT(gpt, devices, sequence_parallel=True)
    optimizer = adamw(model.parameters())
    pieces = [
        (x.to(devices[0]), y.to(devices[0]), share)
        for x, y, share in _weighted_pieces(tokens, targets, accumulations)
    ]

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        parts = []
        for x, y, share in pieces:
            losses = [loss * share for loss in vocabulary_cross_entropy(model(x), y)]
            torch.autograd.backward(losses)
            parts.append(losses[0].detach())  # it is the same on every device
        all_reduce_partial_gradients(model)
        optimizer.step()
        return parts

    return step


def _pieces(tokens: Tensor, targets: Tensor, count: int) -> Iterable[tuple[Tensor, Tensor]]:
    count = max(1, min(count, len(tokens)))
    return zip(tokens.tensor_split(count), targets.tensor_split(count), strict=True)


def _weighted_pieces(
    tokens: Tensor, targets: Tensor, count: int
) -> list[tuple[Tensor, Tensor, float]]:
    """Pieces, each with its share of what the mean counts; of nothing but padding, with none."""
    total = max(count_targets(targets), 1)
    return [(x, y, count_targets(y) / total) for x, y in _pieces(tokens, targets, count)]


def _shards(devices: Devices, tokens: Tensor, targets: Tensor, count: int) -> list[tuple]:
    """Pieces with some examples for each device, which are there already."""
    return [
        (split_batch(x, devices), split_batch(y, devices))
        for x, y in _pieces(tokens, targets, min(count, len(tokens) // len(devices)))
    ]


METHODS: dict[str, Method] = {
    "data": data_parallel_step,
    "ZeRO 1": partial(sharded_step, stage=1),
    "ZeRO 3": sharded_step,
    "pipeline": pipeline_step,
    "tensor": tensor_parallel_step,
    "context": context_parallel_step,
}
