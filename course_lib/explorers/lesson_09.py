"""The explorer of lesson 09."""

from __future__ import annotations

from matplotlib.figure import Figure

from course_lib import CLASSROOM, style
from course_lib.explorers.explorer import Explorer, choice
from course_lib.models import GPT
from course_lib.parallel import comparison


def explore_methods() -> Explorer:
    """Lesson 09: which methods fit, and which is the fastest."""

    def draw(width: int, batch: int, count: int, memory: int, link: float) -> Figure:
        spec = CLASSROOM.with_(
            launch_overhead=0.0,
            memory=memory * 1e6,
            link_bandwidth=CLASSROOM.link_bandwidth * link,
        )
        gpt = GPT(65, context=64, width=width, heads=8, depth=4, tied=False)
        measured = comparison.compare(gpt, batch, 64, count, spec, list(comparison.METHODS))
        milliseconds = [m.seconds * 1e3 if m else 0.0 for m in measured.values()]
        figure, ax = style.figure(height=3.0)
        ax.barh(list(measured), milliseconds, color=style.BLUE)
        for place, m in enumerate(measured.values()):
            words = f"{m.seconds * 1e3:.0f} ms, {m.peak / 1e6:.0f} MB" if m else "does not fit"
            ax.text(milliseconds[place], place, f"  {words}", va="center")
        ax.set(xlabel="milliseconds a step", xlim=(0, 1.35 * max(*milliseconds, 1.0)))
        fitting = {name: m.seconds for name, m in measured.items() if m}
        fastest = min(fitting, key=fitting.__getitem__) if fitting else "none fits"
        ax.set_title(f"{count} GPUs of {memory} MB: fastest is {fastest} (simulated)")
        ax.invert_yaxis()
        return figure

    return Explorer(
        draw,
        width=choice("width of the GPT", [64, 128, 256], 128),
        batch=choice("batch size", [8, 16, 32], 16),
        count=choice("GPUs", [2, 4], 4),
        memory=choice("MB of a GPU", [15, 30, 60, 200], 200),
        link=choice("link speed, times this GPU's", [0.1, 1, 10], 1),
    )
