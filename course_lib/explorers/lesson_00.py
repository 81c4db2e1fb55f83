"""The explorer of lesson 00."""

from __future__ import annotations

import ipywidgets
import torch
from matplotlib.figure import Figure

from course_lib import hardware, style, timeline
from course_lib.explorers.explorer import Explorer, choice


def explore_queues() -> Explorer:
    """Lesson 00: two GPUs multiply matrices, with or without a read in the loop."""

    def draw(side: int, products: int, read: bool) -> Figure:
        with hardware.fresh_devices(2) as gpus:
            matrices = [torch.ones(side, side, device=gpu) for gpu in gpus]
            with timeline.trace() as t:
                for matrix in matrices:
                    for _ in range(products):
                        matrix = matrix @ matrix / side
                    if read:
                        matrix.sum().item()
        figure, ax = style.figure(height=2.6)
        t.plot(ax, title=f"{t.seconds * 1e3:.2f} ms, vgpu:0 idle {t.idle_fraction(0):.0%}")
        return figure

    return Explorer(
        draw,
        side=choice("side of the matrices", [16, 32, 64, 128, 256, 512], 256),
        products=choice("products on each GPU", [1, 2, 4, 8], 4),
        read=ipywidgets.Checkbox(description="read a value in the loop", value=True),
    )
