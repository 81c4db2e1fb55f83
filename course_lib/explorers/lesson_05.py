"""The explorer of lesson 05."""

from __future__ import annotations

from matplotlib.figure import Figure

from course_lib import style
from course_lib.explorers.explorer import Explorer, choice
from course_lib.parallel import schedules
from course_lib.parallel.schedule_chart import draw as draw_schedule
from course_lib.parallel.schedule_rules import held


def explore_schedules() -> Explorer:
    """Lesson 05: the drawing and the bubble of a schedule."""
    makers = {
        "naive": schedules.naive,
        "GPipe": schedules.gpipe,
        "1F1B": schedules.one_f_one_b,
        "interleaved": lambda p, m: schedules.interleaved(p, m, 2),
        "zero bubble": schedules.zero_bubble,
    }

    def draw(name: str, count: int, microbatches: int, transfer: float) -> Figure:
        schedule = makers[name](count, microbatches)
        part = 0.5 if "interleaved" in name else 1.0  # of a stage that is half as long
        figure, ax = style.figure(height=1.5 + 0.42 * count)
        draw_schedule(
            schedule, ax, forward=part, input_gradient=part, weight_gradient=part, transfer=transfer
        )
        most_held = max(held(schedule))
        ax.set_xlabel(f"time; a device holds at most {most_held} activations")
        return figure

    return Explorer(
        draw,
        name=choice("schedule", list(makers), "1F1B"),
        count=choice("GPUs", [2, 4, 8], 4),
        microbatches=choice("microbatches", [8, 16, 32], 8),
        transfer=choice("a transfer, in forwards", [0, 0.1, 0.25, 0.5], 0),
    )
