"""How an operator runs on a virtual GPU.

Each call goes through the same five steps, in :func:`execute`: unwrap the arguments, check that
they share a device, run the operator on the numbers inside, account for memory and time, wrap what
came out.
"""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual import hazards
from course_lib.virtual.generators import check_generator, device_generator
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.memory import Allocation
from course_lib.virtual.operators import Operator, runs_all_others
from course_lib.virtual.room import MAY_OUTGROW, check_output, refuse_if_host_is_full
from course_lib.virtual.tensor import VirtualTensor, device_of, index_of, not_dense, wrap

_is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]  # not in PyTorch's stubs


@runs_all_others
def execute(operator: Operator, args: tuple, kwargs: dict) -> Any:
    """Run one operator whose tensors are on one virtual GPU."""
    tensors: list[VirtualTensor] = []
    host_tensors: list[torch.Tensor] = []
    inner_args = []
    for value in args:
        if type(value) is VirtualTensor:  # nearly always, and not worth a call
            tensors.append(value)
            inner_args.append(value.held)
        else:
            inner_args.append(_unwrap(value, tensors, host_tensors))
    inner_kwargs = {}
    if kwargs:
        for name, value in kwargs.items():
            inner_kwargs[name] = _unwrap(value, tensors, host_tensors)
    index = tensors[0].device_index
    memory = tensors[0].allocation.memory
    if memory.machine_number != machine.number:
        machine.check_made_here(memory)
    nbytes_multiplied = 1.0
    for tensor in tensors:
        allocation = tensor.allocation
        if allocation.memory is not memory:
            machine.check_made_here(allocation.memory)
            raise mixed_devices(device_of(index), tensor.device)
        nbytes_multiplied *= allocation.nbytes
    if host_tensors:
        _check_host_tensors(operator, index, host_tensors, inner_args, inner_kwargs)
    if kwargs and "device" in kwargs:
        target = target_of(kwargs["device"], index)
        inner_kwargs["device"] = machine.backing if target is not None else kwargs["device"]
        if target is None:
            return operator.run(*inner_args, **inner_kwargs)
        index = target
    if operator.host_waits:
        check_has_numbers(operator.name)
    if nbytes_multiplied > MAY_OUTGROW and operator.may_outgrow:
        inner_tensors = [tensor.held for tensor in tensors]
        check_output(operator, inner_args, inner_kwargs, index, inner_tensors)
    try:
        if operator.is_random and inner_kwargs.get("generator") is None:
            with device_generator(index):
                out = operator.run(*inner_args, **inner_kwargs)
        else:
            out = operator.run(*inner_args, **inner_kwargs)
    except RuntimeError as error:
        refuse_if_host_is_full(error, index)
        raise
    return finish(operator, inner_args, inner_kwargs, index, tensors, out)


def finish(
    operator: Operator,
    inner_args: list,
    inner_kwargs: dict,
    index: int,
    inputs: list[VirtualTensor],
    out: Any,
) -> Any:
    """Wrap what an operator returned, and charge memory and clock for it."""
    wrapped: Any
    written: list[VirtualTensor]
    if operator.returns_new:
        if type(out) is tuple:  # a gradient that nobody asked for is None
            wrapped = tuple([each if each is None else wrap(each, index) for each in out])
            written = [each for each in wrapped if each is not None]
        else:
            wrapped = wrap(out, index)
            written = [wrapped]
    else:
        written = []
        wrapped = _wrap_output(out, index, inputs, written)
        if operator.is_mutable:
            if operator.may_resize:
                follow_resized(inputs)
            written += _written_in_place(operator, inner_args, inner_kwargs, inputs)
    if operator.runs_nothing or not (written or operator.host_waits):
        return wrapped  # memory reserved, or a view: nothing runs on the device
    clock = machine.clock
    nbytes = operator.bytes_moved(inputs, written)
    if operator.flops is None:
        ticket = clock.compute(operator.name, index, 0.0, nbytes, 1.0)
    else:
        flops = operator.flops(inner_args, inner_kwargs, out)
        peak = machine.spec.peak_flops(inputs[0].held.dtype)
        ticket = clock.compute(operator.name, index, flops, nbytes, peak)
    if clock.has_side_streams:
        hazards.check(ticket, inputs, written)
    else:
        for tensor in written:
            tensor.allocation.writer = ticket
    if operator.host_waits:
        clock.current[index].synchronize()
    return wrapped


def _written_in_place(
    operator: Operator, inner_args: list, inner_kwargs: dict, inputs: list[VirtualTensor]
) -> list[VirtualTensor]:
    """Those of ``inputs`` that the operator changes."""
    if operator.writes == [0] and isinstance(inner_args[0], torch.Tensor):
        return [inputs[0]]
    changed = _written_ids(operator, inner_args, inner_kwargs)
    return [tensor for tensor in inputs if id(tensor.held) in changed]


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


def follow_resized(tensors: list[VirtualTensor]) -> None:
    """Give each tensor whose inner one was resized its form, and its memory the new size."""
    for outer in tensors:
        inner, allocation = outer.held, outer.allocation
        nbytes = inner.untyped_storage().nbytes()
        if nbytes != allocation.nbytes:
            allocation.resize(nbytes)
        if inner.shape != outer.shape or inner.stride() != outer.stride():
            outer.follow(inner, allocation)


def _unwrap(value: Any, tensors: list[VirtualTensor], host_tensors: list[torch.Tensor]) -> Any:
    """``value`` with the inner tensor in place of each virtual one; the lists collect both."""
    kind = type(value)
    if kind is VirtualTensor:
        tensors.append(value)
        return value.held
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return kind([_unwrap(item, tensors, host_tensors) for item in value])
    if kind is torch.Tensor or isinstance(value, torch.Tensor):
        host_tensors.append(value)
    elif kind is torch._C.Generator:
        check_generator(value)
    return value


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.memory_format}


def _check_host_tensors(
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


def _wrap_output(
    value: Any, index: int, owners: list[VirtualTensor], new_tensors: list[VirtualTensor]
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
                return _wrap_view(value, index, owner.allocation)
        new_tensors.append(wrap(value, index))
        return new_tensors[-1]
    if isinstance(value, (list, tuple)):
        # What one operator returns may share memory too, as the gradients of a chunk do.
        owners = list(owners)
        wrapped = []
        for item in value:
            wrapped.append(_wrap_output(item, index, owners, new_tensors))
            if isinstance(item, torch.Tensor):
                owners.append(wrapped[-1])
        return type(value)(wrapped)
    return value


def _wrap_view(inner: torch.Tensor, index: int, allocation: Allocation) -> VirtualTensor:
    view = wrap(inner, index, allocation)
    # x.conj() and its like compute nothing: they set a bit that later operators look at.
    if inner.is_conj():
        torch._C._set_conj(view, True)
    if inner.is_neg():
        torch._C._set_neg(view, True)
    return view
