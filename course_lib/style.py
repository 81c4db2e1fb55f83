"""One look for every figure of the course: colours, sizes and fonts. Importing it sets them.

The colours are those of Okabe and Ito, which people with any kind of colour blindness tell apart.
Figures have a white ground of their own, so that they read the same in a light and a dark theme.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#8A8A8A", "#EDEDED"
CYCLE = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY]

RC = {
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


plt.rcParams.update(RC)


def figure(columns: int = 1, width: float = 9.0, height: float = 3.2) -> tuple[Figure, Axes]:
    """A figure in the course's style: ``(figure, axes)``, as ``plt.subplots`` returns them.

    Args:
        width, height: of the whole figure, in inches.
    """
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")
