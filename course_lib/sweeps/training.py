"""Lesson 13's training runs: the digits, a small convolutional model, and steps to a loss.

A run ends when the loss on the held-out images is at most :data:`TARGET`. What is stored, in the
tables beside this module, is the number of steps, and a few curves of the loss; ``python -m
course_lib.sweeps`` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import CLASSROOM, ETHERNET, Network, hardware, timeline
from course_lib.data import Digits, digits
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.compressed_sums import Bfloat16Sums, Int8Sums, SumRows, TopKSums
from course_lib.parallel.data_parallel import backward_on_shards, replicate
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.local_training import LocalTraining, diloco
from course_lib.parallel.sampling import batch_indices

TARGET = 0.3  # the held-out loss to reach
PERIOD = 8  # steps from meeting to meeting, for the methods that train locally
SGD_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
ADAM_RATES = (0.004, 0.008, 0.016, 0.032)

GIVE_UP = 120  # a run whose loss is still above 2 after so many steps learns nothing

# What joins the GPUs: the links of one node, or a network between nodes of one GPU each. A launch
# takes no time: one host would pay for those of all GPUs in turn.
SPEC = CLASSROOM.with_(launch_overhead=0.0)
LINKS: dict[str, Network | None] = {
    "NVLink": None,
    "InfiniBand": CLASSROOM.network,
    "Ethernet": ETHERNET / 1000,
}

# One step of training, of replicas on their shards.
TrainingStep = Callable[[Tensors, Tensors], None]
# What makes it, of the replicas and a learning rate.
BeginTraining = Callable[[Sequence[nn.Module], float], TrainingStep]


@cache
def _images() -> Digits:
    return digits()


def convolutional(seed: int) -> nn.Sequential:
    """A small convolutional model for the digits, of 6,138 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def steps_to_loss(batch: int, rate: float, seed: int, most: int = 600, every: int = 4) -> float:
    """Steps of SGD on one device until the held-out loss is at most :data:`TARGET`.

    Data parallelism takes as many: it is the same training.

    Args:
        most: give up after so many steps; the answer is then infinite.
        every: the loss is looked at after each of so many steps.
    """
    data, model = _images(), convolutional(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(most):
        chosen = batch_indices(step, batch, len(data.y_train), seed)
        optimizer.zero_grad()
        F.cross_entropy(model(data.x_train[chosen]), data.y_train[chosen]).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            loss = held_out_loss(model, data.x_test, data.y_test)
            if loss <= TARGET or not math.isfinite(loss):
                return step + 1 if loss <= TARGET else math.inf
    return math.inf


def held_out_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean loss on images that training does not see."""
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


class Forgetful:
    """Top-k without error feedback: what is not sent is lost. It is there to fail."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def __call__(self, rows: Tensors) -> None:
        TopKSums(self.fraction)(rows)


def summing_step(
    replicas: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], sums: SumRows
) -> TrainingStep:
    """A data-parallel step whose gradients are summed by ``sums``, all in one row."""

    def step(xs: Tensors, ys: Tensors) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward_on_shards(replicas, xs, ys, F.cross_entropy)
        rows = [
            torch.cat([p.grad.flatten() for p in replica.parameters() if p.grad is not None])
            for replica in replicas
        ]
        sums(rows)
        for replica, row in zip(replicas, rows, strict=True):
            parts = row.split([p.numel() for p in replica.parameters()])
            for parameter, part in zip(replica.parameters(), parts, strict=True):
                parameter.grad = part.view_as(parameter)
        for optimizer in optimizers:
            optimizer.step()

    return step


def sgd(rate: float) -> Callable:
    """Makes SGD of a rate."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def adam(rate: float) -> Callable:
    """Makes AdamW of a rate."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


def _sum_by(make_sums: Callable[[], SumRows], make_optimizer: Callable) -> BeginTraining:
    def begin(replicas: Sequence[nn.Module], rate: float) -> TrainingStep:
        make = make_optimizer(rate)
        optimizers = [make(replica.parameters()) for replica in replicas]
        return summing_step(replicas, optimizers, make_sums())

    return begin


def _meet(make_optimizer: Callable, **options: Callable) -> BeginTraining:
    def begin(replicas: Sequence[nn.Module], rate: float) -> TrainingStep:
        local = LocalTraining(replicas, make_optimizer(rate), PERIOD, **options)

        def step(xs: Tensors, ys: Tensors) -> None:
            local.step(xs, ys, F.cross_entropy)

        return step

    return begin


# For each method: the learning rates that it is tried with, and what begins a run of it.
_RATES = SGD_RATES[1:]  # 0.05 is slow with all of them
METHODS: dict[str, tuple[tuple[float, ...], BeginTraining]] = {
    "float32": (_RATES, _sum_by(lambda: ring_all_reduce, sgd)),
    "bfloat16": (_RATES, _sum_by(Bfloat16Sums, sgd)),
    "int8": (_RATES, _sum_by(Int8Sums, sgd)),
    "top 1 %": (_RATES, _sum_by(lambda: TopKSums(0.01), sgd)),
    "top 1 %, forgetful": (_RATES, _sum_by(lambda: Forgetful(0.01), sgd)),
    "local SGD": (_RATES, _meet(sgd)),
    "float32, AdamW": (ADAM_RATES, _sum_by(lambda: ring_all_reduce, adam)),
    "DiLoCo": (ADAM_RATES, _meet(adam, make_outer=diloco)),
}

MEETING = ("local SGD", "DiLoCo")  # they send nothing in most steps


def method_steps(method: str, gpus: Devices, rate: float, seed: int) -> float:
    """Steps of ``method`` on ``gpus`` until the held-out loss is at most :data:`TARGET`.

    Infinite where it is not reached.
    """
    losses = method_losses(method, gpus, rate, seed)
    return PERIOD * len(losses) if losses[-1] <= TARGET else math.inf


def method_losses(
    method: str, gpus: Devices, rate: float, seed: int, batch: int = 64, most: int = 240
) -> list[float]:
    """The held-out loss after every :data:`PERIOD` steps, when all replicas are equal.

    The last one is at most :data:`TARGET`, or the run was given up.

    Args:
        batch: images of all devices together.
        most: give up after so many steps, or where nothing is learnt.
    """
    data, losses = _images(), []
    x_test, y_test = data.x_test.to(gpus[0]), data.y_test.to(gpus[0])
    replicas = replicate(convolutional(seed), gpus)
    step_on = METHODS[method][1](replicas, rate)
    for step in range(most):
        step_on(*shards(step, batch, seed, gpus))
        if (step + 1) % PERIOD == 0:
            losses.append(held_out_loss(replicas[0], x_test, y_test))
            hopeless = not losses[-1] < (2.0 if step + 1 == GIVE_UP else math.inf)
            if losses[-1] <= TARGET or hopeless:
                break
    return losses


def shards(step: int, batch: int, seed: int, gpus: Devices) -> tuple[list[Tensor], list[Tensor]]:
    """The images and labels of one step, a part on each device."""
    data = _images()
    chosen = batch_indices(step, batch, len(data.y_train), seed)
    xs, ys = (
        [part.to(gpu) for part, gpu in zip(each[chosen].tensor_split(len(gpus)), gpus, strict=True)]
        for each in (data.x_train, data.y_train)
    )
    return xs, ys


def step_cost(method: str, count: int, link: str, batch: int = 64) -> tuple[float, float]:
    """Simulated seconds of a step of ``method``, and bytes that each GPU sends in it.

    Both are means over as many steps as there are from one meeting to the next.

    Args:
        count: GPUs.
        link: what joins them, one of :data:`LINKS`.
    """
    network = LINKS[link]
    nodes, spec = (1, SPEC) if network is None else (count, SPEC.with_(network=network))
    with hardware.fresh_devices(count, spec, nodes=nodes) as gpus:
        replicas = replicate(convolutional(0), gpus)
        step_on = METHODS[method][1](replicas, METHODS[method][0][0])
        xs, ys = shards(0, batch, 0, gpus)
        steps = PERIOD if method in MEETING else 1
        for _ in range(steps):  # the first steps make the optimizers' state
            step_on(xs, ys)
        hardware.synchronize()
        with timeline.trace() as t:
            for _ in range(steps):
                step_on(xs, ys)
        return t.seconds / steps, max(t.bytes_sent(gpu) for gpu in gpus) / steps
