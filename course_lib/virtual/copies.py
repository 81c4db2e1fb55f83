"""Copies, over a link where the other end is elsewhere, and reads, for which the host waits."""

from __future__ import annotations

from typing import Any

import torch

from course_lib.virtual import hazards, host_copies
from course_lib.virtual.arguments import check_has_numbers, inner_of, target_of
from course_lib.virtual.execution import execute
from course_lib.virtual.machine import machine
from course_lib.virtual.operators import Operator, runs
from course_lib.virtual.pinned import is_pinned
from course_lib.virtual.room import check_room
from course_lib.virtual.tensor import VirtualTensor, wrap

aten = torch.ops.aten


@runs(aten._to_copy.default)
def _to_copy(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """``x.to(...)``: on the same device a kernel, between devices a copy over the link."""
    (source,) = args
    device = kwargs.get("device")
    if device is None or device == source.device:
        return execute(operator, args, {**kwargs, "device": source.device})
    destination = target_of(device, source.device_index)
    inner = inner_of(source)
    if device.type == "meta":
        return operator.run(inner, **kwargs)  # the shape goes, and no number
    if destination is None:
        check_has_numbers(".to('cpu')")
        inner = operator.run(inner, **{**kwargs, "device": "cpu"})
        charge_copy(source, inner, host_waits=not kwargs.get("non_blocking"))
        return inner
    dtype = kwargs.get("dtype") or source.dtype
    check_room(source.numel() * dtype.itemsize, machine.memories[destination])
    there = operator.run(inner, **{**kwargs, "device": machine.backing})
    outer = wrap(there, machine.memories[destination])
    charge_copy(source, outer)
    return outer


@runs(aten.copy_.default)
def copy_(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """``a.copy_(b)``: the one operator that may have its tensors on two devices."""
    destination, source = args[0], args[1]
    if not isinstance(source, torch.Tensor):  # x.copy_(1.0)
        return destination.fill_(source)
    if not isinstance(destination, VirtualTensor):
        check_has_numbers("copy_ to the host")
    elif isinstance(source, VirtualTensor) and destination.device_index == source.device_index:
        return execute(operator, args, kwargs)
    operator.run(inner_of(destination), inner_of(source), *args[2:], **kwargs)
    non_blocking = any(args[2:]) or kwargs.get("non_blocking", False)
    on_host = source if isinstance(destination, VirtualTensor) else destination
    charge_copy(source, destination, host_waits=not (non_blocking and is_pinned(on_host)))
    return destination


def charge_copy(source: torch.Tensor, destination: torch.Tensor, host_waits: bool = True) -> None:
    """Charge the clock for a copy; a tensor that is not virtual is on the host."""
    read = [source] if isinstance(source, VirtualTensor) else []
    written = [destination] if isinstance(destination, VirtualTensor) else []
    clock = machine.clock
    ticket = clock.copy(
        read[0].device_index if read else None,
        written[0].device_index if written else None,
        source.nbytes,
        host_waits,
    )
    if not host_waits:
        host_copies.watch(clock, ticket, destination if read else source, writes_host=bool(read))
    if clock.has_side_streams:
        hazards.check(ticket, read, written)
    elif written:
        written[0].allocation.writer = ticket


@runs(aten._local_scalar_dense.default)
def item(operator: Operator, args: tuple, kwargs: dict) -> Any:
    """``x.item()``: the host waits for the device, then reads one number."""
    check_has_numbers(".item()")
    (tensor,) = args
    inner = inner_of(tensor)
    stream = machine.clock.current[tensor.device_index]
    if machine.clock.has_side_streams:
        hazards.check((stream, stream.count, "item"), [tensor], [])
    stream.synchronize()
    return operator.run(inner)
