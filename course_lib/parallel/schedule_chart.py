"""A schedule on paper: when each step runs, how much of the time is idle, and its picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from course_lib.parallel.schedule_rules import Schedule, Step, in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def step_times(
    schedule: Schedule,
    forward: float = 1,
    input_gradient: float = 1,
    weight_gradient: float = 1,
    transfer: float = 0,
) -> dict[Step, tuple[float, float]]:
    """When each step begins and ends, if it begins as soon as it can.

    Times are in any one unit: seconds, or as the defaults have it, the time of a forward.

    Args:
        forward, input_gradient, weight_gradient: the time that each takes a stage. A backward
            that is not split takes the last two together.
        transfer: the time until the result of a step is on another device.

    Returns:
        For each step ``(begin, end)``, in the same unit, from 0 on.

    Raises:
        ValueError: a time is negative.
    """
    if min(forward, input_gradient, weight_gradient, transfer) < 0:
        raise ValueError("a step takes no less than no time: one of these is negative")
    durations = {"F": forward, "B": input_gradient, "W": weight_gradient}
    if not schedule.splits_backward:
        durations["B"] += weight_gradient
    free_at = [0.0] * len(schedule.steps)
    times: dict[Step, tuple[float, float]] = {}
    for device, step in in_order(schedule):
        begin = free_at[device]
        for need in schedule.needs(step):
            is_far = schedule.placement[need.stage] != device
            begin = max(begin, times[need][1] + (transfer if is_far else 0))
        free_at[device] = begin + durations[step.kind]
        times[step] = begin, free_at[device]
    return times


def bubble(schedule: Schedule, **durations: float) -> float:
    """The part of the devices' time in which they are idle; takes what :func:`step_times` does."""
    times = step_times(schedule, **durations).values()
    busy = sum(end - begin for begin, end in times)
    return 1 - busy / (max(end for _, end in times) * len(schedule.steps))


def draw(schedule: Schedule, ax: Axes | None = None, **durations: float) -> Axes:
    """Draw a schedule: a row a GPU, a box a step, and in it the number of the microbatch.

    Takes what :func:`step_times` does. The further down the model a GPU's stage is, the paler. A
    kind of step whose boxes are too narrow for the longest number has none.
    """
    from matplotlib.patches import Patch  # here, so that running a schedule loads no matplotlib

    from course_lib import style

    looks = {
        "F": ("forward", style.BLUE, "white"),
        "B": ("backward", style.GREEN, style.INK),
        "W": ("weight gradient", style.ORANGE, style.INK),
    }
    times = step_times(schedule, **durations)
    rows, whole = len(schedule.steps), max(end for _, end in times.values())
    ax = ax or style.figure(height=1.6 + 0.4 * rows)[1]
    digits = len(str(schedule.microbatches - 1))
    for step, (begin, end) in times.items():
        device = schedule.placement[step.stage]
        earlier_stages = schedule.placement[: step.stage].count(device)
        _, colour, ink = looks[step.kind]
        width = (end - begin) / whole
        ax.broken_barh(
            [(begin, end - begin)],
            (device - 0.4, 0.8),
            facecolor=(colour, 1 / (1 + earlier_stages)),
            edgecolor="white",
            linewidth=_frame(width),
        )
        if width > 0.0085 * digits:
            middle, ink = (begin + end) / 2, style.INK if earlier_stages else ink
            number = str(step.microbatch)
            ax.annotate(number, (middle, device), ha="center", va="center", color=ink, fontsize=8)
    ax.set_yticks(range(rows), [f"GPU {device}" for device in range(rows)])
    ax.set_ylim(rows - 0.4, -0.6)
    ax.set_xlim(0, whole)
    ax.set_xlabel("time")
    ax.set_title(f"{schedule.name}: bubble {bubble(schedule, **durations):.1%}", loc="left")
    names = {kind: looks[kind][0] for kind in schedule.kinds}
    if schedule.splits_backward:
        names["B"] = "input gradient"
    handles = [Patch(label=name, color=looks[kind][1]) for kind, name in names.items()]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    return ax


def _frame(width: float) -> float:
    """The line around a box that takes ``width`` of the whole; a frame would hide a narrow box."""
    if width > 0.01:
        return 1.0
    return 0.4 if width > 0.004 else 0.0
