"""Copies that the host does not wait for, and what it does too early with their memory.

``x.to("cpu", non_blocking=True)`` returns before the numbers are there, and pinned memory that is
being sent must not change before it has arrived. On a GPU the program then reads, or sends,
whatever is there at that moment. Nothing here tells the host's own tensors apart, so while a copy
is on its way a ``TorchFunctionMode`` looks at the functions that are called on the host. It is not
there otherwise, and costs nothing.

It does not see what NumPy does with an array that shares the memory, nor what other threads do.

Rests on ``torch.overrides._push_mode``, ``_pop_mode`` and ``_len_torch_function_stack``, and on
``torch.Tensor._reduce_ex_internal``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import overrides

from course_lib.virtual import hazards
from course_lib.virtual.clock import Clock
from course_lib.virtual.machine import DEVICE_TYPE
from course_lib.virtual.streams import Ticket


@dataclass(frozen=True)
class Flight:
    """A copy on its way.

    Attributes:
        ticket: the operation that it is.
        writes_host: whether it goes to the host.
    """

    ticket: Ticket
    writes_host: bool

    def is_over(self) -> bool:
        """Whether the host has waited for it."""
        stream, number, _ = self.ticket
        clock = stream.clock
        return not clock.in_use or clock.seen_by_host.get(stream, 0) >= number

    def is_before_work_of(self, devices: set[torch.device]) -> bool:
        """Whether a device among these touches the memory, and not before this copy is done."""
        current = self.ticket[0].clock.current
        others = [device for device in devices if device.type != "cpu"]
        return bool(others) and all(
            device.type != DEVICE_TYPE or current[device.index].is_after(self.ticket)
            for device in others
        )


class _Watch(overrides.TorchFunctionMode):
    """Looks at every function of PyTorch that this thread calls."""

    def __init__(self) -> None:
        super().__init__()
        self.flights: list[Flight] = []
        self.is_looking = False  # then PyTorch has taken it from the stack, and puts it back

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.is_looking = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.is_looking = False
        _look(func, args, kwargs, result)
        return result

    def end_if_all_are_over(self) -> None:
        """Step down when nothing is on its way. While it looks itself, that must wait."""
        self.flights = [flight for flight in self.flights if not flight.is_over()]
        if not self.flights and not self.is_looking:
            above = _pop_modes_above(self)
            _push_modes(above)


class _Threads(threading.local):
    """Modes belong to a thread."""

    watch: _Watch | None = None


_threads = _Threads()


def watch(clock: Clock, ticket: Ticket, on_host: torch.Tensor, writes_host: bool) -> None:
    """Report what the host does with ``on_host`` before it has waited for the copy ``ticket``."""
    flight = Flight(ticket, writes_host)
    storage: Any = on_host.untyped_storage()
    earlier = _flight_of(storage)
    storage.vgpu_flight = flight
    if earlier and (writes_host or earlier.writes_host) and not ticket[0].is_after(earlier.ticket):
        hazards.report_host(earlier.ticket, earlier.writes_host, on_host, "copy", writes_host)
    mode = _threads.watch = _threads.watch or _Watch()
    mode.flights.append(flight)
    if not mode.is_looking:
        # Below those of the program: they end in the order in which they began.
        above = _pop_modes_above(mode)
        _push_modes([*above, mode])
    clock.after_host_waited = mode.end_if_all_are_over


def prepare() -> None:
    """See who pickles a tensor, as ``torch.save`` does: no mode is asked. To be called once."""
    tensor_class: Any = torch.Tensor
    reduce = tensor_class._reduce_ex_internal

    @wraps(reduce)
    def reduce_watched(self: torch.Tensor, protocol: Any) -> Any:
        if _threads.watch is not None:
            _look(torch.Tensor.__reduce_ex__, (self,), {}, None)
        return reduce(self, protocol)

    tensor_class._reduce_ex_internal = reduce_watched


def _pop_modes_above(mode: _Watch) -> list[Any]:
    """Take away ``mode``, if it is there, and all that came after it; the last one is first."""
    above = []
    while overrides._len_torch_function_stack():
        popped = overrides._pop_mode()
        if popped is mode:
            break
        above.append(popped)
    return above


def _push_modes(modes: list[Any]) -> None:
    for mode in reversed(modes):
        overrides._push_mode(mode)


def _look(func: Callable, args: tuple, kwargs: dict, result: Any) -> None:
    """Report ``func`` if it read or wrote, on the host, memory of a copy on its way."""
    name = func.__name__
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    if _is_harmless(name):
        return  # no numbers are touched
    devices = {tensor.device for tensor in (*tensors, *_tensors(result))}
    changed = [kwargs.get("out"), args[0] if args and _is_in_place(name) else None]
    written = {id(tensor) for tensor in _tensors(changed)}
    for tensor in tensors:
        storage: Any = tensor.untyped_storage()
        flight = _flight_of(storage)
        if flight is None or flight.is_before_work_of(devices):
            continue
        writes = id(tensor) in written
        is_view = not writes and any(
            other.untyped_storage()._cdata == storage._cdata for other in _tensors(result)
        )
        if writes or (flight.writes_host and not is_view):
            storage.vgpu_flight = None  # said once
            hazards.report_host(flight.ticket, flight.writes_host, tensor, name, writes)


def _flight_of(storage: Any) -> Flight | None:
    """The copy that is on its way to or from this memory of the host."""
    flight = getattr(storage, "vgpu_flight", None)
    return None if flight is None or flight.is_over() else flight


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)  # it has no storage
        if value.layout is torch.strided and not is_wrapped:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _is_harmless(name: str) -> bool:
    is_form = name.startswith("new_") and name != "new_tensor"
    return is_form or name.endswith("_like") or name in _HARMLESS


def _is_in_place(name: str) -> bool:
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_ASSIGNMENTS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _ASSIGNMENTS)}
_HARMLESS = {
    *("__get__", "__set__", "__delete__", "__len__", "__hash__", "size", "dim", "numel"),
    *("nelement", "stride", "storage_offset", "element_size", "data_ptr", "untyped_storage"),
    *("is_pinned", "is_shared", "is_contiguous", "is_floating_point", "is_complex", "get_device"),
    *("requires_grad_", "register_hook"),
}
