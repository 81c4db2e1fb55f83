"""How long each all-reduce takes on a machine with nodes, by formula, and which is the fastest.

A round costs a latency and the time of the bytes that cross its slowest link; where something is
added, also the time in which a GPU reads two numbers and writes one. The host is left out, though
for small tensors its launches can take longer than anything here. NCCL's tuner chooses in the same
way, with constants measured on its machines (``ncclTopoTuneModel`` in its source).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil, log2

from torch import Tensor

from course_lib.hardware import Spec
from course_lib.parallel.collectives import ring_all_reduce, tree_all_reduce
from course_lib.parallel.double_tree import double_tree_all_reduce
from course_lib.parallel.double_tree_costs import double_tree_seconds
from course_lib.parallel.link_costs import add_seconds, cross_seconds, send_seconds, turns
from course_lib.parallel.node_collectives import hierarchical_all_reduce

AllReduce = Callable[[Iterable[Tensor]], None]


def ring_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`ring_all_reduce` over ``nodes`` of ``size`` GPUs, for tensors of ``nbytes``."""
    count = nodes * size
    chunk = nbytes / count
    send = (
        send_seconds(spec, chunk)
        if nodes == 1
        else max(send_seconds(spec, chunk), cross_seconds(spec, chunk))
    )
    return (count - 1) * (2 * send + add_seconds(spec, chunk))


def tree_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`tree_all_reduce`: whole tensors, in rounds at distances 1, 2, 4 and so on.

    With nodes of a size that is a power of two: rounds at shorter distances stay inside.
    """
    inside = ceil(log2(size))
    between = ceil(log2(nodes * size)) - inside
    moves = inside * send_seconds(spec, nbytes) + between * cross_seconds(spec, nbytes)
    return 2 * moves + (inside + between) * add_seconds(spec, nbytes)


def hierarchical_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`hierarchical_all_reduce`; GPUs that share a card take turns in every round."""
    shard = nbytes / size
    inside = (size - 1) * (2 * send_seconds(spec, shard) + add_seconds(spec, shard))
    chunk = shard / nodes
    crossing = 2 * turns(spec, size) * cross_seconds(spec, chunk)
    between = (nodes - 1) * (crossing + add_seconds(spec, chunk))
    return inside + between


SECONDS: dict[AllReduce, Callable[[Spec, int, int, float], float]] = {
    ring_all_reduce: ring_seconds,
    tree_all_reduce: tree_seconds,
    hierarchical_all_reduce: hierarchical_seconds,
    double_tree_all_reduce: double_tree_seconds,
}


def fastest_all_reduce(spec: Spec, nodes: int, size: int, nbytes: float) -> AllReduce:
    """The one that takes the least time by its formula."""
    return min(SECONDS, key=lambda all_reduce: SECONDS[all_reduce](spec, nodes, size, nbytes))
