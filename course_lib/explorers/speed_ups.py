"""Stacked bars of the parts of a step, with a speed-up above each."""

from __future__ import annotations

from matplotlib.figure import Figure

from course_lib import style


def draw_speed_ups(
    what: str, counts: list[int], parts: dict[str, list[float]], title: str
) -> Figure:
    """Two parts of the milliseconds of a step, stacked, for several numbers of GPUs."""
    (name, lower), (other_name, upper) = parts.items()
    total = [a + b for a, b in zip(lower, upper, strict=True)]
    figure, ax = style.figure(height=3.0)
    places = range(len(counts))
    ax.bar(places, lower, color=style.BLUE, label=name)
    ax.bar(
        places, upper, bottom=lower, label=other_name,
        color=style.ORANGE, hatch="////", edgecolor="white", linewidth=0,
    )  # fmt: skip
    for place, milliseconds in zip(places, total, strict=True):
        ax.text(place, milliseconds, f"{total[0] / milliseconds:.2f}x", ha="center", va="bottom")
    ax.set_xticks(places, counts)
    ax.set(xlabel=what, ylabel="milliseconds a step", ylim=(0, 1.15 * max(total)), title=title)
    figure.legend(loc="outside lower right", ncols=2)
    return figure
