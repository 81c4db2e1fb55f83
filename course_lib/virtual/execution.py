"""How an operator runs on a virtual GPU.

Each call goes through the same five steps, in :func:`execute`: unwrap the arguments, check that
they share a device, run the operator on the numbers inside, account for memory and time, wrap what
came out.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual import hazards
from course_lib.virtual.arguments import (
    check_has_numbers,
    check_host_tensors,
    mixed_devices,
    target_of,
    unwrap_all,
    written_in_place,
)
from course_lib.virtual.generators import device_generator
from course_lib.virtual.known_forms import run_without_numbers
from course_lib.virtual.machine import machine
from course_lib.virtual.memory import Allocation, Memory
from course_lib.virtual.operators import Operator, runs_all_others
from course_lib.virtual.room import check_output, refuse_if_host_is_full
from course_lib.virtual.tensor import VirtualTensor, wrap

_is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]  # not in PyTorch's stubs


@runs_all_others
def execute(operator: Operator, args: tuple, kwargs: dict) -> Any:
    """Run one operator whose tensors are on one virtual GPU."""
    tensors: list[VirtualTensor] = []
    host_tensors: list[torch.Tensor] = []
    inner_args = unwrap_all(args, tensors, host_tensors)
    inner_kwargs = {}
    if kwargs:
        inner_values = unwrap_all(kwargs.values(), tensors, host_tensors)
        inner_kwargs = dict(zip(kwargs, inner_values, strict=True))
    memory = tensors[0].allocation.memory
    if memory.machine_number != machine.number:
        machine.check_made_here(memory)
    nbytes_multiplied: float = 1
    for tensor in tensors:
        allocation = tensor.allocation
        if allocation.memory is not memory:
            machine.check_made_here(allocation.memory)
            raise mixed_devices(memory.device, tensor.device)
        nbytes_multiplied *= allocation.spread
    if host_tensors:
        check_host_tensors(operator, memory.index, host_tensors, inner_args, inner_kwargs)
    if kwargs and "device" in kwargs:
        target = target_of(kwargs["device"], memory.index)
        inner_kwargs["device"] = machine.backing if target is not None else kwargs["device"]
        if target is None:
            return operator.run(*inner_args, **inner_kwargs)
        memory = machine.memories[target]
    if operator.host_waits:
        check_has_numbers(operator.name)
    if nbytes_multiplied > operator.may_outgrow_from:
        inner_tensors = [tensor.held for tensor in tensors]
        check_output(operator, inner_args, inner_kwargs, memory, inner_tensors)
    try:
        if operator.is_random and inner_kwargs.get("generator") is None:
            with device_generator(memory.index):
                out = operator.run(*inner_args, **inner_kwargs)
        elif machine.has_no_numbers:
            out = run_without_numbers(operator, inner_args, inner_kwargs)
        elif kwargs:
            out = operator.run(*inner_args, **inner_kwargs)
        else:  # the same in less time
            out = operator.run(*inner_args)
    except RuntimeError as error:
        refuse_if_host_is_full(error, memory)
        raise
    return finish(operator, inner_args, inner_kwargs, memory, tensors, out)


def finish(
    operator: Operator,
    inner_args: list,
    inner_kwargs: dict,
    memory: Memory,
    inputs: list[VirtualTensor],
    out: Any,
) -> Any:
    """Wrap what an operator returned, and charge ``memory`` and the clock for it."""
    wrapped: Any
    written: list[VirtualTensor]
    if operator.returns_new:
        if type(out) is tuple:
            wrapped = _wrap_all(out, memory)
            written = [each for each in wrapped if each is not None]
        else:
            wrapped = wrap(out, memory)
            written = [wrapped]
    else:
        written = []
        wrapped = _wrap_output(out, memory, inputs, written)
        if operator.is_mutable:
            if operator.may_resize:
                follow_resized(inputs)
            written += written_in_place(operator, inner_args, inner_kwargs, inputs)
    if operator.runs_nothing or not (written or operator.host_waits):
        return wrapped  # memory reserved, or a view: nothing runs on the device
    clock = machine.clock
    nbytes = operator.bytes_moved(inputs, written)
    if operator.flops is None:
        ticket = clock.compute(operator.name, memory.index, 0.0, nbytes, 1.0)
    else:
        flops = operator.flops(inner_args, inner_kwargs, out)
        peak = machine.spec.peak_flops(inputs[0].held.dtype)
        ticket = clock.compute(operator.name, memory.index, flops, nbytes, peak)
    if clock.has_side_streams:
        hazards.check(ticket, [] if operator.reads_nothing else inputs, written)
    else:
        for tensor in written:
            tensor.allocation.writer = ticket
    if operator.host_waits:
        clock.current[memory.index].synchronize()
    return wrapped


def _wrap_all(out: tuple, memory: Memory) -> tuple:
    """Wrap what is new; a gradient that nobody asked for is None."""
    return tuple([each if each is None else wrap(each, memory) for each in out])


def follow_resized(tensors: list[VirtualTensor]) -> None:
    """Give each tensor whose inner one was resized its form, and its memory the new size."""
    for outer in tensors:
        inner, allocation = outer.held, outer.allocation
        nbytes = inner.untyped_storage().nbytes()
        if nbytes != allocation.nbytes:
            allocation.resize(nbytes)
        if inner.shape != outer.shape or inner.stride() != outer.stride():
            outer.follow(inner, allocation)


def _wrap_output(
    value: Any, memory: Memory, owners: list[VirtualTensor], new_tensors: list[VirtualTensor]
) -> Any:
    """Wrap every tensor in ``value``.

    Args:
        owners: tensors whose memory ``value`` may share.
        new_tensors: collects the tensors that took memory of their own.
    """
    if isinstance(value, torch.Tensor):
        for owner in owners:
            inner = owner.held
            if value is inner:
                return owner
            if _is_alias_of(value, inner):
                return _wrap_view(value, owner.allocation)
        new_tensors.append(wrap(value, memory))
        return new_tensors[-1]
    if isinstance(value, (list, tuple)):
        # What one operator returns may share memory too, as the gradients of a chunk do.
        owners = list(owners)
        wrapped = []
        for item in value:
            wrapped.append(_wrap_output(item, memory, owners, new_tensors))
            if isinstance(item, torch.Tensor):
                owners.append(wrapped[-1])
        return type(value)(wrapped)
    return value


def _wrap_view(inner: torch.Tensor, allocation: Allocation) -> VirtualTensor:
    view = wrap(inner, allocation.memory, allocation)
    # x.conj() and its like compute nothing: they set a bit that later operators look at.
    if inner.is_conj():
        torch._C._set_conj(view, True)
    if inner.is_neg():
        torch._C._set_neg(view, True)
    return view
