"""One look for every figure of the course: colours, sizes and fonts.

Importing it changes nothing. A lesson calls :func:`use` once, for the figures that it draws itself.

The colours are those of Okabe and Ito, which people with any kind of colour blindness tell apart.
Figures have a white ground of their own, so that they read the same in a light and a dark theme.
"""

from __future__ import annotations

import sys
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
    """Give every figure of this program the look of the course, sharp on fine screens as well."""
    plt.rcParams.update(RC)
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


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
