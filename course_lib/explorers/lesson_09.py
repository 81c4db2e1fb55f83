"""The explorer of lesson 09."""

from __future__ import annotations

from functools import cache

from matplotlib.figure import Figure

from course_lib import CLASSROOM, style
from course_lib.explorers.explorer import Explorer, choice
from course_lib.models import GPT
from course_lib.parallel import comparison
from course_lib.parallel.comparison import Measurement
from course_lib.parallel.methods import METHODS

# As many tokens each time: sequences in a step, and tokens in each.
BATCHES = {"16 x 64": (16, 64), "4 x 256": (4, 256), "1 x 1,024": (1, 1024)}


class MethodsExplorer(Explorer):
    """An explorer that says what takes it some seconds."""

    working = f"Working: one training step by each of {len(METHODS)} methods. Some seconds ..."


def explore_methods() -> Explorer:
    """Lesson 09: which methods fit, and which is the fastest."""

    def draw(width: int, batch: str, count: int, memory: int, link: float) -> Figure:
        measured = _measured(width, batch, count, link)
        fits = {name: m.peak <= memory * 1e6 for name, m in measured.items()}
        milliseconds = [m.seconds * 1e3 if fits[name] else 0 for name, m in measured.items()]
        figure, ax = style.figure(height=3.2)
        ax.barh(list(measured), milliseconds, color=style.BLUE)
        for place, (name, m) in enumerate(measured.items()):
            needs = f"{m.peak / 1e6:.1f} MB"
            words = f"{m.seconds * 1e3:,.0f} ms, {needs}" if fits[name] else f"needs {needs}"
            ax.text(
                milliseconds[place],
                place,
                f"  {words}",
                va="center",
                color=style.INK if fits[name] else style.RED,
            )
        ax.set(xlabel="milliseconds a step (simulated)", xlim=(0, 1.45 * max(*milliseconds, 1)))
        fitting = [name for name in measured if fits[name]]
        verdict = "no method fits"
        if fitting:
            fastest = min(fitting, key=lambda name: measured[name].seconds)
            verdict = f"the fastest that fits is {fastest}"
        ax.set_title(f"{count} GPUs of {memory} MB, {batch} tokens: {verdict}")
        ax.invert_yaxis()
        return figure

    return MethodsExplorer(
        draw,
        width=choice("width of the GPT", [64, 128, 256], 64),
        batch=choice("sequences x tokens", list(BATCHES), "16 x 64"),
        count=choice("GPUs", [2, 4], 4),
        memory=choice("MB of a GPU", [2, 4, 7, 15, 30, 100], 30),
        link=choice("link speed, times this GPU's", [0.1, 1, 10], 1),
    )


@cache
def _measured(width: int, batch: str, count: int, link: float) -> dict[str, Measurement]:
    """One step by each method, with memory enough for all: which ones fit is seen afterwards."""
    spec = CLASSROOM.with_(
        launch_overhead=0.0, memory=1e9, link_bandwidth=CLASSROOM.link_bandwidth * link
    )
    sequences, length = BATCHES[batch]
    gpt = GPT(65, context=length, width=width, heads=8, depth=4, tied=False)
    # What is measured depends on no number, and the clock alone is twice as fast.
    measured = comparison.compare(gpt, sequences, length, count, spec, METHODS, backing="meta")
    return {name: m for name, m in measured.items() if m is not None}
