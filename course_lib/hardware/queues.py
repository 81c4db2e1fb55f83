"""Streams, events and the host's clock, of GPUs real, virtual and on paper."""

from __future__ import annotations

import time
from typing import Any, Protocol, cast

import torch

from course_lib.hardware.choosing import real_devices
from course_lib.hardware.questions import existing, is_virtual
from course_lib.virtual import streams as virtual_streams
from course_lib.virtual.machine import machine
from course_lib.virtual.paper_tensor import PaperDevice


class Event(Protocol):
    """What a ``torch.cuda.Event`` and a virtual one have in common."""

    def record(self, stream: Any = None, /) -> None: ...
    def wait(self, stream: Any = None, /) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end: Any, /) -> float: ...


class Stream(Protocol):
    """What a ``torch.cuda.Stream`` and a virtual one have in common.

    Each takes streams and events of its own kind alone, which is more than a type can say here.
    """

    @property
    def device(self) -> torch.device: ...
    def wait_stream(self, other: Any, /) -> None: ...
    def wait_event(self, event: Any, /) -> None: ...
    def record_event(self, event: Any = None, /) -> Event: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...


def side_stream(device: torch.device | str | PaperDevice) -> Stream:
    """A new side stream of ``device``: ``with course_lib.side_stream(gpu):`` enqueues work there.

    Work on different streams of a device runs at the same time if the device can do both (a copy
    beside a product), and in no order, until one stream waits for the other. A copy between two
    devices is enqueued on the current streams of both. On a real GPU it is a
    ``torch.cuda.Stream``; a virtual one has the same methods.
    """
    if isinstance(device, PaperDevice):  # it has what collectives need of a stream
        return cast(Stream, device.machine.new_stream(device))
    gpu = existing(device)
    return machine.clock.new_stream(gpu.index) if is_virtual(gpu) else torch.cuda.Stream(gpu)


def current_stream(device: torch.device | str | PaperDevice) -> Stream:
    """The stream of ``device`` that work is enqueued on: the default one, outside of any block."""
    if isinstance(device, PaperDevice):
        return cast(Stream, device.current)
    gpu = existing(device)
    if is_virtual(gpu):
        return machine.clock.current[gpu.index]
    return torch.cuda.current_stream(gpu)


def event(device: torch.device | str) -> Event:
    """A new event, to ``record`` on a stream of ``device`` and to ``wait`` for on any stream.

    On a real GPU it is a ``torch.cuda.Event`` that keeps the time.
    """
    gpu = existing(device)
    if is_virtual(gpu):
        return virtual_streams.Event(machine.clock.streams[gpu.index][0])
    return torch.cuda.Event(enable_timing=True)


def synchronize() -> None:
    """Make the host wait until every GPU has done all its work."""
    machine.synchronize()
    for gpu in real_devices:
        torch.cuda.synchronize(gpu)


def host_seconds() -> float:
    """What the host's clock says: simulated when the GPUs are virtual, measured otherwise."""
    return machine.clock.host if machine.device_count else time.perf_counter()
