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
            enough = [n for n, gigabytes in zip(counts, held, strict=True) if gigabytes <= memory]
            fits = f"fits from {enough[0]} on" if enough else "never fits"
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
