"""The explorer of lesson 04."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from course_lib import CLASSROOM, hardware, style, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.models import MLP
from course_lib.parallel.layer_parallel import LayerParallel


def explore_stages() -> Explorer:
    """Lesson 04: forward and backward of an MLP in stages, and whether a training step fits."""

    def draw(stages: int, width: int, batch: int) -> Figure:
        with hardware.fresh_devices(stages, CLASSROOM.with_(memory=1e9)) as gpus:
            t, peak = _measure_stages(gpus, width, batch)
        idle = sum(t.idle_fraction(index) for index in range(stages)) / stages
        fits = "fits" if peak <= CLASSROOM.memory else "does not fit"
        figure, ax = style.figure(height=1.6 + 0.3 * stages)
        t.plot(
            ax,
            title=f"{t.seconds * 1e3:.0f} ms, each idle {idle:.0%}; with AdamW at most "
            f"{peak / 1e6:.1f} MB on one GPU, {fits} in 80",
        )
        return figure

    return Explorer(
        draw,
        stages=choice("GPUs", [1, 2, 4, 8], 4),
        width=choice("width", [128, 256, 512, 768, 1024], 768),
        batch=choice("batch size", [16, 64, 256, 1024], 64),
    )


def _measure_stages(gpus: list[torch.device], width: int, batch: int) -> tuple[timeline.Trace, int]:
    """Forward and backward of an MLP of eight equal layers, and peak bytes of a whole step."""
    cuts = [16 // len(gpus) * stage for stage in range(1, len(gpus))]  # a layer is two modules
    model = LayerParallel(MLP(*[width] * 9), gpus, cuts)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(batch, width, device=gpus[0])
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with timeline.trace() as t:
        model(x).sum().backward()
    optimizer.step()
    return t, max(hardware.peak_memory(gpu) for gpu in gpus)
