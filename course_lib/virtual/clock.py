"""Simulated time: CUDA's rules of what waits for what, with the seconds computed.

The host enqueues an operation on a stream and goes on. The operation is ready when the host has
enqueued it and everything before it on its stream is done. It starts when the part of the GPU that
it needs is free. A GPU has one set of cores, which the operations of all its streams take in turns,
and for each link a part that sends and a part that receives, which work beside the cores and each
other. What is ready first goes first.

A copy between two devices takes its place on the current stream of both, as PyTorch's does: it
waits for both, and both go on after it. Only a read of a value, or ``synchronize``, makes the
host wait.

As long as each device has its default stream alone, an operation's times are known when it is
enqueued. With side streams they are not: something enqueued later may be ready sooner. Then
operations wait in a list until the host waits for one of them, or a trace ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Any

from course_lib.virtual.spec import Spec
from course_lib.virtual.streams import STREAMS_A_DEVICE, Stream, Ticket, remember

DEFAULT = ("",)  # the name of the default stream, shared by the spans of a million operations


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
    def devices(self) -> tuple[int | None, ...]:
        """Whom it keeps busy: one device, or both ends of a copy, ``None`` being the host."""
        return (self.device,) if self.route is None else self.route


class Engine:
    """A part of a GPU that does one thing at a time: its cores, or one end of a link."""

    __slots__ = ("free_at",)

    def __init__(self) -> None:
        self.free_at = 0.0


class Task:
    """An operation whose times are not known yet.

    Attributes:
        seconds: how long it takes.
        engines: what it needs to run.
        ready: when it can start as far as is known: the host has enqueued it, and the operations
            that it waits for, apart from those in ``missing``, are done.
        missing: how many operations it waits for whose times are not known.
        followers: the operations that wait for it.
        spans: what its times are to be noted in when they are known.
        end: when it is done; ``None`` until that is known.
    """

    __slots__ = ("end", "engines", "followers", "missing", "ready", "seconds", "spans")

    def __init__(
        self, seconds: float, engines: list[Engine], ready: float, spans: list[Span]
    ) -> None:
        self.seconds, self.engines, self.ready, self.spans = seconds, engines, ready, spans
        self.missing = 0
        self.followers: list[Task] = []
        self.end: float | None = None

    def wait_for(self, other: Task) -> None:
        if other.end is None:
            self.missing += 1
            other.followers.append(self)
        else:
            self.ready = max(self.ready, other.end)

    def run(self) -> None:
        """Take the engines as soon as they are free; the times are known then."""
        start = max(self.ready, *[engine.free_at for engine in self.engines])
        self.end = start + self.seconds
        for engine in self.engines:
            engine.free_at = self.end
        for span in self.spans:
            span.start, span.end = start, self.end


class _Here(threading.local):
    """Every thread has a current device of its own."""

    device = 0


class Clock:
    """The host's time and each stream's, in simulated seconds since the machine started.

    Attributes:
        host: what the host's clock says.
        streams: for each device its streams, the default one first.
        current: for each device the stream that work is enqueued on.
        current_device: index of the device that this thread means when it names none.
        ended: whether other virtual GPUs, with a clock of their own, took the place of these.
        has_side_streams: whether any device has more than its default stream.
        seen_by_host: how many of each stream's operations the host has waited for.
    """

    def __init__(self, spec: Spec, device_count: int) -> None:
        self.spec = spec
        self.host = 0.0
        self.streams = [[Stream(self, index, "")] for index in range(device_count)]
        self.current = [streams[0] for streams in self.streams]
        self._here = _Here()
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
        self._ready: list[tuple[float, int, Task]] = []  # a heap of what waits for nothing
        self._numbers = count()

    @property
    def current_device(self) -> int:
        return self._here.device

    @current_device.setter
    def current_device(self, device: int) -> None:
        self._here.device = device

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
        stream.count += 1
        start = end = stream.free_at
        if not self.has_side_streams:
            if start < host:
                start = host
            stream.free_at = self._cores[device].free_at = end = start + seconds
        spans = []
        if self.listeners:
            names = (stream.name,) if stream.name else DEFAULT
            spans = self._tell(name, device, start, end, flops, nbytes, None, self.region, names)
        if self.has_side_streams:
            self._enqueue(seconds, [self._cores[device]], [stream], spans)
        return (stream, stream.count, name)

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
        streams[0].wait_stream(streams[-1])
        streams[0].count += 1
        names = tuple([stream.name for stream in streams])
        route = (source, destination)
        spans = self._tell("copy", ends[0], 0.0, 0.0, 0, nbytes, route, self.region, names)
        task = self._enqueue(spec.latency + nbytes / bandwidth, engines, streams, spans)
        if not self.has_side_streams:
            self._settle(task)
            for stream in streams:
                stream.settle()
        streams[-1].wait_stream(streams[0])
        if len(ends) == 1 and host_waits:
            streams[0].synchronize()
        return (streams[0], streams[0].count, "copy")

    def _tell(self, *what: Any) -> list[Span]:
        """Give every listener a span of its own."""
        spans = [Span(*what) for _ in self.listeners]
        for listen, span in zip(self.listeners, spans, strict=True):
            listen(span)
        return spans

    def _enqueue(
        self, seconds: float, engines: list[Engine], streams: list[Stream], spans: list[Span]
    ) -> Task:
        task = Task(seconds, engines, self.host, spans)
        for stream in streams:
            stream.put(task)
        if not task.missing:
            heappush(self._ready, (task.ready, next(self._numbers), task))
        return task

    def _settle(self, task: Task) -> None:
        """Work out the times of ``task``, and of all that is ready before it."""
        while task.end is None:
            self._run_earliest()

    def settle_what_is_ready(self) -> None:
        """Work out the times of all that is ready by the host's clock; the rest is not done."""
        while self._ready and self._ready[0][0] <= self.host:
            self._run_earliest()

    def _run_earliest(self) -> None:
        _, _, task = heappop(self._ready)
        task.run()
        for follower in task.followers:
            follower.missing -= 1
            follower.ready = max(follower.ready, task.end)
            if not follower.missing:
                heappush(self._ready, (follower.ready, next(self._numbers), follower))

    def end_of(self, tasks: list[Task]) -> float:
        """When all ``tasks`` are done; zero if there are none."""
        for task in tasks:
            self._settle(task)
        return max([task.end for task in tasks], default=0.0)

    def wait(self, seconds: float, stream: Stream, count: int, seen: dict[Stream, int]) -> None:
        """Make the host wait until ``seconds``, for the first ``count`` operations of ``stream``.

        Args:
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
