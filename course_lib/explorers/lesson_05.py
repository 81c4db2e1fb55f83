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
        is_halved = name == "interleaved"  # each stage is half as long, and holds half as much
        part, held_of = (0.5, " of half a stage") if is_halved else (1.0, "")
        figure, ax = style.figure(height=1.5 + 0.42 * count)
        draw_schedule(
            schedule, ax, forward=part, input_gradient=part, weight_gradient=part, transfer=transfer
        )
        most_held = max(held(schedule))
        ax.set_xlabel(f"time, in forwards; activations on a GPU: at most {most_held}{held_of}")
        return figure

    return Explorer(
        draw,
        name=choice("schedule", list(makers), "1F1B"),
        count=choice("GPUs", [2, 4, 8], 4),
        microbatches=choice("microbatches", [8, 16, 32], 8),
        transfer=choice("a transfer, in forwards", [0, 0.1, 0.25, 0.5], 0),
    )
