"""Broadcast and reduce up and down a tree that crosses the network as rarely as can be.

One GPU of each node leads it. Between the leaders goes one tree, inside each node another: so the
tensor crosses to each node once, through the leader's card, and no other card carries anything.
``torch.distributed.broadcast`` and ``reduce`` do this between processes; MPI libraries call such
trees *topology-aware* (Karonis and others, "Exploiting hierarchy in parallel computer networks to
optimize collective operation performance", 2000).

A tree of rounds is the quickest way for few bytes. Large tensors travel faster in parts, which
follow each other down a ring or go through all cards of a node at once.

Unlike the collectives by levels, these take nodes of different sizes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from course_lib.hardware import Spec, node_of
from course_lib.parallel.collectives import matching, tree_rounds
from course_lib.parallel.link_costs import add_seconds, cross_seconds, send_seconds


def tree_broadcast(tensors: Iterable[Tensor], root: int = 0) -> None:
    """Replace each tensor by that of ``root``, first in one GPU of each node, then in the others.

    Args:
        tensors: one a device, of one shape and dtype.
        root: whose place among them it is.

    Raises:
        TypeError: something among them is no tensor.
        ValueError: there are none, one stands there twice, their shapes or dtypes differ, or
            ``root`` is none of them.
    """
    for group in _groups(matching(tensors), root):
        for pairs in reversed(tree_rounds(group)):
            for sender, receiver in pairs:
                receiver.copy_(sender)


def tree_reduce(tensors: Iterable[Tensor], root: int = 0) -> None:
    """Replace the tensor of ``root`` by the sum of all, which are added inside each node first.

    The other tensors are used up: they hold partial sums afterwards. Takes and raises what
    :func:`tree_broadcast` does.
    """
    leaders, *nodes = _groups(matching(tensors), root)
    for group in (*nodes, leaders):
        for pairs in tree_rounds(group):
            for receiver, sender in pairs:
                receiver.add_(sender.to(receiver.device))


def tree_bytes(nodes: int, size: int, nbytes: int) -> dict[str, int]:
    """Bytes that either moves over all links of a kind, for tensors of ``nbytes``."""
    return {"within a node": nodes * (size - 1) * nbytes, "network": (nodes - 1) * nbytes}


def tree_broadcast_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`tree_broadcast` over ``nodes`` of ``size`` GPUs: the root's sends, in a row."""
    between, inside = (nodes - 1).bit_length(), (size - 1).bit_length()
    return between * cross_seconds(spec, nbytes) + inside * send_seconds(spec, nbytes)


def tree_reduce_seconds(spec: Spec, nodes: int, size: int, nbytes: float) -> float:
    """Of :func:`tree_reduce`: the same rounds, and an addition in each."""
    rounds = (nodes - 1).bit_length() + (size - 1).bit_length()
    moves = tree_broadcast_seconds(spec, nodes, size, nbytes)
    return moves + rounds * add_seconds(spec, nbytes)


def _groups(tensors: list[Tensor], root: int) -> list[list[Tensor]]:
    """The leaders of the nodes, then the tensors of each node; leaders and root come first."""
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < len(tensors):
        raise ValueError(f"root is the place of one of the {len(tensors)} tensors, not {root!r}")
    nodes: dict[int, list[Tensor]] = {}
    for tensor in (tensors[root], *tensors[:root], *tensors[root + 1 :]):
        nodes.setdefault(node_of(tensor.device), []).append(tensor)
    return [[node[0] for node in nodes.values()], *nodes.values()]
