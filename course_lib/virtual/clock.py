"""Simulated time: CUDA's rules of what waits for what, with the seconds computed.

The host enqueues an operation on a stream and goes on. The operation is ready when the host has
enqueued it and everything before it on its stream is done. It starts when the part of the GPU that
it needs is free. A GPU has one set of cores, which the operations of all its streams take in turns,
and for each link a part that sends and a part that receives, which work beside the cores and each
other. So has a network card, which a copy to another node takes in its turn. What is ready first
goes first.

A copy between two devices takes its place on the current stream of both, as PyTorch's does: it
waits for both, and both go on after it. Only a read of a value, or ``synchronize``, makes the
host wait.

As long as each device has its default stream alone, an operation's times are known when it is
enqueued. With side streams they are not: something enqueued later may be ready sooner. Then
operations wait as ``tasks`` until the host waits for one of them, or a trace ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from course_lib.spans import Span
from course_lib.virtual.network import Nodes
from course_lib.virtual.spec import Spec
from course_lib.virtual.streams import STREAMS_A_DEVICE, Stream, Ticket, remember
from course_lib.virtual.tasks import Engine, Task, Tasks

DEFAULT = ("",)  # the name of the default stream, shared by the spans of a million operations


class _Here(threading.local):
    """Every thread has a current device of its own."""

    device = 0


class Clock:
    """The host's time and each stream's, in simulated seconds since the machine started.

    Attributes:
        host: what the host's clock says.
        nodes: which device is in which node.
        streams: for each device its streams, the default one first.
        current: for each device the stream that work is enqueued on.
        current_device: index of the device that this thread means when it names none.
        tasks: the operations whose times are not known.
        in_use: whether it is the clock of the machine as it is now.
        has_side_streams: whether any device has more than its default stream.
        seen_by_host: how many of each stream's operations the host has waited for.
        region: what the program says that it is doing.
        listeners, hazard_listeners: who wants to know of each span, and of each missing wait.
        after_host_waited: what is to be done each time (see ``host_copies``).
        own_device: the only device that the running process works with; ``None``: it has all.
        before_synchronize: what is to be done before the host waits for a whole device.
    """

    def __init__(self, spec: Spec, device_count: int, nodes: Nodes) -> None:
        self.spec = spec
        self.nodes = nodes
        self.host = 0.0
        self.streams = [[Stream(self, index, "")] for index in range(device_count)]
        self.current = [streams[0] for streams in self.streams]
        self._here = _Here()
        self.tasks = Tasks()
        self.in_use = True
        self.has_side_streams = False
        self._made = [0] * device_count
        self.seen_by_host: dict[Stream, int] = {}
        self.region = ""
        self.listeners: list[Callable[[Span], None]] = []
        self.hazard_listeners: list[Callable[[Any], None]] = []
        self.after_host_waited: Callable[[], None] | None = None
        self.own_device: int | None = None
        self.before_synchronize: Callable[[], None] | None = None
        self._links: list[list[Stream]] = [[] for _ in range(device_count)]
        self._cores = [Engine() for _ in range(device_count)]
        # A link carries both directions at once; the one to the host is another than the others.
        self._senders = [Engine() for _ in range(device_count)]
        self._receivers = [Engine() for _ in range(device_count)]
        self._to_host = [Engine() for _ in range(device_count)]
        self._from_host = [Engine() for _ in range(device_count)]
        cards = nodes.count * nodes.cards
        self._card_senders = [Engine() for _ in range(cards)]
        self._card_receivers = [Engine() for _ in range(cards)]

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
            spans = self.tell(name, device, start, end, flops, nbytes, None, self.region, names)
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
        ends = [device for device in (source, destination) if device is not None]
        streams = [self.current[device] for device in ends]
        latency, bandwidth, engines = self.way(source, destination)
        self.host += self.spec.launch_overhead
        streams[0].wait_stream(streams[-1])
        streams[0].count += 1
        names = tuple([stream.name for stream in streams])
        route = (source, destination)
        spans = self.tell("copy", ends[0], 0.0, 0.0, 0, nbytes, route, self.region, names)
        task = self._enqueue(latency + nbytes / bandwidth, engines, streams, spans)
        if not self.has_side_streams:
            self.tasks.settle(task)
            for stream in streams:
                stream.settle()
        streams[-1].wait_stream(streams[0])
        if len(ends) == 1 and host_waits:
            streams[0].synchronize()
        return (streams[0], streams[0].count, "copy")

    def way(self, source: int | None, destination: int | None) -> tuple[float, float, list[Engine]]:
        """From one device to another, ``None`` being the host: latency in seconds, bytes a second,
        and what a copy keeps busy."""
        spec = self.spec
        if source is None or destination is None:
            one_way = self._to_host if destination is None else self._from_host
            device = source if source is not None else destination
            assert device is not None, "one end is a device"
            return spec.latency, spec.host_bandwidth, [one_way[device]]
        if self.nodes.network_joins(source, destination):
            sender, receiver = self.nodes.card_of(source), self.nodes.card_of(destination)
            cards = [self._card_senders[sender], self._card_receivers[receiver]]
            return spec.network.latency, spec.network.bandwidth, cards
        links = [self._senders[source], self._receivers[destination]]
        return spec.latency, spec.link_bandwidth, links

    def cores_of(self, device: int) -> Engine:
        """What an operation keeps busy that computes."""
        return self._cores[device]

    def tell(self, *what: Any) -> list[Span]:
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
        self.tasks.add(task)
        return task

    def wait(self, seconds: float, stream: Stream, count: int, seen: dict[Stream, int]) -> None:
        """Make the host wait until ``seconds``, for the first ``count`` operations of ``stream``.

        Args:
            seen: what they came after themselves.
        """
        if self.host < seconds:
            self.host = seconds
        remember(self.seen_by_host, stream, count, seen)
        if self.after_host_waited is not None:
            self.after_host_waited()

    def end(self) -> None:
        """Have no use from now on, or until this machine is the one in use again."""
        self.in_use = False
        if self.after_host_waited is not None:
            self.after_host_waited()

    def synchronize(self, device: int) -> None:
        """Make the host wait for all streams of ``device``."""
        if self.before_synchronize is not None:
            self.before_synchronize()
        for stream in (*self.streams[device], *self._links[device]):
            stream.synchronize()

    def add_link_stream(self, device: int, name: str) -> Stream:
        """A stream of ``device`` for one way of communication, which no program gets by chance."""
        self.has_side_streams = True
        self._links[device].append(Stream(self, device, name))
        return self._links[device][-1]

    def drop_link_streams(self) -> None:
        """Forget the streams of communication: nobody uses them any more."""
        self._links = [[] for _ in self._links]

    def new_stream(self, device: int) -> Stream:
        """One more stream of ``device``, or one of those it has if they are many."""
        streams = self.streams[device]
        self.has_side_streams = True
        self._made[device] += 1
        if len(streams) <= STREAMS_A_DEVICE:
            streams.append(Stream(self, device, f"stream {len(streams)}"))
            return streams[-1]
        return streams[1 + (self._made[device] - 1) % STREAMS_A_DEVICE]
