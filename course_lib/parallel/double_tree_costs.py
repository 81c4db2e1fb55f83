"""What :mod:`course_lib.parallel.double_tree` moves over each kind of link, and its seconds."""

from __future__ import annotations

from collections import defaultdict

from course_lib.hardware import Spec
from course_lib.parallel.double_tree import PIECES, leaves_first, parents
from course_lib.parallel.link_costs import add_seconds, cross_seconds, send_seconds

# How much longer the busiest link takes than its copies alone: a copy needs a sender and a receiver
# at the same moment, and who comes first is not planned. Found by sweep, as the corrections in
# NCCL's tuner are (``treeCorrectionFactor`` in its source): 0.9 to 1.5 by shape.
UNPLANNED = 1.2


def double_tree_bytes(nodes: int, size: int, nbytes: int) -> dict[str, int]:
    """Bytes that :func:`double_tree_all_reduce` moves over all links of a kind.

    Half of a tensor goes up and down over each edge of either tree.

    Args:
        nodes: how many there are.
        size: GPUs in each.
        nbytes: bytes of one tensor, of an even number of elements.
    """
    edges = [edge for shift in (0, 1) for edge in parents(nodes * size, shift).items()]
    crossing = sum(rank // size != parent // size for rank, parent in edges)
    return {"within a node": (len(edges) - crossing) * nbytes, "network": crossing * nbytes}


def double_tree_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`double_tree_all_reduce`, to a fifth or so: it is the one without exact rounds.

    The first piece's way up and down the slower tree, and then for each further piece the time that
    the busiest end of a link, or card, needs for it.
    """
    count, piece = nodes * size, nbytes / 2 / PIECES
    cards = spec.network.cards or size
    busy: dict[tuple, float] = defaultdict(float)

    def copy(source: int, destination: int) -> float:
        """Seconds of a copy, noted for both of its ends."""
        ends: list[tuple] = [("sends", source), ("receives", destination)]
        seconds = send_seconds(spec, piece)
        if source // size != destination // size:
            seconds = cross_seconds(spec, piece)
            ends = [(what, rank // size, rank % size * cards // size) for what, rank in ends]
        for end in ends:
            busy[end] += seconds
        return seconds

    first = 0.0
    for shift in (0, 1):
        tree = parents(count, shift)
        *order, root = leaves_first(tree, count)
        summed = dict.fromkeys(range(count), 0.0)  # when a rank has the sum of those below it
        for rank in order:
            start = max(summed[tree[rank]], summed[rank])
            summed[tree[rank]] = start + copy(rank, tree[rank]) + add_seconds(spec, piece)
        told = {root: summed[root]}  # when a rank has the whole sum
        free: dict[int, float] = defaultdict(float)  # when it has sent what it had to
        for rank in reversed(order):
            parent = tree[rank]
            told[rank] = free[parent] = max(free[parent], told[parent]) + copy(parent, rank)
        first = max(first, *told.values())
    return first + (PIECES - 1) * UNPLANNED * max(busy.values(), default=0.0)
