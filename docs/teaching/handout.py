"""A sheet of all formulas, for the wall or for each learner: handout.svg and handout.pdf, an A4.

Its rows are those of docs/formulas.md, which a test compares with the code. Draw it anew when they
change::

    python docs/teaching/handout.py
"""

from __future__ import annotations

import sys
import textwrap
from hashlib import sha256
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "tools"))

import formulas  # noqa: E402
from course_lib import style  # noqa: E402

TITLE = "Multi-GPU training, by hand: the formulas"
SIZE = 210.0, 297.0  # an A4, in millimetres
LEFT, FORMULA, LESSON = 12.0, 112.0, 198.0  # where the columns begin, and where the last one ends
TOP = 13.0
LINE, PAD, GAP = 3.1, 1.7, 2.6  # of text; between two rows; before a part
FRACTION = 6.2  # what a row with a fraction takes at least
COLUMN, PAGE = 68, 138  # letters that fit
SMALL, NORMAL, LARGE, FORMULA_SIZE = 7.2, 7.6, 14, 9.8  # points
LOOK = {"svg.fonttype": "path", "pdf.fonttype": 42, "mathtext.fontset": "dejavusans"}
METADATA = {"Creator": None, "Title": TITLE}


def draw() -> Figure:
    figure = Figure(figsize=(SIZE[0] / 25.4, SIZE[1] / 25.4))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
    ax.set_axis_off()
    ax.text(LEFT, TOP, TITLE, fontsize=LARGE, weight="bold", va="center")
    y = _words(ax, TOP + 7, formulas.letters())
    for part in formulas.parts():
        y = _part(ax, y + GAP, part)
    if y > SIZE[1] - 6:
        raise ValueError(f"{y:.0f} mm of formulas do not fit on a page of {SIZE[1]:.0f}")
    return figure


def _part(ax: Axes, y: float, part: formulas.Part) -> float:
    """Draw a part below ``y``; returns where it ends."""
    ax.text(LEFT, y, part.title, fontsize=10, weight="bold", color=style.BLUE, va="center")
    y += 3.4
    if part.letters:
        y = _words(ax, y + 1, part.letters)
    for row in part.rows:
        ax.plot((LEFT, LESSON), (y, y), color=style.PALE, linewidth=0.8)
        what = textwrap.wrap(row.what, COLUMN)
        latex = formulas.as_latex(row.formula)
        height = max(len(what) * LINE + PAD, FRACTION if r"\frac" in latex else 0)
        middle = y + height / 2
        ax.text(LEFT, middle, "\n".join(what), fontsize=NORMAL, va="center", linespacing=1.25)
        ax.text(FORMULA, middle, f"${latex}$", fontsize=FORMULA_SIZE, va="center")
        ax.text(LESSON, middle, row.lesson, fontsize=NORMAL, color=style.GREY, va="center",
                ha="right")  # fmt: skip
        y += height
    return y


def _words(ax: Axes, y: float, markdown: str) -> float:
    """Draw a paragraph whose first line is at ``y``; returns where it ends."""
    lines = textwrap.wrap(markdown.replace("**", "").replace("\n", " "), PAGE)
    for place, line in enumerate(lines):
        ax.text(LEFT, y + place * LINE, line, fontsize=SMALL, va="center")
    return y + len(lines) * LINE


def source() -> str:
    """A hash of what the sheet says, which the drawn one carries."""
    return sha256(repr((formulas.letters(), formulas.parts())).encode()).hexdigest()


def main() -> None:
    matplotlib.use("agg")
    with style.look(), matplotlib.rc_context(LOOK):
        figure = draw()
        figure.savefig(HERE / "handout.svg", metadata=METADATA | {"Date": None, "Source": source()})
        figure.savefig(HERE / "handout.pdf", metadata=METADATA | {"CreationDate": None})


if __name__ == "__main__":
    main()
