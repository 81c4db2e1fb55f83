"""Simulated time: CUDA's rules of what waits for what, with the seconds computed.

The host enqueues an operation on a stream and goes on. The operation starts when the host has
enqueued it, everything before it on its stream is done, and the part of the GPU that it needs is
free. A GPU has one set of cores, which the operations of all its streams take in turns, and for
each link a part that sends and a part that receives, which work beside the cores and each other.

A copy between two devices takes its place on the current stream of both, as PyTorch's does: it
waits for both, and both go on after it. Only a read of a value, or ``synchronize``, makes the
host wait.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from course_lib.virtual.spec import Spec
from course_lib.virtual.streams import STREAMS_A_DEVICE, Stream, Ticket, remember


@dataclass(slots=True)
class Span:
    """One operation or copy, and when it ran.

    Attributes:
        name: the operator's name, for example ``"addmm"``.
        device: index of the device that ran it; for a copy, the sender (the receiver, when the
            host is the sender).
        start, end: simulated seconds.
        flops: floating-point operations of its matrix products.
        bytes: bytes read and written; for a copy, the bytes moved.
        route: ``None`` for compute, ``(source, destination)`` device indices for a copy, with
            ``None`` standing for the host.
        region: what the program was doing, if it said so with ``course_lib.region``.
        streams: the name of its stream, ``""`` for the default one; for a copy between devices
            two names, the sender's first.
    """

    name: str
    device: int
    start: float
    end: float
    flops: float
    bytes: int
    route: tuple[int | None, int | None] | None = None
    region: str = ""
    streams: tuple[str, ...] = ("", "")

    @property
    def kind(self) -> str:
        """``"copy"``, ``"matmul"`` or ``"other"`` (anything bound by memory traffic)."""
        if self.route is not None:
            return "copy"
        return "matmul" if self.flops else "other"

    @property
    def rows(self) -> list[tuple[int, str]]:
        """``(device, stream)`` of each queue that it keeps busy."""
        if self.route is None:
            return [(self.device, self.streams[0])]
        ends = [device for device in self.route if device is not None]
        return list(zip(ends, self.streams, strict=False))


class Engine:
    """A part of a GPU that does one thing at a time: its cores, or one end of a link.

    The work of all streams shares it. It does first what is ready first: a later piece of work
    goes into an earlier gap if it is ready by then and fits.
    """

    __slots__ = ("busy",)

    def __init__(self) -> None:
        self.busy: list[list[float]] = []  # [start, end] of each stretch of work, in order

    def earliest(self, ready: float, seconds: float) -> float:
        """When work that takes ``seconds`` and could start at ``ready`` can start here."""
        busy = self.busy
        if not busy or ready >= busy[-1][1]:
            return ready
        start = ready
        for began, ended in busy[max(0, bisect_right(busy, [ready]) - 1) :]:
            if start + seconds <= began:
                return start
            start = max(start, ended)
        return start

    def take(self, start: float, end: float, now: float) -> None:
        """Work from ``start`` to ``end``; nothing will ever again start before ``now``."""
        busy = self.busy
        if not busy or start > busy[-1][1]:
            if busy and busy[-1][1] <= now:
                busy.clear()
            busy.append([start, end])
        elif start == busy[-1][1]:
            busy[-1][1] = end
        else:
            busy.insert(bisect_right(busy, [start]), [start, end])


class Clock:
    """The host's time and each stream's, in simulated seconds since the machine started.

    Attributes:
        host: what the host's clock says.
        streams: for each device its streams, the default one first.
        current: for each device the stream that work is enqueued on.
        current_device: index of the device that is meant when none is named.
        ended: whether other virtual GPUs, with a clock of their own, took the place of these.
        has_side_streams: whether any device has more than its default stream.
        seen_by_host: how many of each stream's operations the host has waited for.
    """

    def __init__(self, spec: Spec, device_count: int) -> None:
        self.spec = spec
        self.host = 0.0
        self.streams = [[Stream(self, index, "")] for index in range(device_count)]
        self.current = [streams[0] for streams in self.streams]
        self.current_device = 0
        self.ended = False
        self.has_side_streams = False
        self._made = [0] * device_count
        self.seen_by_host: dict[Stream, int] = {}
        self.region = ""
        self.listeners: list[Callable[[Span], None]] = []
        self._cores = [Engine() for _ in range(device_count)]
        # A link carries both directions at once; the one to the host is another than the others.
        self._senders = [Engine() for _ in range(device_count)]
        self._receivers = [Engine() for _ in range(device_count)]
        self._to_host = [Engine() for _ in range(device_count)]
        self._from_host = [Engine() for _ in range(device_count)]

    def compute(self, name: str, device: int, flops: float, nbytes: int, peak: float) -> Ticket:
        """Enqueue an operation: it takes as long as its arithmetic or its memory traffic does.

        This is the roofline model (Williams, Waterman and Patterson, 2009).

        Args:
            peak: FLOP/s of the device in the operation's dtype.
        """
        spec = self.spec
        seconds = nbytes / spec.memory_bandwidth
        if flops:
            seconds = max(seconds, flops / peak)
        self.host = host = self.host + spec.launch_overhead
        stream = self.current[device]
        start = stream.free_at
        if start < host:
            start = host
        cores = self._cores[device]
        if self.has_side_streams:
            start = cores.earliest(start, seconds)
        stream.free_at = end = start + seconds
        cores.take(start, end, host)
        stream.count = count = stream.count + 1
        if self.listeners:
            for listen in self.listeners:
                listen(
                    Span(name, device, start, end, flops, nbytes, None, self.region, stream.names)
                )
        return (stream, count, name)

    def copy(
        self, source: int | None, destination: int | None, nbytes: int, host_waits: bool = True
    ) -> Ticket:
        """Enqueue a copy; ``None`` is the host.

        Args:
            host_waits: whether the host waits for a copy to or from itself. It does unless the
                copy is ``non_blocking`` and its memory on the host is pinned.
        """
        spec = self.spec
        ends = [device for device in (source, destination) if device is not None]
        streams = [self.current[device] for device in ends]
        if len(ends) == 2:
            bandwidth = spec.link_bandwidth
            engines = [self._senders[source], self._receivers[destination]]
        else:
            bandwidth = spec.host_bandwidth
            engines = [self._from_host[ends[0]] if source is None else self._to_host[ends[0]]]
        self.host += spec.launch_overhead
        seconds = spec.latency + nbytes / bandwidth
        ready = max(self.host, *(stream.free_at for stream in streams))
        start = _earliest(engines, ready, seconds)
        end = start + seconds
        for engine in engines:
            engine.take(start, end, self.host)
        streams[0].wait_stream(streams[-1])
        streams[0].count += 1
        ticket = (streams[0], streams[0].count, "copy")
        for stream in streams:
            stream.free_at = end
        streams[-1].wait_stream(streams[0])
        if len(ends) == 1 and host_waits:
            streams[0].synchronize()
        for listen in self.listeners:
            names = tuple(stream.name for stream in streams)
            route = (source, destination)
            listen(Span("copy", ends[0], start, end, 0, nbytes, route, self.region, names))
        return ticket

    def wait(self, seconds: float, stream: Stream, count: int, seen: dict[Stream, int]) -> None:
        """Make the host wait for the first ``count`` operations of ``stream``.

        Args:
            seconds: when they are done.
            seen: what they came after themselves.
        """
        if self.host < seconds:
            self.host = seconds
        remember(self.seen_by_host, stream, count, seen)

    def synchronize(self, device: int) -> None:
        """Make the host wait for all streams of ``device``."""
        for stream in self.streams[device]:
            stream.synchronize()

    def new_stream(self, device: int) -> Stream:
        """One more stream of ``device``, or one of those it has if they are many."""
        streams = self.streams[device]
        self.has_side_streams = True
        self._made[device] += 1
        if len(streams) <= STREAMS_A_DEVICE:
            streams.append(Stream(self, device, f"stream {len(streams)}"))
            return streams[-1]
        return streams[1 + (self._made[device] - 1) % STREAMS_A_DEVICE]


def _earliest(engines: list[Engine], ready: float, seconds: float) -> float:
    """When work that needs all ``engines`` at once can start."""
    start = ready
    while True:
        latest = max(engine.earliest(start, seconds) for engine in engines)
        if latest == start:
            return start
        start = latest
