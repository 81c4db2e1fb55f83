"""The explorer of lesson 08."""

from __future__ import annotations

from matplotlib.figure import Figure

from course_lib import style
from course_lib.explorers.explorer import Explorer, choice
from course_lib.parallel.unit_exchange import bytes_a_parameter


def explore_sharding() -> Explorer:
    """Lesson 08: bytes of parameters, gradients and optimizer state on each GPU, by stage."""
    counts = [1, 2, 4, 8, 16, 32, 64, 128]

    def draw(billions: float, memory: int) -> Figure:
        figure, ax = style.figure()
        for stage, marker in zip(range(4), "os^D", strict=True):
            held = [billions * bytes_a_parameter(stage, count) for count in counts]
            fits = where_it_fits(stage, billions, memory, counts)
            ax.loglog(counts, held, f"{marker}-", label=f"stage {stage}: {fits}")
        ax.axhline(memory, linestyle="--", color=style.GREY, label=f"{memory} GB")
        ax.set(xlabel="GPUs", ylabel="GB on each GPU")
        ax.set_xticks(counts, counts)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.set_title(f"{billions:g} billion parameters on GPUs of {memory} GB")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure

    return Explorer(
        draw,
        billions=choice("billion parameters", [1, 3, 7, 13, 30, 70, 175, 405], 7),
        memory=choice("GB of a GPU", [24, 40, 80, 141], 80),
    )


def where_it_fits(stage: int, billions: float, memory: float, counts: list[int]) -> str:
    """From how many of ``counts`` GPUs on a model fits, in a few words."""
    for count in counts:
        if billions * bytes_a_parameter(stage, count) <= memory:
            return f"fits from {count} on"
    # What each GPU holds however many there are.
    copied = billions * bytes_a_parameter(stage, 10**12)
    return "never fits" if copied > memory else f"fits on more than {counts[-1]}"
