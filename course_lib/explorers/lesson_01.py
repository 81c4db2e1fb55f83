"""The explorer of lesson 01."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from course_lib import hardware, style, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.models import MLP


def explore_step() -> Explorer:
    """Lesson 01: the memory and the time of one training step of the MLP."""
    optimizers = {
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    }

    def draw(batch: int, width: int, optimizer: str) -> Figure:
        with hardware.fresh_devices(1) as (gpu,):
            holders, seconds = _measure_step(gpu, batch, width, optimizers[optimizer])
            capacity = hardware.memory_capacity(gpu)
        figure, (memory_ax, time_ax) = style.figure(columns=2, height=2.6)
        memory_ax.barh(
            list(holders), [nbytes / 1e6 for nbytes in holders.values()], color=style.CYCLE
        )
        used = sum(holders.values())
        memory_ax.set(xlabel="MB", title=f"{used / 1e6:.1f} of {capacity / 1e6:.0f} MB held")
        memory_ax.invert_yaxis()
        time_ax.barh(list(seconds), [s * 1e3 for s in seconds.values()], color=style.GREY)
        total = sum(seconds.values())
        time_ax.set(
            xlabel="milliseconds", title=f"{batch / total:,.0f} examples a second (simulated)"
        )
        time_ax.invert_yaxis()
        return figure

    return Explorer(
        draw,
        batch=choice("batch size", [1, 4, 16, 64, 256, 1024], 64),
        width=choice("width", [64, 128, 256, 512, 1024], 512),
        optimizer=choice("optimizer", list(optimizers), "AdamW"),
    )


def _measure_step(
    gpu: torch.device, batch: int, width: int, make_optimizer: Callable
) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of the four holders, and device seconds of the three phases."""
    model = MLP(64, width, width, 10).to(gpu)
    optimizer = make_optimizer(model.parameters())
    x = torch.randn(batch, 64, device=gpu)
    y = torch.zeros(batch, dtype=torch.int64, device=gpu)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    with timeline.trace() as t:
        start = hardware.memory_in_use(gpu)
        with timeline.region("forward"):
            loss = F.cross_entropy(model(x), y)
        activations = hardware.memory_in_use(gpu) - start
        with timeline.region("backward"):
            loss.backward()
        before_step = hardware.memory_in_use(gpu)
        with timeline.region("step"):
            optimizer.step()
        state = hardware.memory_in_use(gpu) - before_step
    holders = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer state": state,
        "activations": activations,
    }
    phases = ("forward", "backward", "step")
    return holders, {phase: sum(t.seconds_by_kind(phase).values()) for phase in phases}
