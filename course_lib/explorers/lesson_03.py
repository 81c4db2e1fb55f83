"""The explorer of lesson 03."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from course_lib import CLASSROOM, Spec, hardware, style, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.parallel import collectives


def explore_all_reduce() -> Explorer:
    """Lesson 03: the seconds of three ways to all-reduce."""
    ways = {
        "naive": collectives.all_reduce,
        "tree": collectives.tree_all_reduce,
        "ring": collectives.ring_all_reduce,
    }

    def draw(count: int, kilobytes: float, latency: float, link: float) -> Figure:
        spec = CLASSROOM.with_(
            launch_overhead=0.0,
            latency=latency * 1e-6,
            link_bandwidth=CLASSROOM.link_bandwidth * link,
        )
        numel = round(kilobytes * 1e3 / 4)
        milliseconds = [_measure_all_reduce(way, count, numel, spec) * 1e3 for way in ways.values()]
        fastest = list(ways)[milliseconds.index(min(milliseconds))]
        figure, ax = style.figure(height=2.4)
        ax.barh(list(ways), milliseconds, color=style.ORANGE, hatch="////", edgecolor="white")
        for place, taken in enumerate(milliseconds):
            digits = ",.0f" if taken >= 1000 else ".3g"
            ax.text(taken, place, f"  {taken:{digits}} ms", va="center")
        ax.set(xlabel="milliseconds", xlim=(0, 1.15 * max(milliseconds)))
        ax.set_title(f"{kilobytes:g} kB on {count} GPUs: fastest is {fastest} (simulated)")
        ax.invert_yaxis()
        return figure

    return Explorer(
        draw,
        count=choice("GPUs", [2, 3, 4, 8, 16], 8),
        kilobytes=choice("kilobytes", [0.04, 0.4, 4, 40, 400, 4000], 4),
        latency=choice("latency, microseconds", [1, 2.5, 5, 10, 25, 100], 2.5),
        link=choice("link speed, times this GPU's", [0.1, 0.5, 1, 2, 10, 100], 1),
    )


def _measure_all_reduce(way: Callable, count: int, numel: int, spec: Spec) -> float:
    with hardware.fresh_devices(count, spec, backing="meta") as gpus:
        tensors = [torch.empty(numel, device=gpu) for gpu in gpus]
        with timeline.trace() as t:
            way(tensors)
    return t.seconds
