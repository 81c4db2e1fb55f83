"""One look for every figure of the course: colours, sizes and fonts.

Importing it changes nothing. A lesson calls :func:`use` once, for the figures that it draws itself.

The colours are those of Okabe and Ito, which people with any kind of colour blindness tell apart.
Figures have a white ground of their own, so that they read the same in a light and a dark theme.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#8A8A8A", "#EDEDED"
CYCLE = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY]

RC: dict[Any, Any] = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.prop_cycle": plt.cycler(color=CYCLE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "font.size": 11,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "svg.fonttype": "none",
    "svg.hashsalt": "course",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def use() -> None:
    """Give every figure of this program the look of the course.

    In a notebook it is sharp on fine screens as well, and has words for a screen reader.
    """
    plt.rcParams.update(RC)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")
        formatter = shell.display_formatter.formatters["image/png"]
        formatter.for_type(Figure, _described(formatter.for_type(Figure)))


def _described(draw: Callable[[Figure], Any]) -> Callable[[Figure], Any]:
    """What draws a figure, so that its words go with the picture."""

    def draw_and_describe(fig: Figure) -> tuple[Any, dict[str, Any]]:
        drawn = draw(fig)
        picture, metadata = drawn if isinstance(drawn, tuple) else (drawn, {})
        return picture, {**metadata, "alt": in_words(fig)}

    return draw_and_describe


def in_words(fig: Figure) -> str:
    """What a figure shows, for who cannot see it: titles, what is on its axes, what is drawn."""
    parts = []
    for ax in fig.axes:
        title = " ".join(filter(None, (ax.get_title(loc) for loc in ("left", "center", "right"))))
        handles, labels = ax.get_legend_handles_labels()
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        drawn = f"with {', '.join(labels)}" if handles else ""
        parts.append(", ".join(filter(None, (title, axes, drawn))))
    return "; ".join(filter(None, parts)) or "a figure without a title"


def look() -> AbstractContextManager[None]:
    """The look of the course for the figures that are drawn in a block, and for no others."""
    return plt.rc_context(RC)


def figure(columns: int = 1, width: float = 9.0, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure in the course's look: ``(figure, axes)``, as ``plt.subplots`` returns them.

    Args:
        columns: how many axes, side by side.
        width, height: of the whole figure, in inches.
    """
    with look():
        return plt.subplots(1, columns, figsize=(width, height), layout="constrained")
