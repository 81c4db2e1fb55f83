"""Whether there is room for what an operator returns: asked before any work is done, where it can
be asked at little cost, and answered as the device's out-of-memory where the host runs out.

Most operators return about as much as they are given. They take what they need and are refused
afterwards, if the device is full. A factory, a product and numbers that are broadcast against each
other can return far more: ``torch.randn(20_000, 20_000)`` would fill the host's memory, for
seconds, on its way to the refusal.
"""

from __future__ import annotations

import math
import re
from itertools import zip_longest
from typing import Any

import torch

from course_lib.virtual.machine import machine
from course_lib.virtual.memory import format_bytes, host_memory_left
from course_lib.virtual.operators import Operator

# What is smaller is made sooner than thought about.
_LARGE = 64_000_000
_WIDEST = 16  # bytes of a complex128, the widest dtype
# Two tensors of 45 kB each are the least of which something large can come, in four bytes a number.
MAY_OUTGROW = 2_000_000_000


def check_factory(operator: Operator, args: tuple, kwargs: dict, index: int) -> None:
    """Raise if ``vgpu:index`` has no room for what a factory such as ``torch.zeros`` makes.

    Of one that is given no size, such as ``torch.arange``, nothing is known before.

    Raises:
        torch.OutOfMemoryError: see :func:`_check`.
    """
    numbers = 1
    for value in args:
        if type(value) is list:
            for length in value:
                numbers *= length
    if numbers * _WIDEST <= _LARGE or operator.name == "empty_strided":
        return
    dtype = kwargs.get("dtype")
    if dtype is None:  # that of the numbers it is filled with may be the smallest
        dtype = torch.get_default_dtype() if operator.name in _FLOATS else torch.bool
    _check(numbers * dtype.itemsize, index)


_FLOATS = {"empty", "ones", "rand", "randn", "zeros"}


def check_output(
    operator: Operator, args: list, kwargs: dict, index: int, tensors: list[torch.Tensor]
) -> None:
    """Raise if ``vgpu:index`` has no room for what an operator of several tensors returns.

    Args:
        args, kwargs: what the operator will be run with where the numbers are.
        tensors: those that it multiplies or broadcasts against each other.

    Raises:
        torch.OutOfMemoryError: see :func:`_check`.
    """
    if len(tensors) < 2 or machine.backing.type == "meta":
        return
    if operator.is_product:
        one, other = tensors[-2:]
        numbers = one.numel() // one.shape[-1] * other.shape[-1]
    elif all([tensor.shape == tensors[0].shape for tensor in tensors]):
        numbers = tensors[0].numel()
    else:
        sizes = zip_longest(*[reversed(tensor.shape) for tensor in tensors], fillvalue=1)
        numbers = math.prod([max(size) for size in sizes])
    if numbers * _WIDEST > _LARGE:
        try:  # on one number, to see of what dtype they will be
            out = operator.run(*map(_one, args), **{name: _one(kwargs[name]) for name in kwargs})
        except RuntimeError:
            return  # the operator itself will say what is wrong
        _check(numbers * out.element_size(), index)


def _one(value: Any) -> Any:
    return value.new_ones([1] * value.dim()) if isinstance(value, torch.Tensor) else value


def _check(nbytes: int, index: int) -> None:
    """Raise if the device, or the host in its place, cannot hold ``nbytes`` more.

    Raises:
        torch.OutOfMemoryError: the device is full, in the words of CUDA; or the host, which keeps
            its numbers, is.
    """
    machine.memories[index].check_free(nbytes)
    if machine.backing.type == "cpu" and nbytes > host_memory_left():
        raise _host_is_full(nbytes, index)


def refuse_if_host_is_full(error: RuntimeError, index: int) -> None:
    """Raise the device's out-of-memory if ``error`` says that the host had no memory.

    Raises:
        torch.OutOfMemoryError: the device, or the host, is full.
    """
    tried = re.search(r"DefaultCPUAllocator.* allocate (\d+) bytes", str(error))
    if tried:
        machine.memories[index].check_free(int(tried[1]))
        raise _host_is_full(int(tried[1]), index) from None


def _host_is_full(nbytes: int, index: int) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"{machine.memories[index].device} has room for {format_bytes(nbytes)}, but this computer, "
        "which keeps its numbers, has not. Ask for smaller GPUs, as in devices(4, A100 / 1000), or "
        "for GPUs without numbers: devices(..., backing='meta') keeps shapes, memory and time."
    )
