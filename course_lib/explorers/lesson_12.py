"""The explorer of lesson 12."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from course_lib import A100, Network, style
from course_lib.explorers.explorer import Explorer, choice
from course_lib.parallel.all_reduce_costs import (
    hierarchical_seconds,
    ring_seconds,
    tree_seconds,
)
from course_lib.parallel.double_tree_costs import double_tree_seconds

FORMULAS = {
    "ring": ring_seconds,
    "tree": tree_seconds,
    "levels": hierarchical_seconds,
    "two trees": double_tree_seconds,
}
DASHES = "-", "--", "-.", ":"


def explore_nodes() -> Explorer:
    """Lesson 12: seconds of each all-reduce, by size, on A100 in nodes, and which is the best."""
    sizes = np.logspace(2, 10, 81)  # bytes: 100 B to 10 GB

    def draw(nodes: int, size: int, gigabytes: float) -> Figure:
        network = Network("a card of this speed", gigabytes * 1e9, "the slider")
        spec = A100.with_(network=network)
        figure, ax = style.figure()
        seconds = {
            name: [formula(spec, nodes, size, nbytes) for nbytes in sizes]
            for name, formula in FORMULAS.items()
        }
        for (name, line), dashes in zip(seconds.items(), DASHES, strict=True):
            ax.loglog(sizes, [each * 1e3 for each in line], dashes, label=name)
        ax.set(xlabel="bytes of a tensor", ylabel="milliseconds")
        ax.set_title(
            f"{nodes} node{'s' if nodes > 1 else ''} of {size}, by formula: "
            f"{where_best(seconds, sizes)}"
        )
        ax.legend(loc="upper left")
        return figure

    return Explorer(
        draw,
        nodes=choice("nodes", [1, 2, 4, 8, 16, 32, 64, 128], 2),
        size=choice("GPUs in each", [2, 4, 8], 8),
        gigabytes=choice("GB/s of a network card", [3, 12.5, 25, 50, 100, 300], 25),
    )


def where_best(seconds: dict[str, list[float]], sizes: np.ndarray) -> str:
    """Which is the fastest from which size on, in a few words."""
    best = [min(seconds, key=lambda name: seconds[name][i]) for i in range(len(sizes))]
    words = [best[0]]
    for before, after, nbytes in zip(best, best[1:], sizes[1:], strict=False):
        if after != before:
            words.append(f"{after} from {_bytes(nbytes)} on")
    return ", ".join(words)


def _bytes(nbytes: float) -> str:
    """Two digits and a unit: sizes stand a tenth of a decade apart."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{float(f'{nbytes / scale:.2g}'):g} {unit}"
    return f"{nbytes:.0f} B"
