"""The explorer of lesson 02."""

from __future__ import annotations

from functools import cache

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from course_lib import CLASSROOM, hardware, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.explorers.speed_ups import draw_speed_ups
from course_lib.models import MLP
from course_lib.parallel import data_parallel


def explore_data_parallel() -> Explorer:
    """Lesson 02: computing and exchange in one step, for one to eight GPUs."""
    counts = [1, 2, 3, 4, 6, 8]

    def draw(batch: int, width: int, link: float) -> Figure:
        computing = [_seconds_computing(count, batch, width) * 1e3 for count in counts]
        exchange = [_seconds_of_exchange(count, width, link) * 1e3 for count in counts]
        total = [a + b for a, b in zip(computing, exchange, strict=True)]
        best = min(range(len(counts)), key=total.__getitem__)
        title = f"Fastest with {counts[best]} (simulated; speed-up above each bar)"
        return draw_speed_ups("GPUs", counts, {"computing": computing, "exchange": exchange}, title)

    return Explorer(
        draw,
        batch=choice("batch size", [64, 128, 256, 512, 1024, 2048], 1024),
        width=choice("width", [64, 128, 256, 512], 512),
        link=choice("link speed, times this GPU's", [0.1, 0.5, 1, 2, 10, 100], 1),
    )


# What is computed knows nothing of the links, and the exchange nothing of the batch: so each is
# measured once, for all positions of the other's slider.


@cache
def _seconds_computing(count: int, batch: int, width: int) -> float:
    with hardware.fresh_devices(count, CLASSROOM, backing="meta") as gpus:  # the clock alone
        replicas = data_parallel.replicate(MLP(64, width, width, 10), gpus)
        optimizers = [torch.optim.AdamW(r.parameters()) for r in replicas]
        xs = data_parallel.split_batch(torch.randn(batch, 64), gpus)
        ys = data_parallel.split_batch(torch.zeros(batch, dtype=torch.int64), gpus)
        # The first step, which makes the optimizers' state, is not measured.
        data_parallel.train_step(replicas, optimizers, xs, ys, F.cross_entropy)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with timeline.trace() as t:
            data_parallel.backward_on_shards(replicas, xs, ys, F.cross_entropy)
            for optimizer in optimizers:
                optimizer.step()
    return t.seconds


@cache
def _seconds_of_exchange(count: int, width: int, link: float) -> float:
    spec = CLASSROOM.with_(link_bandwidth=CLASSROOM.link_bandwidth * link)
    with hardware.fresh_devices(count, spec, backing="meta") as gpus:
        replicas = data_parallel.replicate(MLP(64, width, width, 10), gpus)
        for replica in replicas:
            for parameter in replica.parameters():
                parameter.grad = torch.empty_like(parameter)
        with timeline.trace() as t:
            data_parallel.all_reduce_gradients(replicas)
    return t.seconds
