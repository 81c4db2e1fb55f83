"""The explorer of lesson 10."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

from course_lib import ranks, style, timeline
from course_lib.explorers.explorer import Explorer, choice
from course_lib.hardware import fresh_devices
from course_lib.ranks.by_hand.messages import exchange


def explore_circle() -> Explorer:
    """Lesson 10: each rank passes a message on, in three orders; one of them is a deadlock."""

    def draw(way: str, count: int, kilobytes: int) -> Figure:
        try:
            trace = pass_on(WAYS[way], count, kilobytes)
        except ranks.DeadlockError as error:
            figure, ax = style.figure(height=1.0 + 0.25 * count)
            ax.set_axis_off()
            ax.set_title(f"{way}: a deadlock")
            waits = [line.strip() for line in str(error).splitlines() if " waits " in line]
            ax.text(0, 0.98, "\n".join(waits), va="top", fontsize=11)
        else:
            figure, ax = style.figure(height=2.0 + 0.45 * count)
            what = f"{way}, {kilobytes} kB on {count} ranks"
            trace.plot_links(ax, title=f"{what}: {trace.seconds * 1e3:.3g} ms")
        return figure

    return Explorer(
        draw,
        way=choice("each rank", list(WAYS), "even ranks send first"),
        count=choice("ranks", [2, 3, 4, 5, 6, 7, 8], 7),
        kilobytes=choice("kilobytes", [1, 10, 100, 1000], 1000),
    )


def pass_on(
    way: Callable[[Tensor, int, Tensor, int], None], count: int, kilobytes: int
) -> timeline.Trace:
    """Record how ``count`` ranks in a circle each send a message to the next one.

    Raises:
        DeadlockError: every rank waits for another.
    """

    def once() -> None:
        dist.init_process_group()
        rank = dist.get_rank()
        x = torch.empty(250 * kilobytes, device="vgpu")
        way(x, (rank + 1) % count, torch.empty_like(x), (rank - 1) % count)

    with fresh_devices(count) as gpus, timeline.trace() as trace:
        ranks.run(once, gpus)
    return trace


def _send_first(out: Tensor, to: int, into: Tensor, source: int) -> None:
    dist.send(out, to)
    dist.recv(into, source)


def _by_order(out: Tensor, to: int, into: Tensor, source: int) -> None:
    if dist.get_rank() % 2 == 0:
        _send_first(out, to, into, source)
    else:
        dist.recv(into, source)
        dist.send(out, to)


WAYS: dict[str, Callable[[Tensor, int, Tensor, int], None]] = {
    "all send first": _send_first,
    "even ranks send first": _by_order,
    "both at once": exchange,
}
