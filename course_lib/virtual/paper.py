"""GPUs on paper: clock and links alone, for machines of thousands of GPUs.

PyTorch keeps a device's index in 8 bits, so 128 virtual GPUs are the most that there can be. What
only sends, adds and waits, as collectives do, needs no PyTorch: a tensor on paper has a size, a GPU
on paper a number, and :class:`PaperMachine` keeps the time by the rules of ``clock.Clock``. The
collectives of ``course_lib.parallel`` run on it as they are, and so do those that a learner writes.
There are no numbers and no memory that could fill up, and missing waits go unnoticed.

The clock works out the times of operations on side streams when all of them are known, since what
is enqueued later may be ready sooner. Here that is done only where it matters. As long as nothing
waits for a link or for cores that are busy, it does not matter who comes first, and an operation's
times are known when it is enqueued. The first one that would have to wait makes the machine go
through its log once more, in the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from course_lib.virtual.network import NETWORK, WITHIN, Nodes
from course_lib.virtual.paper_tensor import PaperDevice, PaperStream, PaperTensor
from course_lib.virtual.spec import CLASSROOM, Spec
from course_lib.virtual.streams import STREAMS_A_DEVICE
from course_lib.virtual.tasks import Engine, Task, Tasks

_WAIT = -1  # stands in the log where an operation has its bytes


class PaperMachine:
    """Some GPUs on paper, with a clock at zero.

    Args:
        count: how many GPUs; no more than a computer can count in a while.
        spec: what each can do, :data:`course_lib.CLASSROOM` if not given.
        nodes: in how many nodes they stand, as in :func:`course_lib.devices`.

    Attributes:
        gpus: to give to :meth:`tensors`, and wherever ``course_lib.hardware`` takes a device.
        bytes_by_link: bytes that crossed each kind of link so far, as a trace counts them.
        copies_by_link: in how many copies.

    Raises:
        ValueError: ``count`` or ``nodes`` is no whole number from 1 on, or they do not divide.
    """

    def __init__(self, count: int, spec: Spec = CLASSROOM, nodes: int = 1) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"a PaperMachine has a whole number of GPUs from 1 on, not {count!r}")
        self.spec = spec
        self.nodes = Nodes.of(count, nodes, spec.network)
        self.gpus = [PaperDevice(self, index) for index in range(count)]
        self.bytes_by_link = {WITHIN: 0, NETWORK: 0}
        self.copies_by_link = {WITHIN: 0, NETWORK: 0}
        self._card_senders = [Engine() for _ in range(self.nodes.count * self.nodes.cards)]
        self._card_receivers = [Engine() for _ in self._card_senders]
        self._host = 0.0
        self._streams = [gpu.current for gpu in self.gpus]
        self._log: list[Any] | None = None  # since there are side streams: two streams and bytes
        self._someone_waits = False

    def tensors(self, *shape: int, dtype: torch.dtype = torch.float32) -> list[PaperTensor]:
        """One tensor of that shape a GPU."""
        return [PaperTensor(gpu, shape, dtype) for gpu in self.gpus]

    @property
    def seconds(self) -> float:
        """Simulated seconds until all that was enqueued so far is done."""
        if self._someone_waits:
            return max(self._host, self._seconds_in_order_of_arrival())
        return max(self._host, *(stream.free_at for stream in self._streams))

    def copy(self, source: PaperDevice, destination: PaperDevice, nbytes: int) -> None:
        """Enqueue a copy from one GPU to another, on the current streams of both."""
        link = WITHIN if source.node == destination.node else NETWORK
        self.bytes_by_link[link] += nbytes
        self.copies_by_link[link] += 1
        self._enqueue(source.current, destination.current, nbytes)

    def compute(self, device: PaperDevice, nbytes: int) -> None:
        """Enqueue an operation that reads and writes so many bytes in all."""
        self._enqueue(device.current, device.current, nbytes)

    def new_stream(self, device: PaperDevice) -> PaperStream:
        """One more stream of ``device``, or one of those it has if they are many."""
        if self._log is None:
            self._log = []
            busy_until = [engine.free_at for engine in self._engines()]
            self._before = self._host, busy_until, [each.free_at for each in self._streams]
        made, device.made = device.made, device.made + 1
        if made < STREAMS_A_DEVICE:
            device.streams.append(PaperStream(device, len(self._streams)))
            self._streams.append(device.streams[-1])
        return device.streams[1 + made % STREAMS_A_DEVICE]

    def wait(self, stream: PaperStream, other: PaperStream) -> None:
        """Let what is enqueued on the one from now on come after all that is on the other now."""
        if self._log is not None:
            self._log += (stream, other, _WAIT)
        if stream.free_at < other.free_at:
            stream.free_at = other.free_at

    def _enqueue(self, out: PaperStream, into: PaperStream, nbytes: int) -> None:
        self._host = ready = self._host + self.spec.launch_overhead
        if self._log is not None:
            self._log += (out, into, nbytes)
            if self._someone_waits:
                return
        one, other, seconds = self._what_it_needs(out, into, nbytes)
        if ready < out.free_at:
            ready = out.free_at
        if ready < into.free_at:
            ready = into.free_at
        if ready < one.free_at or ready < other.free_at:
            if self._log is not None:
                self._someone_waits = True
                return
            ready = max(one.free_at, other.free_at)
        out.free_at = into.free_at = one.free_at = other.free_at = ready + seconds

    def _what_it_needs(
        self, out: PaperStream, into: PaperStream, nbytes: int
    ) -> tuple[Engine, Engine, float]:
        """The two parts of the machine that an operation keeps busy, and for how long."""
        spec, source, destination = self.spec, out.device, into.device
        if out is into:
            return source.cores, source.cores, nbytes / spec.memory_bandwidth
        if source.node == destination.node:
            seconds = spec.latency + nbytes / spec.link_bandwidth
            return source.sender, destination.receiver, seconds
        network = spec.network
        seconds = network.latency + nbytes / network.bandwidth
        return self._card_senders[source.card], self._card_receivers[destination.card], seconds

    def _engines(self) -> Iterator[Engine]:
        for gpu in self.gpus:
            yield from (gpu.sender, gpu.receiver, gpu.cores)
        yield from self._card_senders
        yield from self._card_receivers

    def _seconds_in_order_of_arrival(self) -> float:
        """When the last operation in the log ends, if what is ready first goes first."""
        host, free_at, settled = self._before
        for engine, seconds in zip(self._engines(), free_at, strict=True):
            engine.free_at = seconds
        settled = settled + [0.0] * (len(self._streams) - len(settled))
        last: list[list[Task]] = [[] for _ in self._streams]
        tasks = Tasks()
        log = iter(self._log or ())
        for out, into, nbytes in zip(log, log, log, strict=True):
            number, other = out.number, into.number
            if nbytes == _WAIT:
                settled[number] = max(settled[number], settled[other])
                last[number] = last[number] + [t for t in last[other] if t not in last[number]]
                continue
            one, another, seconds = self._what_it_needs(out, into, nbytes)
            host += self.spec.launch_overhead
            ready = max(host, settled[number], settled[other])
            task = Task(seconds, [one, another], ready, [])
            for earlier in (*last[number], *last[other]):
                task.wait_for(earlier)
            last[number] = last[other] = [task]
            tasks.add(task)
        return max(*settled, *[tasks.end_of(each) for each in last])
