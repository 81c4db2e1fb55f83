"""The explorer of lesson 13."""

from __future__ import annotations

import math
from statistics import median

from matplotlib.figure import Figure

from course_lib import style
from course_lib.explorers.explorer import Explorer, choice
from course_lib.sweeps.tables import best_rates, read

BEST = "the best of each batch"


def explore_batches() -> Explorer:
    """Lesson 13: seconds to the same loss by batch size, for GPUs, a link and a learning rate."""
    sweep, costs = read("batches"), read("costs")
    batches = sorted({row["batch"] for row in sweep})
    rates = sorted({row["rate"] for row in sweep})
    links = list(dict.fromkeys(row["link"] for row in costs))
    best = best_rates(sweep, "batch")
    seconds_of = {
        (row["gpus"], row["link"], row["batch"]): row["seconds"]
        for row in costs
        if row["method"] == "float32"
    }

    def steps_at(batch: int, rate: float | str) -> float:
        if rate == BEST:
            return median(best[batch][1])
        return median(r["steps"] for r in sweep if (r["batch"], r["rate"]) == (batch, rate))

    def draw(count: int, link: str, rate: float | str) -> Figure:
        figure, ax = style.figure(height=3.4)
        whole = {}
        for place, batch in enumerate(batches):
            steps, step = steps_at(batch, rate), seconds_of[count, link, batch]
            words = f"{steps:.0f} x\n{step * 1e3:.2f} ms" if steps < math.inf else "never"
            whole[batch] = steps * step
            height = whole[batch] if steps < math.inf else 0
            ax.bar(place, height, color=style.BLUE)
            ax.text(place, height, words, ha="center", va="bottom", fontsize=10)
        reached = [batch for batch in batches if whole[batch] < math.inf]
        verdict = "none gets there"
        if reached:
            soonest = min(reached, key=lambda batch: whole[batch])
            verdict = f"the soonest is {soonest}, in {whole[soonest]:.3f} s"
        ax.set_xticks(range(len(batches)), batches)
        ax.set(xlabel="images in a batch", ylabel="seconds to the loss (simulated)")
        ax.set_ylim(0, 1.25 * max((whole[batch] for batch in reached), default=1))
        gpus = f"{count} GPU{'s' if count > 1 else ''}"
        ax.set_title(f"{gpus}, {link}, learning rate {rate}: {verdict}")
        return figure

    return Explorer(
        draw,
        count=choice("GPUs", sorted({row["gpus"] for row in costs}), 8),
        link=choice("joined by", links, links[0]),
        rate=choice("learning rate", [BEST, *rates], BEST),
    )
