"""The arguments of an operator: the tensors among them, and whether they may come together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from course_lib.virtual.generators import check_generator
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.operators import Operator
from course_lib.virtual.tensor import VirtualTensor, device_of, index_of, not_dense

# The types of arguments that hold no tensor.
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.memory_format}


def unwrap_all(
    values: Iterable, tensors: list[VirtualTensor], host_tensors: list[torch.Tensor]
) -> list:
    """``values`` with the inner tensor in place of each virtual one; the lists collect both."""
    inner = []
    for value in values:
        kind = type(value)
        if kind is VirtualTensor:  # nearly always one of these two, and not worth a call
            tensors.append(value)
            inner.append(value.held)
        elif kind in _PLAIN:
            inner.append(value)
        else:
            inner.append(_unwrap(value, tensors, host_tensors))
    return inner


def _unwrap(value: Any, tensors: list[VirtualTensor], host_tensors: list[torch.Tensor]) -> Any:
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(unwrap_all(value, tensors, host_tensors))
    if kind is torch.Tensor or isinstance(value, torch.Tensor):
        host_tensors.append(value)
    elif kind is torch._C.Generator:
        check_generator(value)
    return value


def inner_of(tensor: torch.Tensor) -> torch.Tensor:
    """The inner tensor of one that is virtual; another is itself."""
    if not isinstance(tensor, VirtualTensor):
        return tensor
    machine.check_made_here(tensor.allocation.memory)
    return tensor.held


def check_host_tensors(
    operator: Operator,
    index: int,
    host_tensors: list[torch.Tensor],
    inner_args: list,
    inner_kwargs: dict,
) -> None:
    """Numbers and indices on the CPU may be read beside tensors of a device, as on CUDA."""
    allowed: set[int] = set()
    if operator.takes_host_indices:
        allowed.update(id(each) for each in inner_args[1])
    if operator.takes_host_scalars or operator.takes_host_indices:
        allowed.update(id(each) for each in host_tensors if each.dim() == 0)
    allowed -= _written_ids(operator, inner_args, inner_kwargs)
    for tensor in host_tensors:
        if tensor.layout is not torch.strided:
            raise not_dense(tensor.layout)
        if id(tensor) not in allowed:
            raise mixed_devices(device_of(index), tensor.device)


def mixed_devices(one: torch.device, other: torch.device) -> RuntimeError:
    """The error of an operator whose tensors are on two devices, in the words of CUDA."""
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{one} and {other}!"
    )


def target_of(device: torch.device | None, index: int) -> int | None:
    """Index of the virtual GPU that ``device=`` asks for, ``None`` for the host."""
    if device is None:
        return index
    return index_of(device) if device.type == DEVICE_TYPE else None


def written_in_place(
    operator: Operator, inner_args: list, inner_kwargs: dict, inputs: list[VirtualTensor]
) -> list[VirtualTensor]:
    """Those of ``inputs`` that the operator changes."""
    if operator.writes == [0] and isinstance(inner_args[0], torch.Tensor):
        return [inputs[0]]
    changed = _written_ids(operator, inner_args, inner_kwargs)
    # One that is an input and the output, as in torch.maximum(a, b, out=a), is written once.
    return list({id(each): each for each in inputs if id(each.held) in changed}.values())


def _written_ids(operator: Operator, inner_args: list, inner_kwargs: dict) -> set[int]:
    """The ``id`` of every tensor among the arguments that the operator changes."""
    changed: set[int] = set()
    for place in operator.writes:
        if isinstance(place, str):
            value = inner_kwargs.get(place)
        else:
            value = inner_args[place] if place < len(inner_args) else None
        values = value if isinstance(value, (list, tuple)) else [value]
        changed.update(id(tensor) for tensor in values)
    return changed


def check_has_numbers(name: str) -> None:
    """Raise a clear error if someone wants to read a number where there are none."""
    if machine.backing.type == "meta":
        raise RuntimeError(
            f"{name} reads numbers, and these virtual GPUs have none (backing='meta'): they keep "
            "shapes, memory and time. Leave the read out, or use devices(...) without backing=."
        )
