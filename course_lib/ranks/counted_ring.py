"""A ring for tensors without numbers: the bytes, the memory and the seconds, and nothing else.

With ``backing="meta"`` there is nothing to add up, so no tensor need move. What
:mod:`course_lib.ranks.calls` and :class:`~course_lib.parallel.ring.Ring` do, they do here with
stand-ins, which know how many numbers a chunk has and on which rank it is. Every copy and every sum
is a task of the clock, as it is with tensors: it waits for the same ones and keeps the same link or
the same cores busy. So bytes, peaks and seconds are the ring's, beside whatever else the GPUs do.

A recording holds one span for each link that a collective uses, from its first copy to its last:
of a ring, one a rank. The sums have no spans.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from course_lib.parallel.ring import Ring
from course_lib.ranks.calls import Call
from course_lib.spans import Span
from course_lib.virtual import hazards
from course_lib.virtual.machine import machine
from course_lib.virtual.memory import Allocation
from course_lib.virtual.streams import Stream, remember
from course_lib.virtual.tasks import Engine, Piece, Task
from course_lib.virtual.tensor import VirtualTensor

_ONE_BY_ONE = nullcontext()  # whose turn it is, a stand-in knows


class CountedRing(Ring):
    """The steps of a ring on ``devices``, whose work begins and ends on their ``streams``."""

    def __init__(self, devices: Sequence[torch.device], streams: Sequence[Stream]) -> None:
        self.devices = list(devices)
        self._streams = list(streams)
        self._sending: list[_Queue] = []
        self._receiving: list[_Queue] = []
        self._ways: dict[tuple[int, int], _Way] = {}
        self.written: set[int] = set()  # which tensors are, by their identity

    def run(self, calls: Sequence[Call]) -> None:
        """Do what all ranks' ``calls`` ask for."""
        counted = [self._counted(rank, call) for rank, call in enumerate(calls)]
        with self.turning():
            counted[0].run(self, counted)
        self._note_accesses(calls)

    def _counted(self, rank: int, call: Call) -> Call:
        """``call`` with stand-ins for its tensors."""
        reduction = copy.copy(call.reduction)
        if reduction is not None:
            reduction.combine = _add  # type: ignore[assignment]  # of stand-ins, not of tensors
        inputs: list[Any] = [StandIn.of(tensor, self, rank) for tensor in call.inputs]
        outputs: list[Any] = [StandIn.of(tensor, self, rank) for tensor in call.outputs]
        return replace(call, inputs=inputs, outputs=outputs, reduction=reduction)

    @contextmanager
    def turning(self) -> Iterator[None]:
        self._sending = [_Queue((stream, "sends"), *stream.end()) for stream in self._streams]
        self._receiving = [_Queue((stream, "receives"), *stream.end()) for stream in self._streams]
        yield
        known: dict[Stream, int] = {}
        for stream in self._streams:
            remember(known, stream, stream.count, stream.seen)
        for stream, send, receive in zip(
            self._streams, self._sending, self._receiving, strict=True
        ):
            send.follow(receive)
            stream.go_on_after(send.ready, send.tasks, known)

    def between(self, rank: int, following: int) -> AbstractContextManager[None]:
        return _ONE_BY_ONE

    def on(self, rank: int) -> AbstractContextManager[None]:
        return _ONE_BY_ONE

    def next_round(self) -> None:
        for send, receive in zip(self._sending, self._receiving, strict=True):
            send.follow(receive)

    def send(self, rank: int, to: int, nbytes: int) -> None:  # type: ignore[override]
        """Let ``rank`` send so many bytes."""
        way = self._ways.get((rank, to))
        if way is None:
            way = self._ways[rank, to] = _Way(
                self.devices[rank].index,
                self.devices[to].index,
                (self._streams[rank].name, self._streams[to].name),
            )
        sending, receiving = self._sending[rank], self._receiving[to]
        sending.follow(receiving)
        task = way.piece(nbytes)
        sending.put(task)
        receiving.ready, receiving.tasks = sending.ready, [task]

    def compute(self, rank: int, nbytes: int) -> None:
        """Let ``rank`` read and write so many bytes of its memory."""
        clock = machine.clock
        seconds = nbytes / clock.spec.memory_bandwidth
        cores = clock.cores_of(self.devices[rank].index)
        self._receiving[rank].put(Task(seconds, [cores], -math.inf, []))

    def _note_accesses(self, calls: Sequence[Call]) -> None:
        """Tell each tensor that it was read, or written, on its rank's stream."""
        for stream, call in zip(self._streams, calls, strict=True):
            touched: list[Any] = call.tensors
            written = [tensor for tensor in touched if id(tensor) in self.written]
            hazards.check((stream, stream.count, call.name), touched, written)


class StandIn:
    """So many numbers of a tensor, in the place where it has them: as much of one as a ring uses.

    Attributes:
        ring: in which it is moved.
        device: the rank that it is on.
        start: where it begins, in bytes.
        shape: how many numbers it has, in which form.
        owner: identity of the tensor whose numbers they are; of what is on its way, ``None``.
        allocation: the memory of what is on its way.
    """

    __slots__ = ("allocation", "count", "device", "dtype", "owner", "ring", "shape", "start")

    def __init__(
        self,
        ring: CountedRing,
        device: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        start: int,
        owner: int | None,
        allocation: Allocation | None = None,
    ) -> None:
        self.ring, self.device, self.dtype, self.shape = ring, device, dtype, shape
        self.count = math.prod(shape)
        self.start, self.owner, self.allocation = start, owner, allocation

    @classmethod
    def of(cls, tensor: Tensor, ring: CountedRing, rank: int) -> StandIn:
        """The one of a whole tensor."""
        shape = tuple(tensor.shape)
        return cls(ring, rank, tensor.dtype, shape, tensor.data_ptr(), id(tensor))

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def numel(self) -> int:
        return self.count

    def data_ptr(self) -> int:
        return self.start

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def view(self, shape: int) -> StandIn:
        return self

    def view_as(self, other: StandIn) -> StandIn:
        return self

    def tensor_split(self, parts: int) -> list[StandIn]:
        """In parts that differ by one number at most, the longer ones first."""
        size, longer = divmod(self.count, parts)
        sizes = [size + (part < longer) for part in range(parts)]
        ring, device, dtype, owner, width = (
            self.ring,
            self.device,
            self.dtype,
            self.owner,
            self.dtype.itemsize,
        )
        starts = accumulate(sizes, initial=0)
        return [
            StandIn(ring, device, dtype, (size,), self.start + width * start, owner)
            for size, start in zip(sizes, starts, strict=False)
        ]

    def to(self, device: int, copy: bool = True) -> StandIn:
        """Send it: it takes memory there, until nobody needs it."""
        index = self.ring.devices[device].index
        allocation = machine.memories[index].allocate(self.nbytes)
        self.ring.send(self.device, device, self.nbytes)
        return StandIn(self.ring, device, self.dtype, self.shape, 0, None, allocation)

    def copy_(self, source: StandIn) -> None:
        """Be overwritten by it."""
        if source.device == self.device:
            self.ring.compute(self.device, 2 * self.nbytes)
        else:
            self.ring.send(source.device, self.device, self.nbytes)
        self._note_change()

    def div_(self, divisor: int, rounding_mode: str | None = None) -> None:
        """Be read and written."""
        self.ring.compute(self.device, 2 * self.nbytes)
        self._note_change()

    def mul_(self, factor: Any) -> None:
        """Be read and written; so is a factor that is a tensor here."""
        read = factor.nbytes if isinstance(factor, VirtualTensor) else 0
        self.ring.compute(self.device, 2 * self.nbytes + read)
        self._note_change()

    def add_(self, other: StandIn) -> StandIn:
        """Read it, and be read and written: so does every reduction."""
        self.ring.compute(self.device, 3 * self.nbytes)
        self._note_change()
        return self

    def _note_change(self) -> None:
        if self.owner is not None:
            self.ring.written.add(self.owner)


def _add(into: StandIn, other: StandIn) -> StandIn:
    return into.add_(other)


class _Queue:
    """A stream, as far as a ring needs one: when its next task can start, and after which."""

    __slots__ = ("lane", "ready", "tasks")

    def __init__(self, lane: object, ready: float, tasks: list[Task]) -> None:
        self.lane, self.ready, self.tasks = lane, ready, tasks

    def follow(self, other: _Queue) -> None:
        """Let what comes next here come after all that is in ``other``."""
        if self.ready < other.ready:
            self.ready = other.ready
        for task in other.tasks:
            if task not in self.tasks:
                self.tasks.append(task)

    def put(self, task: Task) -> None:
        """Enqueue it."""
        if task.ready < self.ready:
            task.ready = self.ready
        for earlier in self.tasks:
            task.wait_for(earlier)
        task.lane = self.lane
        self.tasks = [task]
        machine.clock.tasks.add(task)


class _Way:
    """From one GPU to another, in one collective: all of its copies are one span."""

    def __init__(self, source: int, destination: int, names: tuple[str, str]) -> None:
        clock = machine.clock
        self._latency, self._bandwidth, engines = clock.way(source, destination)
        self._engines: list[Engine] = engines
        route = (source, destination)
        self._spans: list[Span] = clock.tell(
            "copy", source, 0.0, 0.0, 0, 0, route, clock.region, names
        )

    def piece(self, nbytes: int) -> Task:
        """The next copy."""
        for span in self._spans:
            span.bytes += nbytes
        seconds = self._latency + nbytes / self._bandwidth
        return Piece(seconds, self._engines, -math.inf, self._spans)
