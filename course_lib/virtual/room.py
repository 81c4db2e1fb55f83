"""Whether there is room for what an operator returns: asked before any work is done, where it can
be asked at little cost, and answered as the device's out-of-memory where the host runs out.

Most operators return about as much as they are given. They take what they need and are refused
afterwards, if the device is full. Some can return far more: a factory, a product, numbers that are
broadcast against each other, what is told how often to repeat. ``torch.randn(20_000, 20_000)``
would fill the host's memory, for seconds, on its way to the refusal. Of these a bound is worked
out, and if that is large, what they return: by running them on tensors without numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch

from course_lib.virtual.machine import machine
from course_lib.virtual.memory import Memory, format_bytes, host_memory_left
from course_lib.virtual.operators import Operator

aten = torch.ops.aten

# What is smaller is made sooner than thought about.
_LARGE = 64_000_000
_WIDEST = 16  # bytes of a complex128, the widest dtype
_META = torch.device("meta")


def is_large(numbers: float) -> bool:
    """Whether so many numbers may be too many to be made before anybody asks."""
    return numbers * _WIDEST > _LARGE


def check_factory(operator: Operator, args: tuple, kwargs: dict, memory: Memory) -> None:
    """Raise if ``memory`` has no room for what a factory such as ``torch.zeros`` makes.

    Raises:
        torch.OutOfMemoryError: see :func:`check_room`.
    """
    numbers: float = 1
    if operator.name == "arange":
        start, end, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
        numbers = abs((end - start) / (step or 1))
    elif any([type(value) is list for value in args]):
        for value in args:
            if type(value) is list:
                for length in value:
                    numbers *= length
    else:  # how many numbers, or how many rows and columns
        numbers = math.prod([value for value in args if type(value) is int and value])
        if operator.name == "eye" and len(args) == 1:
            numbers *= numbers
    if is_large(numbers):
        _check_form(operator, args, kwargs, memory)


def check_output(
    operator: Operator, args: list, kwargs: dict, memory: Memory, tensors: list[torch.Tensor]
) -> None:
    """Raise if ``memory`` has no room for what an operator returns.

    Args:
        args, kwargs: what the operator will be run with where the numbers are.
        tensors: those among them.

    Raises:
        torch.OutOfMemoryError: see :func:`check_room`.
    """
    if not operator.returns_new or machine.backing.type == "meta":
        return  # nothing, or no numbers
    if operator.name == "masked_select":  # of expanded tensors, as in combinations()
        x, mask = args
        repeats = _broadcast(args) // max(mask.numel(), 1)
        check_room(int(mask.count_nonzero()) * repeats * x.element_size(), memory)
    if operator.host_waits:
        return  # how much depends on the numbers
    bound = _BOUNDS.get(operator.func._overloadpacket)
    if bound is not None:
        numbers = bound(*args)
    elif not operator.is_pointwise:
        numbers = sum([tensor.numel() for tensor in tensors])
    elif all([tensor.shape == tensors[0].shape for tensor in tensors]):
        numbers = tensors[0].numel()
    else:
        numbers = _broadcast(tensors)
    if is_large(numbers):
        _check_form(operator, args, kwargs, memory)


def check_as_told(operator: Operator, args: tuple, kwargs: dict, memory: Memory) -> None:
    """Raise if ``memory`` has no room for what an operator returns that is told how much.

    Args:
        args: tensors and the numbers that say it, as in ``x.repeat(1000)``.

    Raises:
        torch.OutOfMemoryError: see :func:`check_room`.
    """
    bound = _BOUNDS.get(operator.func._overloadpacket)
    numbers = _bound_of(args) if bound is None else bound(*args)
    if machine.backing.type == "meta" or not is_large(numbers):
        return
    if "upsample" in operator.name:  # without numbers it is interpolated all the same
        x, size = args[:2]
        check_room(math.prod((*x.shape[:2], *size)) * x.element_size(), memory)
    else:
        _check_form(operator, args, kwargs, memory)


def _bound_of(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        return value.numel()
    if isinstance(value, (list, tuple)):
        return math.prod([_bound_of(item) for item in value])
    return 1 + abs(value) if type(value) in (int, float) else 1


def _broadcast(tensors: list[torch.Tensor]) -> int:
    """Numbers of each of ``tensors`` once they are broadcast against each other."""
    sizes = zip_longest(*[reversed(tensor.shape) for tensor in tensors], fillvalue=1)
    return math.prod([max(size) for size in sizes])


def _indexed(x: torch.Tensor, indices: list, *_: Any) -> int:
    picked = _broadcast([index for index in indices if index is not None])
    sizes = zip(x.shape, indices, strict=False)
    among = math.prod([size for size, index in sizes if index is not None])
    return picked * (x.numel() // max(among, 1))


def _product(x: torch.Tensor, columns: int) -> int:
    return math.prod(x.shape[:-1]) * columns


# At most how many numbers come out of operators whose result has more than their tensors together.
_BOUNDS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((aten.mm, aten.bmm), lambda x, y: _product(x, y.shape[-1])),
    **dict.fromkeys((aten.addmm, aten.baddbmm), lambda _, x, y: _product(x, y.shape[-1])),
    **dict.fromkeys(
        (aten._cdist_forward, aten._euclidean_dist),
        lambda x, y, *_: _product(x, y.shape[-2]),
    ),
    aten.convolution: lambda x, weight, *_: x.numel() * max(weight.shape[:2]),
    aten.diag_embed: lambda x, *_: x.numel() ** 2,
    aten._pdist_forward: lambda x, *_: x.numel() * x.shape[0],
    aten.embedding: lambda weight, indices, *_: indices.numel() * weight.shape[-1],
    aten.index: _indexed,
    aten.index_select: lambda x, dim, index: index.numel() * (x.numel() // max(x.shape[dim], 1)),
}


def _check_form(operator: Operator, args: Any, kwargs: dict, memory: Memory) -> None:
    try:
        with torch._C.DisableTorchFunction():  # PyTorch does some of it in Python
            kwargs = {name: _without_numbers(value) for name, value in kwargs.items()}
            out = operator.run(*_without_numbers(args), **kwargs)
    except Exception:
        return  # the operator itself will say what is wrong
    outputs = out if isinstance(out, (list, tuple)) else [out]
    sizes = [each.untyped_storage().nbytes() for each in outputs if isinstance(each, torch.Tensor)]
    check_room(sum(sizes), memory)


def _without_numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        form = value.shape, value.stride()
        return torch.empty_strided(*form, dtype=value.dtype, device=_META)
    if isinstance(value, (list, tuple)):
        return [_without_numbers(item) for item in value]
    if isinstance(value, torch.Generator):
        return None
    return _META if isinstance(value, torch.device) else value


def check_room(nbytes: int, memory: Memory) -> None:
    """Raise if the device, or the host in its place, cannot hold ``nbytes`` more.

    Raises:
        torch.OutOfMemoryError: the device is full, in the words of CUDA; or the host, which keeps
            its numbers, is.
    """
    memory.check_free(nbytes)
    if machine.backing.type == "cpu" and nbytes > _LARGE and nbytes > host_memory_left():
        raise _host_is_full(nbytes, memory)


def refuse_if_host_is_full(error: RuntimeError, memory: Memory) -> None:
    """Raise the device's out-of-memory if ``error`` says that the host had no memory.

    Raises:
        torch.OutOfMemoryError: the device, or the host, is full.
    """
    tried = re.search(r"DefaultCPUAllocator.* allocate (\d+) bytes", str(error))
    if tried:
        memory.check_free(int(tried[1]))
        raise _host_is_full(int(tried[1]), memory) from None


def _host_is_full(nbytes: int, memory: Memory) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"{memory.device} has room for {format_bytes(nbytes)}, but this computer, "
        "which keeps its numbers, has not. Ask for smaller GPUs, as in devices(4, A100 / 1000), or "
        "for GPUs without numbers: devices(..., backing='meta') keeps shapes, memory and time."
    )
