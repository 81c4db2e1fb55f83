"""The explorer of lesson 14."""

from __future__ import annotations

import textwrap
from functools import cache

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from course_lib import style
from course_lib.explorers.explorer import Explorer, choice
from course_lib.planner import MODELS, Plan, cluster, search
from course_lib.planner.planning import describe

TOKENS = 15.6e12  # to train on
STEP = 2**24  # tokens a step
COUNTS = [64, 256, 1024, 2048, 4096, 8192, 16384]


def explore_plans() -> Explorer:
    """Lesson 14: the best layout that the search finds: its seconds, its memory, its days."""

    def draw(model: str, gpus: int, network: int, length: int, tensor: int) -> Figure:
        try:
            found = _best(model, gpus, network, length, tensor)
        except ValueError as error:
            figure, ax = style.figure(height=1.2)
            ax.axis("off")
            ax.set_title(why(error))
            return figure
        figure, axes = style.figure(columns=2, height=3.4)
        _seconds(axes[0], found)
        _memory(axes[1], found)
        axes[0].set_title(
            f"{model} on {gpus:,} H100:\nMFU {found.mfu:.0%}, {found.days(TOKENS):,.0f} days"
        )
        axes[1].set_title(textwrap.fill(describe(found.layout), 42), fontsize=10)
        return figure

    return Explorer(
        draw,
        model=choice("model", ["llama3-8b", "llama3-70b", "llama3-405b"], "llama3-405b"),
        gpus=choice("GPUs", COUNTS, 16384),
        network=choice("network, Gb/s a GPU", [25, 50, 100, 200, 400, 800], 400),
        length=choice("tokens in a sequence", [2048, 8192, 32768, 131072], 8192),
        tensor=choice("tensor parallelism", [1, 2, 4, 8], 8),
    )


@cache
def _best(model: str, gpus: int, network: int, length: int, tensor: int) -> Plan:
    where = cluster("H100", gpus, network=network * 1e9 / 8)
    return search(MODELS[model], where, STEP // length, length, keep=1, tensor=tensor).best[0]


def why(error: ValueError) -> str:
    """What an error of the search says, a part a line; not what would help."""
    return str(error).split("; ")[0].replace(": ", ":\n")


def _seconds(ax: plt.Axes, found: Plan) -> None:
    time = found.time
    parts = {
        "products": time.products,
        "attention": time.attention,
        "all else on the GPU": time.others + time.host + time.optimizer,
        "exposed": time.exposed,
        "bubble": time.bubble,
    }
    ax.barh(list(parts), list(parts.values()), color=style.BLUE)
    for place, seconds in enumerate(parts.values()):
        ax.text(seconds, place, f"  {seconds / found.seconds:.0%}", va="center")
    ax.set(xlabel="seconds of a step (predicted)", xlim=(0, 1.2 * max(parts.values())))
    ax.invert_yaxis()


def _memory(ax: plt.Axes, found: Plan) -> None:
    names = ["parameters", "gradients", "optimizer", "activations", "buffers"]
    held = [getattr(found.memory, name) / 1e9 for name in names]
    ax.barh(names, held, color=style.ORANGE)
    for place, each in enumerate(held):
        ax.text(each, place, f"  {each:.1f}", va="center")
    ax.set(xlabel=f"GB of a GPU; together {found.memory.total / 1e9:.0f} of 80", xlim=(0, 80))
    ax.invert_yaxis()
