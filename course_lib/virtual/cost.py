"""What an operation costs: its floating-point operations and the bytes that it touches.

Only matrix products, convolutions and attention are counted as FLOPs, by the formulas of
``torch.utils.flop_counter``. Everything else (additions, normalisations, copies) is bounded by
the bytes that it reads and writes, on every GPU of the last decade.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


Formula = Callable[[list, dict, Any], float]


def flops_formula(func: torch._ops.OpOverload) -> Formula | None:
    """How to count the floating-point operations of ``func``; ``None`` if it is no product.

    The formula takes the operator's arguments, its keyword arguments and what it returned.
    """
    if func in _FORMULAS:
        return _FORMULAS[func]
    registered = flop_registry.get(func._overloadpacket)
    if registered is None:
        return None
    return lambda args, kwargs, out: float(registered(*args, **kwargs, out_val=out))


def _product(args: list, kwargs: dict, out: torch.Tensor) -> float:
    # For mm and bmm: each of the output's numbers is a sum of k products.
    return 2.0 * out.numel() * args[0].shape[-1]


def _add_product(args: list, kwargs: dict, out: torch.Tensor) -> float:
    return 2.0 * out.numel() * args[1].shape[-1]


def _attention(args: list, kwargs: dict, out: Any) -> float:
    query, key, value = args[:3]
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(args: list, kwargs: dict, out: Any) -> float:
    grad_out, query, key, value = args[:4]
    return float(sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape))


# The four that training meets all the time, without the registry's conversions, and the
# attention of the CPU, which the registry does not know.
_FORMULAS = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _add_product,
    aten.baddbmm.default: _add_product,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}


def reads_nothing(func: torch._ops.OpOverload) -> bool:
    """Whether ``func`` looks at the form of its tensors alone, and not at their numbers."""
    return func._overloadpacket in _READS_NOTHING


def bytes_formula(func: torch._ops.OpOverload) -> Callable[[list, list], int]:
    """How many bytes a call of ``func`` reads from and writes to the device's memory.

    The formula takes the virtual tensors among the operator's arguments, and those that it wrote.
    """
    packet = func._overloadpacket
    if reads_nothing(func):
        return lambda inputs, written: _read_and_written([], written)
    if packet in _GATHERS:  # reads the rows that are picked, and the indices that pick them
        return lambda inputs, written: _read_and_written(inputs[1:], [*written, *written])
    if packet in _OVERWRITES:  # what comes first, and is not read
        return lambda inputs, written: _read_and_written(inputs[len(written) :], written)
    outputs = sum(argument.is_out for argument in func._schema.arguments)
    if outputs:  # come last, and are not read either
        return lambda inputs, written: _read_and_written(inputs[:-outputs], written)
    return _read_and_written


def _read_and_written(inputs: list, written: list) -> int:
    total = 0
    for tensor in inputs:
        total += tensor.held.nbytes
    for tensor in written:
        total += tensor.held.nbytes
    return total


def runs_nothing(func: torch._ops.OpOverload) -> bool:
    """Whether ``func`` only reserves memory."""
    return func._overloadpacket in _RESERVES


_RESERVES = {
    aten.empty,
    aten.empty_like,
    aten.empty_permuted,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
_READS_NOTHING = _RESERVES | {
    aten._foreach_zero_,
    aten.fill_,
    aten.full_like,
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.ones_like,
    aten.rand_like,
    aten.randint_like,
    aten.randn_like,
    aten.zero_,
    aten.zeros_like,
}
_OVERWRITES = {
    aten._foreach_copy_,
    aten.bernoulli_,
    aten.copy_,
    aten.exponential_,
    aten.normal_,
    aten.random_,
    aten.uniform_,
}
_GATHERS = {aten.embedding, aten.gather, aten.index, aten.index_select}
