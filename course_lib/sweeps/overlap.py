"""Lesson 13's runs with meetings that overlap: the same model, data and rates as the others.

A run ends when the loss of the model that the last outer step left is at most ``TARGET``. It is
looked at when an outer step has been made, ``DELAY`` steps after each meeting: that is when the
model is there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

from torch import nn
from torch.nn import functional as F

from course_lib import hardware, timeline
from course_lib.data import digits
from course_lib.parallel.data_parallel import replicate
from course_lib.parallel.kinds import Devices
from course_lib.parallel.local_training import average, diloco
from course_lib.parallel.overlapped_training import OverlappedTraining
from course_lib.sweeps import training
from course_lib.sweeps.training import PERIOD, TARGET

DELAY = 4  # half of the period: over Ethernet long enough for all of a meeting's bytes

# What the methods of lesson 13 that meet are made of: their inner and outer optimizers.
MEETING: dict[str, tuple[Callable, Callable]] = {
    "local SGD": (training.sgd, average),
    "DiLoCo": (training.adam, diloco),
}


def overlapped(method: str, replicas: Sequence[nn.Module], rate: float) -> OverlappedTraining:
    """What begins a run of ``method`` with its outer steps late."""
    make_inner, make_outer = MEETING[method]
    return OverlappedTraining(replicas, make_inner(rate), PERIOD, DELAY, make_outer)


def overlapped_losses(
    method: str, gpus: Devices, rate: float, seed: int, batch: int = 64, most: int = 240
) -> list[float]:
    """The held-out loss after every outer step; the last is at most the target, or given up."""
    data, losses = digits(), []
    x_test, y_test = data.x_test.to(gpus[0]), data.y_test.to(gpus[0])
    run = overlapped(method, replicate(training.convolutional(seed), gpus), rate)
    met = copy.deepcopy(run.replicas[0])
    for step in range(most + DELAY):
        run.step(*training.shards(step, batch, seed, gpus), F.cross_entropy)
        if step >= PERIOD and (step + 1) % PERIOD == DELAY:
            nn.utils.vector_to_parameters(run.anchors[0].clone(), met.parameters())
            losses.append(training.held_out_loss(met, x_test, y_test))
            hopeless = not losses[-1] < (2.0 if step >= training.GIVE_UP else math.inf)
            if losses[-1] <= TARGET or hopeless:
                break
    return losses


def overlapped_steps(method: str, gpus: Devices, rate: float, seed: int) -> float:
    """Steps until the loss is at most the target; infinite where it is not reached."""
    losses = overlapped_losses(method, gpus, rate, seed)
    return PERIOD * len(losses) + DELAY if losses[-1] <= TARGET else math.inf


def overlapped_cost(method: str, count: int, link: str, batch: int = 64) -> tuple[float, float]:
    """Simulated seconds of a step, and bytes that each GPU sends in it: means over a period."""
    network = training.LINKS[link]
    spec = training.SPEC if network is None else training.SPEC.with_(network=network)
    with hardware.fresh_devices(count, spec, nodes=1 if network is None else count) as gpus:
        run = overlapped(method, replicate(training.convolutional(0), gpus), 0.001)
        xs, ys = training.shards(0, batch, 0, gpus)
        for _ in range(PERIOD + DELAY):  # to the first outer step, which makes the state
            run.step(xs, ys, F.cross_entropy)
        hardware.synchronize()
        with timeline.trace() as t:
            for _ in range(PERIOD):
                run.step(xs, ys, F.cross_entropy)
        return t.seconds / PERIOD, max(t.bytes_sent(gpu) for gpu in gpus) / PERIOD
