"""What the all-to-alls of :mod:`course_lib.parallel.node_collectives` move, and how long they take.

With ``nodes`` of ``size`` GPUs, of which each has a part of ``nbytes`` for every other one. GPUs
that share a card take turns.
"""

from __future__ import annotations

from course_lib.hardware import Spec
from course_lib.parallel.link_costs import cross_seconds, send_seconds, turns


def all_to_all_bytes(nodes: int, size: int, nbytes: int) -> dict[str, int]:
    """Bytes that :func:`all_to_all` moves over all links of a kind."""
    count = nodes * size
    return {
        "within a node": count * (size - 1) * nbytes,
        "network": count * (count - size) * nbytes,
    }


def hierarchical_all_to_all_bytes(nodes: int, size: int, nbytes: int) -> dict[str, int]:
    """The same of :func:`hierarchical_all_to_all`: inside, all that is for a place in any node."""
    direct = all_to_all_bytes(nodes, size, nbytes)
    return {**direct, "within a node": nodes * direct["within a node"]}


def all_to_all_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`all_to_all`: a GPU's sends, one after the other."""
    crossing = turns(spec, size) * (nodes - 1) * size * cross_seconds(spec, nbytes)
    return (size - 1) * send_seconds(spec, nbytes) + crossing


def hierarchical_all_to_all_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`hierarchical_all_to_all`: fewer and larger sends, and all is put together twice."""
    inside = (size - 1) * send_seconds(spec, nodes * nbytes)
    between = turns(spec, size) * (nodes - 1) * cross_seconds(spec, size * nbytes)
    joined = 2 * 2 * nodes * size * nbytes / spec.memory_bandwidth  # read and written
    return joined + inside + between
