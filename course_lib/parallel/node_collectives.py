"""Collectives for a machine with nodes: what is slow to send is sent as rarely as it can be.

A GPU reaches those of its own node over a fast link, and all others through a network card
(:mod:`course_lib.virtual.network`). A flat ring over k nodes has k links that are cards, and every
round of it is as slow as they are. Here whatever can be added or gathered inside a node is, and the
network carries what is left.

As in :mod:`course_lib.parallel.collectives`, all of them take the tensors of all GPUs at once; they
start when the current streams are ready, and what is enqueued there afterwards finds them done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from course_lib.hardware import current_stream, node_of
from course_lib.parallel.collectives import matching, require_contiguous, ring_all_reduce
from course_lib.parallel.ring import Ring
from course_lib.parallel.transfers import keep_for


def hierarchical_all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the sum of all: reduce-scatter inside each node, all-reduce between
    nodes, all-gather inside.

    With k nodes of g GPUs and tensors of S bytes, a GPU sends 2 (g - 1) / g S over its own link and
    2 (k - 1) / k S / g through its card: a g-th of what a ring over the network alone would send.
    All tensors end up bit-identical. Horovod's ``HOROVOD_HIERARCHICAL_ALLREDUCE`` asks for it.

    Args:
        tensors: one a device, contiguous, of one shape and dtype. Nothing need divide them.

    Raises:
        TypeError: something among them is no tensor.
        ValueError: there are none, one stands there twice, one is not contiguous, their shapes or
            dtypes differ, or the nodes have different numbers of them.
    """
    tensors = matching(tensors)
    require_contiguous(tensors)
    nodes = _by_node(tensors)
    rings = [Ring([tensor.device for tensor in node]) for node in nodes]
    # chunks[node][place][number]: the GPU at `place` of its node owns the number of its place.
    chunks = [[tensor.view(-1).tensor_split(len(node)) for tensor in node] for node in nodes]
    for ring, node_chunks in zip(rings, chunks, strict=True):
        with ring.turning():
            ring.reduce_scatter(node_chunks)
    for place in range(len(nodes[0])):
        ring_all_reduce([node_chunks[place][place] for node_chunks in chunks])
    for ring, node_chunks in zip(rings, chunks, strict=True):
        with ring.turning():
            ring.all_gather(node_chunks)


def hierarchical_all_reduce_bytes(nodes: int, size: int, nbytes: int) -> dict[str, int]:
    """Bytes that :func:`hierarchical_all_reduce` moves over all links of a kind.

    Args:
        nodes: how many there are.
        size: GPUs in each.
        nbytes: bytes of one tensor.
    """
    return {
        "within a node": nodes * 2 * (size - 1) * nbytes,
        "network": 2 * (nodes - 1) * nbytes,
    }


def ring_all_reduce_bytes(nodes: int, size: int, nbytes: int) -> dict[str, int]:
    """The same for a flat ring over all GPUs in the order of their nodes."""
    total = 2 * (nodes * size - 1) * nbytes
    crossing = total * nodes // (nodes * size) if nodes > 1 else 0
    return {"within a node": total - crossing, "network": crossing}


def all_to_all(parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Every rank sends a part to every rank: what rank r has for rank d is ``result[d][r]``.

    In N - 1 rounds, in each of which every rank sends one part and receives one: first all inside
    their nodes, then all through their cards, so that nobody who is done early waits for a slower
    link. A rank's part for itself is not copied. ``torch.distributed.all_to_all`` does this between
    processes; NCCL puts its sends into such an order (``ncclP2pSchedule`` in its source).

    Args:
        parts: ``parts[r][d]`` is on the device of rank r; shapes may differ, and be empty.

    Raises:
        ValueError: a rank has not one part for each.
    """
    count = _require_square(parts)
    devices = [row[0].device for row in parts]
    result: list[list[Tensor]] = [[row[rank] for row in parts] for rank in range(count)]
    ring = Ring(devices)
    with ring.turning():
        for round_ in all_to_all_rounds(devices):
            for rank, to in round_:
                with ring.between(rank, to):
                    result[to][rank] = parts[rank][to].to(devices[to])
    for tensors, device in zip(result, devices, strict=True):
        for tensor in tensors:
            keep_for(current_stream(device), tensor)
    return result


def all_to_all_rounds(devices: Sequence[torch.device]) -> Iterator[list[tuple[int, int]]]:
    """Who sends to whom, round by round: in each all go as many nodes on, and as many places.

    Where nodes have different numbers of ranks, all count as one. Nobody sends to itself.

    Args:
        devices: one a rank.
    """
    node_of_rank = [node_of(device) for device in devices]
    nodes = [[rank for rank, of in enumerate(node_of_rank) if of == node]
             for node in sorted(set(node_of_rank))]  # fmt: skip
    if len({len(node) for node in nodes}) > 1:
        nodes = [list(range(len(devices)))]
    size = len(nodes[0])
    for far in range(len(nodes)):
        for along in range(size):
            if far or along:
                yield [(rank, nodes[(number + far) % len(nodes)][(place + along) % size])
                       for number, node in enumerate(nodes)
                       for place, rank in enumerate(node)]  # fmt: skip


def hierarchical_all_to_all(parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What :func:`all_to_all` does, with fewer and larger messages over the network.

    Inside a node, the GPU at place p collects what the node has for the GPUs at place p of all
    nodes; then it exchanges that with those GPUs, one message a node. With k nodes of g GPUs a GPU
    sends k - 1 messages through its card in place of (k - 1) g; the bytes there are the same, and
    those inside the node are up to k times as many.

    Takes and raises what :func:`all_to_all` does.

    Raises:
        ValueError: also if the parts are not all of one dtype, or the nodes not of one size.
    """
    count = _require_square(parts)
    if len(dtypes := {part.dtype for row in parts for part in row}) > 1:
        raise ValueError(
            f"parts that travel together need one dtype, not {sorted(map(str, dtypes))}"
        )
    nodes = _by_node([row[0] for row in parts], list(range(count)))
    size, result = len(nodes[0]), [[row[rank] for row in parts] for rank in range(count)]
    # collected[p of a node]: for each node m, what all of p's node have for place p of node m.
    collected: dict[int, list[Tensor]] = {}
    for node in nodes:
        bundles = [
            [_joined([parts[rank][other[place]] for other in nodes]) for place in range(size)]
            for rank in node
        ]
        for place, arrived in enumerate(all_to_all(bundles)):
            pieces = [
                _apart(bundle, [parts[rank][other[place]] for other in nodes])
                for bundle, rank in zip(arrived, node, strict=True)
            ]
            collected[node[place]] = [_joined(list(column)) for column in zip(*pieces, strict=True)]
    for place in range(size):
        peers = [node[place] for node in nodes]
        for to, arrived in zip(peers, all_to_all([collected[rank] for rank in peers]), strict=True):
            for bundle, node in zip(arrived, nodes, strict=True):
                like = [parts[rank][to] for rank in node]
                for rank, piece in zip(node, _apart(bundle, like), strict=True):
                    result[to][rank] = piece
    return result


def _by_node(tensors: Sequence[Tensor], values: Sequence | None = None) -> list[list]:
    """The tensors of each node (or the values that belong to them), in the order of ranks."""
    nodes: dict[int, list] = {}
    for tensor, value in zip(tensors, tensors if values is None else values, strict=True):
        nodes.setdefault(node_of(tensor.device), []).append(value)
    sizes = {node: len(members) for node, members in nodes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"every node needs as many tensors as the others; they have {sizes}")
    return list(nodes.values())


def _require_square(parts: Sequence[Sequence[Tensor]]) -> int:
    for rank, row in enumerate(parts):
        if len(row) != len(parts):
            raise ValueError(
                f"each of the {len(parts)} ranks has one part for every rank, and rank {rank} has "
                f"{len(row)}"
            )
    return len(parts)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors in one row."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _apart(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the shapes of ``like``, out of what :func:`_joined` made of such."""
    pieces = row.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
