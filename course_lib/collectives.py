"""Collectives: operations in which every GPU takes part.

They take the tensors of all GPUs at once, one a device, of one shape and dtype, and change them in
place. Tensors that share a device are taken as well: what moves between them crosses no link.
PyTorch's own are in ``torch.distributed``; lesson 02 derives the first one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


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


def matching(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors as a list, or a clear error if a collective cannot work on them."""
    if isinstance(tensors, Tensor):  # which would be taken for its rows
        raise TypeError("a collective takes a list with one tensor a device, not a single tensor")
    tensors = list(tensors)
    if not tensors:
        raise ValueError("a collective needs at least one tensor")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a collective takes tensors, and one of these is {tensor!r:.60}")
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise ValueError("a collective needs different tensors, and one of these is there twice")
    for what, values in (
        ("shape", [tuple(tensor.shape) for tensor in tensors]),
        ("dtype", [tensor.dtype for tensor in tensors]),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"a collective needs tensors of one {what}, these differ: {values}")
    return tensors


def all_reduce_bytes(device_count: int, nbytes: int) -> int:
    """Bytes that :func:`all_reduce` moves in all, for tensors of ``nbytes``: 2 (N - 1) S."""
    return 2 * (device_count - 1) * nbytes
