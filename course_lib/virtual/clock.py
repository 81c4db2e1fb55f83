"""Simulated time: CUDA's rules of what waits for what, with the seconds computed.

The host enqueues an operation and goes on. The operation starts on its device when the host has
enqueued it and the device is free. A copy between two devices keeps both of them busy. Only a
read of a value, or ``synchronize``, makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from course_lib.virtual.spec import Spec


@dataclass(slots=True)
class Span:
    """One operation or copy, and when it ran.

    Attributes:
        name: the operator's name, for example ``"addmm"``.
        device: index of the device whose row it is drawn on; for a copy, the sender
            (the receiver, when the host is the sender).
        start, end: simulated seconds.
        flops: floating-point operations of its matrix products.
        bytes: bytes read and written; for a copy, the bytes moved.
        route: ``None`` for compute, ``(source, destination)`` device indices for a copy, with
            ``None`` standing for the host.
        region: what the program was doing, if it said so with ``course_lib.region``.
    """

    name: str
    device: int
    start: float
    end: float
    flops: float
    bytes: int
    route: tuple[int | None, int | None] | None = None
    region: str = ""

    @property
    def kind(self) -> str:
        """``"copy"``, ``"matmul"`` or ``"other"`` (anything bound by memory traffic)."""
        if self.route is not None:
            return "copy"
        return "matmul" if self.flops else "other"


class Clock:
    """The host's time and each device's, in simulated seconds since the machine started."""

    def __init__(self, spec: Spec, device_count: int) -> None:
        self.spec = spec
        self.host = 0.0
        self.free_at = [0.0] * device_count
        self.region = ""
        self.listeners: list[Callable[[Span], None]] = []

    def compute(self, name: str, device: int, flops: float, nbytes: int, peak: float) -> None:
        """Enqueue an operation: it takes as long as its arithmetic or its memory traffic does.

        This is the roofline model (Williams, Waterman and Patterson, 2009).

        Args:
            peak: FLOP/s of the device in the operation's dtype.
        """
        seconds = nbytes / self.spec.memory_bandwidth
        if flops:
            seconds = max(seconds, flops / peak)
        self.host += self.spec.launch_overhead
        start = self.free_at[device]
        if start < self.host:
            start = self.host
        self.free_at[device] = end = start + seconds
        if self.listeners:
            for listen in self.listeners:
                listen(Span(name, device, start, end, flops, nbytes, None, self.region))

    def copy(self, source: int | None, destination: int | None, nbytes: int) -> None:
        """Enqueue a copy; ``None`` is the host, which waits for a copy to or from itself."""
        spec = self.spec
        ends = [device for device in (source, destination) if device is not None]
        bandwidth = spec.link_bandwidth if len(ends) == 2 else spec.host_bandwidth
        self.host += spec.launch_overhead
        start = max(self.host, *(self.free_at[device] for device in ends))
        end = start + spec.latency + nbytes / bandwidth
        for device in ends:
            self.free_at[device] = end
        if len(ends) == 1:
            self.host = end
        for listen in self.listeners:
            route = (source, destination)
            listen(Span("copy", ends[0], start, end, 0, nbytes, route, self.region))

    def wait(self, device: int) -> None:
        """Make the host wait until ``device`` has done all that was enqueued on it."""
        self.host = max(self.host, self.free_at[device])
