"""Collectives: operations in which every GPU takes part.

They take the tensors of all GPUs at once, one a device, of one shape and dtype. Tensors that share
a device are taken as well: what moves between them crosses no link. PyTorch's own are in
``torch.distributed``; lesson 02 derives the first one, lesson 03 the others.

All of them run on the current streams of the devices: they start when those are ready, and what is
enqueued there afterwards finds them done.

They add in the dtype of the tensors. In bfloat16 a ring of N rounds N - 1 times, and the error of
the sum grows with N; what must be summed more finely is cast to float32 before, at twice the
bytes (``reduce_dtype`` in PyTorch's FSDP and in :mod:`course_lib.parallel.sharded_data_parallel`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_lib.hardware import is_tensor
from course_lib.parallel.ring import Ring


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the sum of all: gather to the first device, add, broadcast.

    With N tensors of S bytes the first device receives (N - 1) S bytes and sends as many. The sum
    is computed once and copied, so that all tensors end up bit-identical.
    ``torch.distributed.all_reduce`` does the same between processes.

    Args:
        tensors: one a device, all of the same shape and dtype.

    Raises:
        TypeError: something among them is no tensor.
        ValueError: there are none, one stands there twice, or their shapes or dtypes differ.
    """
    tensors = matching(tensors)
    total = tensors[0]
    for tensor in tensors[1:]:
        total.add_(tensor.to(total.device))
    broadcast(tensors)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the first one; ``torch.distributed.broadcast`` between processes.

    Takes and raises what :func:`all_reduce` does.
    """
    source, *others = matching(tensors)
    for tensor in others:
        tensor.copy_(source)


def tree_all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the sum of all: add pairwise up a tree, then copy down again.

    With N tensors of S bytes it takes 2 log2(N) rounds (rounded up), in each of which whole
    tensors move, and no device takes part in more than one copy of a round. Takes and raises what
    :func:`all_reduce` does.
    """
    tensors = matching(tensors)
    rounds = tree_rounds(tensors)
    for pairs in rounds:
        for receiver, sender in pairs:
            receiver.add_(sender.to(receiver.device))
    for pairs in reversed(rounds):
        for sender, receiver in pairs:
            receiver.copy_(sender)


def tree_rounds(members: Sequence[Any]) -> list[list[tuple[Any, Any]]]:
    """Up a tree, round by round, pairs of which the second one sends to the first.

    Neighbours first, 0 and 1, 2 and 3; then 0 and 2; and so on. Down it goes the other way round.
    """
    distances = [2**level for level in range((len(members) - 1).bit_length())]
    return [
        list(zip(members[:: 2 * distance], members[distance :: 2 * distance], strict=False))
        for distance in distances
    ]


def ring_all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the sum of all, in a ring: a reduce-scatter, then an all-gather.

    With N tensors of S bytes every device sends and receives 2 (N - 1) / N times S bytes, which is
    the least there is (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters
    of workstations", 2009). Each chunk is summed on one device and copied, so that all tensors end
    up bit-identical. ``torch.distributed.all_reduce`` over NCCL uses rings and trees.

    Args:
        tensors: one a device, contiguous, all of the same shape and dtype. N need not divide them.

    Raises:
        TypeError: something among them is no tensor.
        ValueError: there are none, one stands there twice, one is not contiguous, or their shapes
            or dtypes differ.
    """
    tensors = matching(tensors)
    require_contiguous(tensors)
    chunks = [tensor.view(-1).tensor_split(len(tensors)) for tensor in tensors]
    ring = Ring([tensor.device for tensor in tensors])
    with ring.turning():
        ring.reduce_scatter(chunks)
        ring.all_gather(chunks)


def reduce_scatter(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The sum of all tensors, scattered: rank r gets chunk r of it, along dimension 0.

    Every device sends and receives (N - 1) / N times the bytes of a tensor. The tensors are used
    up: what is returned are parts of them, and their other chunks hold partial sums.
    ``torch.distributed.reduce_scatter_single`` does this between processes. Takes and raises what
    :func:`ring_all_reduce` does.
    """
    tensors = matching(tensors)
    _require_rows(tensors)
    require_contiguous(tensors)
    chunks = [tensor.tensor_split(len(tensors)) for tensor in tensors]
    ring = Ring([tensor.device for tensor in tensors])
    with ring.turning():
        ring.reduce_scatter(chunks)
    return [chunks[rank][rank] for rank in range(len(tensors))]


def all_gather(shards: Iterable[Tensor]) -> list[Tensor]:
    """All shards, one after the other along dimension 0, as a new tensor on every device.

    Every device sends and receives (N - 1) / N times the bytes of the whole.
    ``torch.distributed.all_gather_single`` does this between processes.

    No gradient finds its way back through it;
    :func:`course_lib.parallel.regions.gather_sequence` gathers with one.

    Args:
        shards: one a device, contiguous, of one dtype and of shapes that differ at most in
            dimension 0.

    Raises:
        RuntimeError: a shard is part of a graph of autograd.
        TypeError: something among them is no tensor.
        ValueError: there are none, one stands there twice, one is not contiguous, or their shapes
            or dtypes do not fit.
    """
    shards = matching(shards, first_dimension=False)
    _require_rows(shards)
    require_contiguous(shards)
    if torch.is_grad_enabled() and any(shard.requires_grad for shard in shards):
        raise RuntimeError(
            "all_gather brings no gradients back to its shards: use regions.gather_sequence, or "
            "detach them"
        )
    sizes = [len(shard) for shard in shards]
    shape = (sum(sizes), *shards[0].shape[1:])
    tensors = [shard.new_empty(shape) for shard in shards]
    chunks = [tensor.split(sizes) for tensor in tensors]
    for rank, shard in enumerate(shards):
        chunks[rank][rank].copy_(shard)
    ring = Ring([shard.device for shard in shards])
    with ring.turning():
        ring.all_gather(chunks)
    return tensors


def _require_rows(tensors: list[Tensor]) -> None:
    if any(tensor.dim() == 0 for tensor in tensors):
        raise ValueError(
            "what is gathered or scattered has rows, and a single number has none: give "
            "tensor.unsqueeze(0)"
        )


def matching(tensors: Iterable[Tensor], first_dimension: bool = True) -> list[Tensor]:
    """The tensors as a list, or a clear error if a collective cannot work on them.

    Args:
        first_dimension: whether they must agree in it too.
    """
    if isinstance(tensors, Tensor):  # which would be taken for its rows
        raise TypeError("a collective takes a list with one tensor a device, not a single tensor")
    tensors = list(tensors)
    if not tensors:
        raise ValueError("a collective needs at least one tensor")
    for tensor in tensors:
        if not is_tensor(tensor):
            raise TypeError(f"a collective takes tensors, and one of these is {tensor!r:.60}")
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise ValueError("a collective needs different tensors, and one of these is there twice")
    first = 0 if first_dimension else 1  # that must agree
    for what, values in (
        ("shape", [tuple(tensor.shape[first:]) for tensor in tensors]),
        ("dtype", [tensor.dtype for tensor in tensors]),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"a collective needs tensors of one {what}, these differ: {values}")
    return tensors


def require_contiguous(tensors: list[Tensor]) -> None:
    """Raise a clear error if one of the tensors cannot be cut into chunks in place."""
    for rank, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            raise ValueError(
                f"a ring needs contiguous tensors, and that of rank {rank} is not: "
                "call .contiguous() on it"
            )


def all_reduce_bytes(device_count: int, nbytes: int) -> int:
    """Bytes that any all-reduce here moves in all, for tensors of ``nbytes``: 2 (N - 1) S."""
    return 2 * (device_count - 1) * nbytes
