"""Collectives: operations in which every GPU takes part.

They take a list with one tensor a device, all of one shape, and change the tensors in place.
PyTorch's own are in ``torch.distributed``; lesson 02 derives the first one.
"""

from __future__ import annotations

from torch import Tensor


def all_reduce(tensors: list[Tensor]) -> None:
    """Replace each tensor by the sum of all: gather to the first device, add, broadcast.

    With N tensors of S bytes the first device receives (N - 1) S bytes and sends as many. The sum
    is computed once and copied, so that all tensors end up bit-identical.
    ``torch.distributed.all_reduce`` does the same between processes.

    Args:
        tensors: one a device, all of the same shape and dtype.

    Raises:
        ValueError: there are none, or their shapes differ.
    """
    check_same_shape(tensors)
    total = tensors[0]
    for tensor in tensors[1:]:
        total.add_(tensor.to(total.device))
    broadcast(tensors)


def broadcast(tensors: list[Tensor]) -> None:
    """Replace each tensor by the first one; ``torch.distributed.broadcast`` between processes."""
    check_same_shape(tensors)
    for tensor in tensors[1:]:
        tensor.copy_(tensors[0])


def check_same_shape(tensors: list[Tensor]) -> None:
    """Raise a clear error unless all tensors have one shape."""
    if not tensors:
        raise ValueError("a collective needs at least one tensor")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"a collective needs tensors of one shape, and these differ: {shapes}")


def all_reduce_bytes(device_count: int, nbytes: int) -> int:
    """Bytes that :func:`all_reduce` moves in all, for tensors of ``nbytes``: 2 (N - 1) S."""
    return 2 * (device_count - 1) * nbytes
