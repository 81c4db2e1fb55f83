"""Regions of tensor parallelism, and the collectives at the borders between them.

Shoeybi and others, "Megatron-LM", 2019; the sequence regions are from Korthikanti and others,
"Reducing Activation Recomputation in Large Transformer Models", 2022.

A value is a list with one tensor a device. In a *split* region each device works on its own
neurons or heads. Between two such regions all have the same tensor (*replicated*), or, with
sequence parallelism, each its own part of the sequence. At every border stands a collective, in
one direction or in both; those of a pair are each other backwards:

    =================  ==============  ==============  ==========================
    border             forward         backward        what the papers call it
    =================  ==============  ==============  ==========================
    copy_to_ranks      nothing         all-reduce      f
    reduce_from_ranks  all-reduce      nothing         g; f-bar in the second one
    gather_sequence    all-gather      reduce-scatter  g in the second one
    scatter_sequence   reduce-scatter  all-gather      g-bar
    exchange           all-to-all      all-to-all
    =================  ==============  ==============  ==========================

A replicated value is one value in many places, and so is the loss: the backward pass starts in
all of them, with ``torch.autograd.backward(losses)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_lib.parallel.collectives import all_gather, reduce_scatter, ring_all_reduce
from course_lib.parallel.kinds import Tensors
from course_lib.parallel.node_collectives import all_to_all


class _Border(torch.autograd.Function):
    """One collective on the way there, another on the way back; called alike, with lists."""

    @staticmethod
    def forward(ctx: Any, there: Callable, back: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.there, ctx.back = there, back
        return tuple(there(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        missing = [gradient is None for gradient in gradients]
        if all(missing):
            return None, None, *gradients
        if any(missing):
            raise RuntimeError(
                "a device has no gradient to take part with: start the backward pass from the "
                "losses of all, torch.autograd.backward(losses)"
            )
        return None, None, *_Border.apply(ctx.back, ctx.there, *gradients)


def copy_to_ranks(tensors: Tensors) -> list[Tensor]:
    """From a replicated region into a split one: the gradients are summed on the way back."""
    return _cross(tensors, _same, _summed)


def reduce_from_ranks(tensors: Tensors) -> list[Tensor]:
    """From a split region into a replicated one: every device gets the sum."""
    return _cross(tensors, _summed, _same)


def gather_sequence(tensors: Tensors) -> list[Tensor]:
    """From parts of the sequence, [T/N, B, D], into a split region, [T, B, D].

    What the split region keeps for the backward pass is the whole. Korthikanti and others keep
    the part, and gather once more.
    """
    return _cross(tensors, _gathered, _scattered)


def scatter_sequence(tensors: Tensors) -> list[Tensor]:
    """From a split region, [T, B, D], to parts of the sequence, [T/N, B, D], of the sum."""
    return _cross(tensors, _scattered, _gathered)


def exchange(parts: Sequence[Tensors]) -> list[Tensor]:
    """From one way of splitting a value to another: what all ranks have for rank d, stacked on d.

    Args:
        parts: ``parts[r][d]`` is on the device of rank r, for rank d; all of one shape.

    Returns:
        For each rank a tensor whose first dimension is where the parts came from.
    """
    return [torch.stack(arrived) for arrived in exchange_uneven(parts)]


def exchange_uneven(parts: Sequence[Tensors]) -> list[list[Tensor]]:
    """The same for parts of different sizes, which may be empty: a list for each rank.

    Args:
        parts: ``parts[r][d]`` is on the device of rank r, for rank d.
    """
    count = len(parts)
    flat = _cross([part for row in parts for part in row], _exchanged, _exchanged)
    return [flat[rank * count : (rank + 1) * count] for rank in range(count)]


def _cross(tensors: Tensors, there: Callable, back: Callable) -> list[Tensor]:
    if isinstance(tensors, Tensor):  # which would be taken for its rows
        raise TypeError("a value here is a list with one tensor a device, not a single tensor")
    return list(_Border.apply(there, back, *tensors))


def _same(tensors: Tensors) -> list[Tensor]:
    return [tensor.view_as(tensor) for tensor in tensors]


def _summed(tensors: Tensors) -> list[Tensor]:
    sums = _contiguous_copies(tensors)
    ring_all_reduce(sums)
    return sums


def _gathered(tensors: Tensors) -> list[Tensor]:
    return all_gather([tensor.contiguous() for tensor in tensors])


def _scattered(tensors: Tensors) -> list[Tensor]:
    # Copied once more, since a part of a tensor keeps all of it in memory.
    return [part.clone() for part in reduce_scatter(_contiguous_copies(tensors))]


def _exchanged(tensors: Tensors) -> list[Tensor]:
    """``parts[r][d]``, row after row, to ``result[d][r]``."""
    count = math.isqrt(len(tensors))
    rows = [tensors[rank * count : (rank + 1) * count] for rank in range(count)]
    return _same([part for row in all_to_all(rows) for part in row])


def _contiguous_copies(tensors: Tensors) -> list[Tensor]:
    # The collectives write into what they are given, which autograd may need for something else.
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def enter(tensors: Tensors, sequence_parallel: bool) -> list[Tensor]:
    """Into a split region, from parts of the sequence or from a replicated region."""
    return gather_sequence(tensors) if sequence_parallel else copy_to_ranks(tensors)


def leave(tensors: Tensors, sequence_parallel: bool) -> list[Tensor]:
    """Out of a split region, to parts of the sequence or into a replicated region."""
    return scatter_sequence(tensors) if sequence_parallel else reduce_from_ranks(tensors)
