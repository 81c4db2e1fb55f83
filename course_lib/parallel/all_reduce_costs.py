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
    turns = ceil(size / (spec.network.cards or size))
    between = (nodes - 1) * (2 * turns * cross_seconds(spec, chunk) + add_seconds(spec, chunk))
    return inside + between


SECONDS: dict[AllReduce, Callable[[Spec, int, int, float], float]] = {
    ring_all_reduce: ring_seconds,
    tree_all_reduce: tree_seconds,
    hierarchical_all_reduce: hierarchical_seconds,
}


def fastest_all_reduce(spec: Spec, nodes: int, size: int, nbytes: float) -> AllReduce:
    """The one that takes the least time by its formula."""
    return min(SECONDS, key=lambda all_reduce: SECONDS[all_reduce](spec, nodes, size, nbytes))


def send_seconds(spec: Spec, nbytes: float) -> float:
    """Of a copy inside a node."""
    return spec.latency + nbytes / spec.link_bandwidth


def cross_seconds(spec: Spec, nbytes: float) -> float:
    """Of a copy through the network."""
    return spec.network.latency + nbytes / spec.network.bandwidth


def add_seconds(spec: Spec, nbytes: float) -> float:
    """In which a GPU adds a tensor to another: it reads two numbers and writes one."""
    return 3 * nbytes / spec.memory_bandwidth
